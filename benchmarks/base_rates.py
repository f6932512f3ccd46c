"""Base rates on LFW View 1: `python benchmarks/base_rates.py TRAIN DEV TEST [--cache DIR]`.

A head is fitted to TRAIN and DEV, and the pairs of TRAIN and of TEST are resampled to 1, 5, 20, 50 and 80 % same
pairs. Printed are, means over draws, the expected calibration error of the probabilities as they are and shifted to
the right share, the estimated share, and how often drift is seen. TRAIN itself is scored by a head that has seen it.
The same for pairs that break the assumption, of which drift should be seen: TEST by another backbone and its head,
and TEST with blurred pictures.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageFilter
from results import publish, table

import batchverify
from batchverify.evaluation.figures import calibration_error
from batchverify.heads.drift import checked, independent_pairs
from batchverify.heads.head import Head
from batchverify.heads.prior import estimate, shift

SHARES = (0.01, 0.05, 0.2, 0.5, 0.8)
PAIRS = 1000
HEADER = [
    *("pairs", "share of same", "ECE as is", "ECE shifted", "estimate", "largest error"),
    *("truth in the interval", "drift seen"),
]
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
                float(found.interval[0] <= share <= found.interval[1]),
                float(checked(about, scores, independent_pairs(*people[:, drawn])).verdict == "drift"),
            ]
        )
    means = np.mean(rows, axis=0)
    return [*means[:3].tolist(), float(np.max(rows, axis=0)[3]), *means[4:].tolist()]


@dataclass(frozen=True)
class Scored:
    """The scored pairs of a set. labels, probability: (N,). people: (2, N), numbers of both people."""

    name: str
    labels: np.ndarray
    probability: np.ndarray
    people: np.ndarray

    @classmethod
    def of(cls, name: str, manifest: str, **options: Any) -> Scored:
        """Score a manifest."""
        table = batchverify.score(manifest, quiet=True, **options).to_arrow()
        known = table.filter(table.column("probability").is_valid())
        columns = ("true_label", "probability", "person_a", "person_b")
        labels, probability, a, b = (known.column(each).to_numpy(zero_copy_only=False) for each in columns)
        people = np.unique(np.stack([a, b]).astype(str), return_inverse=True)[1].reshape(2, -1)
        return cls(name, labels, probability, people)

    def rows(self, about: Any) -> Iterator[list[str]]:
        """The figures for every share."""
        for share in SHARES:
            before, after, found, worst, held, drift = measured(
                self.labels, self.probability, self.people, about, share
            )
            yield [
                self.name,
                f"{share:g}",
                *(f"{each:.4f}" for each in (before, after, found, worst)),
                *(f"{each:.2f}" for each in (held, drift)),
            ]


def blurred(manifest: Path, radius: float, folder: Path) -> str:
    """A copy of a manifest whose pictures are blurred by a Gaussian of so many pixels."""
    with manifest.open(newline="", encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for side in ("image_a", "image_b"):
            source = manifest.parent / row[side]
            target = folder / f"{source.parent.name}-{source.stem}.png"
            if not target.exists():
                with Image.open(source) as image:
                    image.convert("RGB").filter(ImageFilter.GaussianBlur(radius)).save(target, compress_level=1)
            row[side] = str(target)
    copy = folder / "manifest.csv"
    with copy.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(copy)


@click.command(help=__doc__)
@click.argument("train")
@click.argument("dev")
@click.argument("test")
@click.option("--cache", help="Embedding cache.")
@click.option("--backbone", default="vggface2", show_default=True)
@click.option("--other", default="compact", show_default=True, help="Backbone whose scores break the assumption.")
@click.option("--blur", default=(2.0, 4.0), multiple=True, show_default=True, help="Radii in pixels.")
@click.option("--record", is_flag=True, help="Put the table into RESULTS.md.")
def main(
    train: str,
    dev: str,
    test: str,
    cache: str | None,
    backbone: str,
    other: str,
    blur: tuple[float, ...],
    record: bool,
) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours: dict[str, Any] = {"cache": cache, "backbone": backbone}
        path = str(folder / "head.safetensors")
        batchverify.train(train, dev, path, quiet=True, **ours)
        about = Head.load(path).about
        sets = [Scored.of(each, manifest, head=path, **ours) for each, manifest in (("train", train), ("test", test))]
        sets.append(Scored.of(f"test, scores of {other}", test, cache=cache, backbone=other))
        for radius in blur:
            (folder / f"{radius:g}").mkdir()
            copy = blurred(Path(test), radius, folder / f"{radius:g}")
            shown = f"test, blurred by {radius:g} pixels"
            sets.append(Scored.of(shown, copy, head=path, **ours))
        rows = [row for each in sets for row in each.rows(about)]
        whole = [
            f"{each.name}: {verdict.verdict} (chance {verdict.chance:.3f}, distance {verdict.distance:.3f})"
            for each in sets
            for verdict in [checked(about, each.probability, independent_pairs(*each.people))]
        ]
    note = f"{DRAWS} draws of {PAIRS:,} pairs for each share. All pairs of each set as they are: {'; '.join(whole)}."
    command = f"python benchmarks/base_rates.py TRAIN DEV TEST --backbone {backbone}"
    publish("Base rates", command, f"{table(HEADER, rows)}\n\n{note}", record=record)


if __name__ == "__main__":
    main()
