"""Extrapolated false accept rates against counted ones: `python benchmarks/extremes.py VECTORS MANIFEST...`.

VECTORS: the folder of one fingerprint in an embedding cache (CACHE/v1/DIGEST) that holds the manifests' images.
All couples of images of two people are compared by cosine, which counts the rates; each of 20 samples of 10,000
couples is extrapolated without knowing the others.
"""

import csv
import hashlib
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from batchverify.evaluation.extremes import RATES, fit_tail, refusal

SAMPLE, SAMPLES, BLOCK = 10_000, 20, 500


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


def couples(manifests: list[str], folder: Path) -> np.ndarray:
    """(N,) float32, the cosines of all couples of images of two people."""
    known, rows, names = vectors(folder), [], []
    for image, person in people(manifests).items():
        vector = known.get(hashlib.sha256(image.read_bytes()).digest())
        if vector is not None:
            rows.append(vector.astype(np.float32))
            names.append(person)
    table, codes = np.array(rows), np.unique(names, return_inverse=True)[1]
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    parts = []
    for start in range(0, len(table), BLOCK):
        other = np.arange(start, len(table))
        block = np.arange(start, min(start + BLOCK, len(table)))
        wanted = (other > block[:, None]) & (codes[block][:, None] != codes[other])
        parts.append((table[block] @ table[start:].T)[wanted])
    print(f"{len(table):,} images of {codes.max() + 1:,} people")
    return np.concatenate(parts)


def main() -> None:
    """Print the table."""
    scores = couples(sys.argv[2:], Path(sys.argv[1]))
    ascending = np.sort(scores)
    print(f"{len(scores):,} couples of two people; {SAMPLES} samples of {SAMPLE:,}")
    rng = np.random.default_rng(0)
    samples = [rng.choice(scores, SAMPLE, replace=False) for _ in range(SAMPLES)]
    reasons = [refusal(sample) for sample in samples]
    print("refused:", [each for each in reasons if each] or "none")
    tails = [fit_tail(sample) for sample, reason in zip(samples, reasons, strict=True) if reason is None]
    print(
        "| FAR | counted threshold | extrapolated: median (low, high) | counted FAR there: median (10 %, 90 %) |"
    )
    print("| ---: | ---: | ---: | ---: |")
    for rate in (1e-4, *RATES):
        levels = np.array([tail.level(rate) for tail in tails])
        true = 1 - np.searchsorted(ascending, levels) / len(scores)
        low, middle, high = np.quantile(true, [0.1, 0.5, 0.9])
        counted = ascending[-max(round(rate * len(scores)), 1)]
        print(
            f"| {rate:g} | {counted:.3f} | {np.median(levels):.3f} ({levels.min():.3f}, {levels.max():.3f}) "
            f"| {middle:.2g} ({low:.2g}, {high:.2g}) |"
        )
    print("shapes:", ", ".join(f"{tail.shape:.2f}" for tail in tails))


if __name__ == "__main__":
    main()
