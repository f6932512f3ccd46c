"""Base rates on LFW View 1: `python benchmarks/base_rates.py TRAIN DEV TEST [--cache DIR]`.

A head is fitted to TRAIN and DEV, and the pairs of TRAIN and of TEST are resampled to 1, 5, 20, 50 and 80 % same
pairs. Printed are, means over draws, the expected calibration error of the probabilities as they are and shifted to
the right share, the estimated share, and how often drift is seen. TRAIN itself is scored by a head that has seen it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

import batchverify
from batchverify.evaluation.figures import calibration_error
from batchverify.heads.drift import checked, independent_pairs
from batchverify.heads.head import Head
from batchverify.heads.prior import estimate, shift

SHARES = (0.01, 0.05, 0.2, 0.5, 0.8)
PAIRS = 1000
DRAWS = 50


def resampled(labels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Rows of `PAIRS` pairs of which this share is same, drawn with replacement."""
    same = round(share * PAIRS)
    kinds = ((0, same), (1, PAIRS - same))
    return np.concatenate([rng.choice(np.flatnonzero(labels == kind), count) for kind, count in kinds])


def measured(
    labels: np.ndarray, probability: np.ndarray, people: np.ndarray, about: Any, share: float
) -> list[float]:
    """Errors of calibration before and after, mean and largest error of the share, how often drift is seen."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(DRAWS):
        drawn = resampled(labels, share, rng)
        truth, scores = labels[drawn], probability[drawn]
        found = estimate(scores, draws=40)
        rows.append(
            [
                calibration_error(truth, scores),
                calibration_error(truth, shift(scores, share)),
                found.share,
                abs(found.share - share),
                float(found.low <= share <= found.high),
                float(checked(about, scores, independent_pairs(*people[:, drawn])).verdict == "drift"),
            ]
        )
    means = np.mean(rows, axis=0)
    return [*means[:3].tolist(), float(np.max(rows, axis=0)[3]), *means[4:].tolist()]


@click.command()
@click.argument("train")
@click.argument("dev")
@click.argument("test")
@click.option("--cache", help="Embedding cache.")
@click.option("--backbone", default="vggface2", show_default=True)
def main(train: str, dev: str, test: str, cache: str | None, backbone: str) -> None:
    """Print the figures of train and test."""
    options: dict[str, Any] = {"cache": cache, "backbone": backbone, "quiet": True}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "head.safetensors")
        batchverify.train(train, dev, path, **options)
        about = Head.load(path).about
        for name, manifest in (("train", train), ("test", test)):
            table = batchverify.score(manifest, head=path, **options).to_arrow()
            known = table.filter(table.column("probability").is_valid())
            labels, probability = (
                known.column(each).to_numpy(zero_copy_only=False) for each in ("true_label", "probability")
            )
            names = [known.column(each).to_numpy(zero_copy_only=False) for each in ("person_a", "person_b")]
            people = np.unique(np.stack(names).astype(str), return_inverse=True)[1].reshape(2, -1)
            whole = checked(about, probability, independent_pairs(*people))
            click.echo(f"{name} as it is: {whole.verdict}, chance {whole.chance}, distance {whole.distance}")
            click.echo(f"{name}: {len(labels):,} pairs, {DRAWS} draws of {PAIRS:,} for each share")
            click.echo("share   ECE as is   ECE shifted   estimate   largest error   in interval   drift")
            for share in SHARES:
                before, after, found, worst, held, drift = measured(labels, probability, people, about, share)
                click.echo(
                    f"{share:5.2f} {before:11.4f} {after:13.4f} {found:10.4f} {worst:15.4f} {held:13.2f} {drift:7.2f}"
                )


if __name__ == "__main__":
    main()
