"""Pairs of which one image in twenty is broken, beside the same pairs with none: `python benchmarks/broken.py ROOT`.

ROOT: LFW's folder. Cold runs of `score` from process start to exit, in turn; the images' files were read before.
Every row must state the reason that its images have, and every other row must be that of the run with none broken.
Exits with code 1 if one does not.
"""

import argparse
import csv
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from broken_images import Kind, kinds
from results import publish, table
from score import run

SHARE = 0.05


@dataclass
class Pairs:
    """Rows of pairs over numbered images, whole or with broken ones in their places.

    cells: of the manifest, by image. pairs: (N, 2) numbers. kind: of the images that are broken.
    """

    folder: Path
    cells: list[str]
    pairs: np.ndarray
    kind: dict[int, Kind]

    def write(self, name: str, cells: list[str]) -> Path:
        """A manifest."""
        path = self.folder / name
        with path.open("w", newline="", encoding="utf8") as file:
            writer = csv.writer(file)
            writer.writerow(("image_a", "image_b"))
            writer.writerows((cells[a], cells[b]) for a, b in self.pairs.tolist())
        return path


def prepare(folder: Path, root: Path, pairs: int, crop: str, seed: int) -> tuple[Pairs, Path, Path]:
    """The pairs, and their manifests without and with broken images; each kind is there equally often."""
    dice = random.Random(seed)
    images = folder / "images"
    images.mkdir()
    found = sorted(root.rglob("*.jpg"))
    for number, path in enumerate(found):
        (images / f"{number}.jpg").write_bytes(path.read_bytes())
    cells = [f"{number}.jpg" for number in range(len(found))]
    known = kinds(crop)
    chosen = dice.sample(range(len(found)), round(SHARE * len(found)))
    kind = {number: known[place % len(known)] for place, number in enumerate(chosen)}
    numbers = np.random.default_rng(seed).integers(0, len(found), (pairs, 2))
    made = Pairs(folder, cells, numbers, kind)
    broken = list(cells)
    for number, each in kind.items():
        broken[number] = each.make(images / f"broken-{number}.jpg", found[number].read_bytes())
    return made, made.write("whole.csv", cells), made.write("broken.csv", broken)


def score(manifest: Path, crop: str, number: int) -> tuple[float, pa.Table]:
    """Seconds of a cold run, and its rows."""
    output = manifest.with_name(f"{manifest.stem}-{number}.parquet")
    where = ["-o", str(output), "--cache", str(output.with_suffix(".cache"))]
    options = ["--image-root", str(manifest.parent / "images"), "--crop", crop, "--json", "-q"]
    done = run("-m", "batchverify.cli", "score", str(manifest), *where, *options)
    if json.loads(done.said)["cached"]:
        sys.exit("the run was not cold")
    return done.seconds, pq.read_table(output)


def wrong_rows(pairs: Pairs, rows: pa.Table, whole: pa.Table) -> np.ndarray:
    """(N,) whether a row of the run with broken images states another reason, or another score than it should."""
    reasons = np.array([None] * len(pairs.cells), object)
    for number, kind in pairs.kind.items():
        reasons[number] = kind.reason
    a, b = reasons[pairs.pairs[:, 0]], reasons[pairs.pairs[:, 1]]
    status = np.array([one or other or "ok" for one, other in zip(a, b, strict=True)], object)
    wrong = np.zeros(len(pairs.pairs), bool)
    for name, expected in (("error_a", a), ("error_b", b), ("status", status)):
        wrong |= np.array(rows[name].to_pylist(), object) != expected
    fine = status == "ok"
    for name in ("probability", "label", "similarity"):
        given, expected = (each[name].to_pandas().to_numpy(float) for each in (rows, whole))
        wrong |= np.where(fine, given != expected, ~np.isnan(given))
    return wrong


def by_kind(pairs: Pairs, wrong: np.ndarray) -> list[list[str]]:
    """A row of the table for each kind."""
    images = Counter(kind.name for kind in pairs.kind.values())
    lines = []
    for name, reason in {kind.name: kind.reason for kind in pairs.kind.values()}.items():
        of_kind = np.isin(pairs.pairs, [n for n, kind in pairs.kind.items() if kind.name == name]).any(axis=1)
        lines.append([name, reason, str(images[name]), f"{of_kind.sum():,}", f"{(of_kind & wrong).sum():,}"])
    return sorted(lines, key=lambda line: line[1])


def main(options: argparse.Namespace) -> int:
    """Print the tables; with `--record`, keep them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs, whole, broken = prepare(folder, options.root, options.pairs, options.crop, options.seed)
        seconds: dict[str, list[float]] = {"none broken": [], "broken": []}
        wrong = np.zeros(options.pairs, bool)
        for number in range(options.rounds):
            took, expected = score(whole, options.crop, number)
            seconds["none broken"].append(took)
            took, rows = score(broken, options.crop, number)
            seconds["broken"].append(took)
            if len(rows) != options.pairs or len(expected) != options.pairs:
                sys.exit("rows are missing")
            wrong |= wrong_rows(pairs, rows, expected)
            print(time.strftime("%H:%M:%S"), {name: each[-1] for name, each in seconds.items()}, flush=True)
    rates = {name: options.pairs * len(each) / sum(each) for name, each in seconds.items()}
    runs = [
        [name, ", ".join(f"{each:.1f}" for each in seconds[name]), f"{rate:,.0f}", f"{rate / first:.3f}"]
        for first in [rates["none broken"]]
        for name, rate in rates.items()
    ]
    images = len(pairs.kind)
    said = (
        f"{wrong.sum():,} of {options.pairs:,} rows wrong (reason, score or status); {images} images broken"
    )
    publish(
        f"Broken images, {options.pairs:,} pairs of {len(pairs.cells):,} images, 5 % of them broken, cold",
        f"python benchmarks/broken.py ROOT --crop {options.crop}",
        "\n\n".join([
            table(["run", "seconds", "rows/s", "against none broken"], runs),
            table(["broken", "reason", "images", "rows", "wrong rows"], by_kind(pairs, wrong)),
            said,
        ]),
        record=options.record,
    )  # fmt: skip
    return int(wrong.any())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--crop", choices=("center", "detect"), default="center")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    sys.exit(main(parser.parse_args()))
