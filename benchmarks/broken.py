"""Pairs of which one image in twenty is broken, beside the same pairs with none: `python benchmarks/broken.py ROOT`.

ROOT: LFW's folder. Cold runs of `score` from process start to exit, in turn; the images' files were read before.
Every row must state the reason that its images have, and every other row must be that of the run with none broken.
Exits with code 1 if one does not.
"""

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from broken_images import Kind, kinds
from results import publish, table

SHARE = 0.05
RUNS = ["images", "seconds", "rows/s", "rate / that of whole", "CPU seconds", "those of whole / it"]


@dataclass
class Pairs:
    """Rows of pairs over numbered images, whole or with broken ones in their places.

    cells: of the manifest, by image. pairs: (N, 2) numbers. kind: of the images that are broken.
    """

    folder: Path
    cells: list[str]
    pairs: np.ndarray
    kind: dict[int, Kind]

    def write(self, name: str, cells: list[str]) -> None:
        """Write a manifest."""
        with (self.folder / name).open("w", newline="", encoding="utf8") as file:
            writer = csv.writer(file)
            writer.writerow(("image_a", "image_b"))
            writer.writerows((cells[a], cells[b]) for a, b in self.pairs.tolist())


def prepare(folder: Path, options: argparse.Namespace) -> Pairs:
    """The pairs, with manifests without and with broken images, among which each kind is equally often."""
    dice = random.Random(options.seed)
    images = folder / "images"
    images.mkdir()
    found = sorted(options.root.rglob("*.jpg"))[: options.images]
    for number, path in enumerate(found):
        (images / f"{number}.jpg").write_bytes(path.read_bytes())
    cells = [f"{number}.jpg" for number in range(len(found))]
    known = kinds(options.crop)
    chosen = dice.sample(range(len(found)), round(SHARE * len(found)))
    kind = {number: known[place % len(known)] for place, number in enumerate(chosen)}
    numbers = np.random.default_rng(options.seed).integers(0, len(found), (options.pairs, 2))
    pairs = Pairs(folder, cells, numbers, kind)
    pairs.write("whole.csv", cells)
    broken = list(cells)
    for number, each in kind.items():
        broken[number] = each.make(images / f"broken-{number}.jpg", found[number].read_bytes())
    pairs.write("broken.csv", broken)
    return pairs


class Took(NamedTuple):
    """A process from start to exit: seconds, and those of all its CPUs together."""

    seconds: float
    cpu: float


def score(manifest: Path, crop: str, number: int) -> tuple[Took, pa.Table]:
    """A cold run, and its rows."""
    output = manifest.with_name(f"{manifest.stem}-{number}.parquet")
    where = ["-o", str(output), "--cache", str(output.with_suffix(".cache"))]
    options = ["--image-root", str(manifest.parent / "images"), "--crop", crop, "-q"]
    # With `-m` the working folder comes before PYTHONPATH.
    package = Path(__file__).parent.parent
    started = time.perf_counter()
    command = [sys.executable, "-m", "batchverify.cli", "score", str(manifest), *where, *options]
    process = subprocess.Popen(command, cwd=package)
    _, status, used = os.wait4(process.pid, 0)
    took = Took(time.perf_counter() - started, used.ru_utime + used.ru_stime)
    if status:
        sys.exit(f"{manifest.stem}: failed with {os.waitstatus_to_exitcode(status)}")
    print(f"{time.strftime('%H:%M:%S')} {manifest.stem} {took}", flush=True)
    return took, pq.read_table(output)


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


def measure(pairs: Pairs, options: argparse.Namespace) -> tuple[dict[str, list[Took]], np.ndarray]:
    """Runs of both manifests in turn, by their names, and which rows are wrong in any of them: (N,)."""
    took: dict[str, list[Took]] = {"whole": [], "broken": []}
    wrong = np.zeros(len(pairs.pairs), bool)
    for number in range(options.rounds):
        rows = {}
        for name in sorted(took, reverse=number % 2 == 0):
            each, rows[name] = score(pairs.folder / f"{name}.csv", options.crop, number)
            took[name].append(each)
        if any(len(each) != len(pairs.pairs) for each in rows.values()):
            sys.exit("rows are missing")
        wrong |= wrong_rows(pairs, rows["broken"], rows["whole"])
    return took, wrong


def by_run(took: dict[str, list[Took]], pairs: int) -> list[list[str]]:
    """A row of the table for each manifest."""
    lines, first = [], took["whole"]
    for name, runs in took.items():
        each = [", ".join(f"{value:.1f}" for value in values) for values in zip(*runs, strict=True)]
        rate = pairs * len(runs) / sum(run.seconds for run in runs)
        ratios = [
            sum(getattr(run, unit) for run in first) / sum(getattr(run, unit) for run in runs)
            for unit in Took._fields
        ]
        lines.append([name, each[0], f"{rate:,.0f}", f"{ratios[0]:.3f}", each[1], f"{ratios[1]:.3f}"])
    return lines


def main(options: argparse.Namespace) -> int:
    """Print the tables; with `--record`, keep them."""
    with tempfile.TemporaryDirectory() as name:
        pairs = prepare(Path(name), options)
        took, wrong = measure(pairs, options)
    images = f" --images {options.images}" if options.images else ""
    count = len(pairs.kind)
    said = f"{wrong.sum():,} of {options.pairs:,} rows wrong (reason, score or status); {count} images broken"
    publish(
        f"Broken images, {options.pairs:,} pairs of {len(pairs.cells):,} images, 5 % of them broken, cold",
        f"python benchmarks/broken.py ROOT --crop {options.crop}{images}",
        "\n\n".join([
            table(RUNS, by_run(took, options.pairs)),
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
    parser.add_argument("--images", type=int, help="use so many of the images alone")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--crop", choices=("center", "detect"), default="center")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    sys.exit(main(parser.parse_args()))
