"""Extrapolated false accept rates against counted ones: `python benchmarks/extremes.py FOLDER MANIFEST...`.

FOLDER: that of one fingerprint in an embedding cache (CACHE/v1/DIGEST) that holds the manifests' images.
All couples of images of two people are compared by cosine, which counts the rates; each of 20 samples of 10,000
couples is extrapolated without knowing the others.
"""

import csv
import hashlib
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
from results import publish, table

from batchverify.evaluation.extremes import RATES
from batchverify.evaluation.pareto_tail import Tail, fit_tail, refusal

SAMPLE, SAMPLES, BLOCK = 10_000, 20, 500
HEADER = [
    "FAR",
    "threshold, counted",
    "extrapolated: median (lowest to highest)",
    "FAR counted there: median (10 % to 90 %)",
]


def people(manifests: list[str]) -> dict[Path, str]:
    """The person of every image."""
    found = {}
    for name in manifests:
        with Path(name).open(encoding="utf8", newline="") as file:
            for row in csv.DictReader(file):
                for side in "ab":
                    found[Path(name).parent / row[f"image_{side}"]] = row[f"person_{side}"]
    return found


def vectors(folder: Path) -> dict[bytes, np.ndarray]:
    """The cached vectors by the SHA-256 of their images."""
    found: dict[bytes, np.ndarray] = {}
    for part in sorted((folder / "data").glob("*.parquet")):
        table = pq.read_table(part, columns=["key", "embedding"])
        cells = zip(table["key"].to_pylist(), table["embedding"].to_pylist(), strict=True)
        found |= {
            key: np.frombuffer(cell, np.float16) if isinstance(cell, bytes) else np.asarray(cell, np.float32)
            for key, cell in cells
        }
    return found


def couples(manifests: list[str], folder: Path) -> tuple[np.ndarray, str]:
    """(N,) float32, the cosines of all couples of images of two people; and how many images there are."""
    known, rows, names = vectors(folder), [], []
    for image, person in people(manifests).items():
        vector = known.get(hashlib.sha256(image.read_bytes()).digest())
        if vector is not None:
            rows.append(vector.astype(np.float32))
            names.append(person)
    if not rows:
        raise click.UsageError(f"{folder}: holds no vector of the manifests' images")
    unit, codes = np.array(rows), np.unique(names, return_inverse=True)[1]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    parts = []
    for start in range(0, len(unit), BLOCK):
        other = np.arange(start, len(unit))
        block = np.arange(start, min(start + BLOCK, len(unit)))
        wanted = (other > block[:, None]) & (codes[block][:, None] != codes[other])
        parts.append((unit[block] @ unit[start:].T)[wanted])
    return np.concatenate(parts), f"{len(unit):,} images of {codes.max() + 1:,} people"


def tail_rows(scores: np.ndarray, tails: list[Tail]) -> list[list[str]]:
    """A row for each rate: the counted threshold, the extrapolated ones, and the rate counted at these."""
    ascending, rows = np.sort(scores), []
    for rate in (1e-4, *RATES):
        levels = np.array([tail.level(rate) for tail in tails])
        true = 1 - np.searchsorted(ascending, levels) / len(scores)
        low, middle, high = np.quantile(true, [0.1, 0.5, 0.9])
        counted = ascending[-max(round(rate * len(scores)), 1)]
        rows.append(
            [
                f"{rate:g}",
                f"{counted:.3f}",
                f"{np.median(levels):.3f} ({levels.min():.3f} to {levels.max():.3f})",
                f"{middle:.2g} ({low:.2g} to {high:.2g})",
            ]
        )
    return rows


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("manifests", type=click.Path(exists=True, dir_okay=False), nargs=-1, required=True)
@click.option("--record", is_flag=True, help="Put the table into RESULTS.md.")
def main(folder: Path, manifests: tuple[str, ...], record: bool) -> None:
    """Print the table. FOLDER: the vectors of one fingerprint, CACHE/v1/DIGEST."""
    scores, about = couples(list(manifests), folder)
    rng = np.random.default_rng(0)
    samples = [rng.choice(scores, SAMPLE, replace=False) for _ in range(SAMPLES)]
    reasons = [refusal(sample) for sample in samples]
    refused = [reason for reason in reasons if reason is not None]
    tails = [fit_tail(sample) for sample, reason in zip(samples, reasons, strict=True) if reason is None]
    shapes = sorted(tail.shape for tail in tails)
    note = (
        f"{about}: {len(scores):,} couples of two people. {SAMPLES} samples of {SAMPLE:,} of them, "
        f"{len(refused)} refused{': ' + refused[0] if refused else ''}; "
        f"shapes from {shapes[0]:.2f} to {shapes[-1]:.2f}."
    )
    names = " ".join(f"{Path(name).parent.name}/{Path(name).name}" for name in manifests)
    call = f"python benchmarks/extremes.py FOLDER {names}"
    publish(
        "Extrapolated false accept rates",
        call,
        f"{table(HEADER, tail_rows(scores, tails))}\n\n{note}",
        record=record,
    )


if __name__ == "__main__":
    main()
