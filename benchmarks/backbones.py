"""Every backbone and detector: `python benchmarks/backbones.py --lfw FOLDER --fiw MANIFEST [--also WAY] [--record]`.

FOLDER holds LFW's View 1 as `batchverify prepare lfw` writes it, MANIFEST labelled pairs of another set of faces. All
is done by the command line: `score` and `evaluate`, and `train` first where no head is shipped for a backbone and a
detector. `--also BACKBONE[:DETECTOR]` adds a row: an ONNX file with its description beside it, a plug-in, or several
backbones joined by `+`.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
from results import publish, table

from batchverify.embedding.backbone import PACKAGED_FILES, packaged_weights
from batchverify.faces import mtcnn, retinaface_network

WAYS = ("vggface2:mtcnn", "vggface2:retinaface", "compact:retinaface")
DETECTORS = {"mtcnn": mtcnn.weights_path, "retinaface": retinaface_network.weights_path}
FARS = (1e-2, 1e-3)
NO_HEAD = "no head is shipped"
HEADER = [
    "backbone, detector",
    "head",
    "MB of weights",
    "images/s",
    "View 1 test AUC",
    "F1",
    "no face, View 1",
    "FIW val AUC",
    "F1",
    *(f"TAR at FAR {far:g}" for far in FARS),
    "no face, FIW",
]
NOTE = (
    "images/s: from file to vector, of View 1's test images, cold cache. no face: images of those in the pairs. "
    "Heads and thresholds are the shipped ones, or fitted to View 1 train, never to these pairs. Five of View 1 "
    "test's same pairs show two people to every model tried, and to a person: a sharper model loses AUC there while "
    "it gains elsewhere."
)


@dataclass(frozen=True)
class Way:
    """A row of the table. detector: empty for the backbone's own."""

    backbone: str
    detector: str

    @classmethod
    def parse(cls, text: str) -> "Way":
        """`BACKBONE` or `BACKBONE:DETECTOR`."""
        backbone, _, detector = text.rpartition(":")
        return cls(backbone, detector) if detector in DETECTORS else cls(text, "")

    @property
    def options(self) -> list[str]:
        """For the command line."""
        return ["--backbone", self.backbone, *(["--detector", self.detector] if self.detector else [])]

    @property
    def name(self) -> str:
        """For people: of a file without its folder."""
        parts = [Path(part).name for part in self.backbone.split("+")]
        return ", ".join(["+".join(parts), *([self.detector] if self.detector else [])])


@dataclass(frozen=True)
class Pairs:
    """A manifest with absolute paths, and the folder that all of them lie in."""

    path: Path
    root: Path


def copied(manifest: Path, target: Path, most: int | None) -> Pairs:
    """The pairs of a manifest, or some that are spread over it and name at most `most` images."""
    with manifest.open(newline="", encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    step = 1 if most is None else max(1, -(-2 * len(rows) // most))
    rows = rows[::step]
    for row in rows:
        for side in ("image_a", "image_b"):
            row[side] = str((manifest.parent / row[side]).resolve())
    with target.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    root = os.path.commonpath([Path(row[side]).parent for row in rows for side in ("image_a", "image_b")])
    return Pairs(target, Path(root))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line of this checkout, in a process of its own."""
    checkout = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-m", "batchverify.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        check=False,
    )


def wanted(done: subprocess.CompletedProcess[str]) -> Any:
    """What a command printed as JSON; its failure ends the benchmark."""
    if done.returncode:
        sys.exit(f"{' '.join(done.args)} failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


def score(pairs: Pairs, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Score some pairs."""
    where = ["-o", str(output), "--overwrite", "--image-root", str(pairs.root), "--follow-symlinks"]
    return command("score", str(pairs.path), *where, "--json", *options)


def fitted_head(train: Pairs, dev: Pairs, head: Path, *options: str) -> list[str]:
    """The options for a head that is fitted to training pairs."""
    root = os.path.commonpath([train.root, dev.root])
    files = [str(train.path), "--dev", str(dev.path), "-o", str(head)]
    done = command("train", *files, "--image-root", root, "--follow-symlinks", *options)
    if done.returncode:
        sys.exit(f"{' '.join(done.args)} failed: {done.stderr.strip()}")
    return ["--head", str(head)]


def evaluated(scores: Path) -> dict[str, Any]:
    """The figures of `evaluate`, with TAR at each of `FARS`.

    `evaluate` gives none where fewer than ten false accepts are expected, as for 5,000 pairs at 1e-3: counted here.
    """
    folder = scores.with_suffix(".report")
    options = ["-o", str(folder), "--no-images", "--draws", "0", "--json"]
    wanted(command("evaluate", str(scores), *options))
    figures = json.loads((folder / "metrics.json").read_text(encoding="utf8"))["metrics"]
    columns = pq.read_table(scores, columns=["true_label", "probability"]).drop_null()
    labels, probability = (column.to_numpy() for column in columns)
    return {**figures, "tar": [true_accepts(labels, probability, far) for far in FARS]}


def true_accepts(labels: np.ndarray, probability: np.ndarray, far: float) -> float:
    """The share of same pairs (label 0) below the threshold under which at most `far` of the different ones lie."""
    different = np.sort(probability[labels == 1])
    accepted = int(far * len(different))
    return float((probability[labels == 0] < different[accepted]).mean())


def megabytes(way: Way) -> float:
    """The files of a row's weights: its backbones and its detectors; those of backbones that are no files count 0."""
    names = way.backbone.split("+")
    files = [packaged_weights(name) if name in PACKAGED_FILES else Path(name) for name in names]
    own = {"vggface2": "mtcnn"}
    detectors = {way.detector or own.get(name, "retinaface") for name in names}
    files += [DETECTORS[name]() for name in detectors]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def without_face(summary: dict[str, Any]) -> str:
    """Images without a face among those of a run, and their share; of several backbones the number of each."""
    total = summary["unique_images"]
    if backbones := summary.get("backbones"):
        lost = [each["failures"].get("no_face", 0) for each in backbones.values()]
        return f"{' and '.join(map(str, lost))} of {total:,}"
    lost = summary["failures"].get("no_face", 0)
    return f"{lost} of {total:,} ({lost / total:.2%})"


def row(way: Way, sets: dict[str, Pairs], folder: Path, options: list[str]) -> list[str]:
    """Score and evaluate both sets."""
    folder.mkdir()
    options = [*way.options, *options, "--cache", str(folder / "cache")]
    outputs = {name: folder / f"{name}.parquet" for name in ("lfw", "fiw")}
    done, head = score(sets["test"], outputs["lfw"], *options), "shipped"
    if done.returncode and NO_HEAD in done.stderr:
        options += fitted_head(sets["train"], sets["dev"], folder / "head.safetensors", *options)
        done, head = score(sets["test"], outputs["lfw"], *options), "fitted"
    lfw, fiw = wanted(done), wanted(score(sets["fiw"], outputs["fiw"], *options))
    found = {name: evaluated(output) for name, output in outputs.items()}
    row = [way.name, head, f"{megabytes(way):.1f}", f"{lfw['images_per_second']:.1f}"]
    row += [f"{found['lfw']['auc']:.5f}", f"{found['lfw']['f1']:.4f}", without_face(lfw)]
    row += [f"{found['fiw'][name]:.4f}" for name in ("auc", "f1")]
    return row + [f"{tar:.4f}" for tar in found["fiw"]["tar"]] + [without_face(fiw)]


def file_option(name: str, text: str) -> Any:
    """An option for a file or a folder that must be there."""
    return click.option(name, type=click.Path(exists=True, path_type=Path), required=True, help=text)


@click.command()
@file_option("--lfw", "Folder with train.csv, dev.csv and test.csv of View 1.")
@file_option("--fiw", "Manifest of labelled pairs.")
@click.option("--way", "ways", multiple=True, default=WAYS, help="BACKBONE[:DETECTOR]. Default: all packaged.")
@click.option("--also", multiple=True, help="One more, as --way.")
@click.option("--images", type=click.IntRange(min=8), help="At most so many images of each manifest.")
@click.option("--device", default="auto", show_default=True)
@click.option("--record", is_flag=True, help="Put the table into RESULTS.md.")
def main(
    lfw: Path,
    fiw: Path,
    ways: tuple[str, ...],
    also: tuple[str, ...],
    images: int | None,
    device: str,
    record: bool,
) -> None:
    """Print the table."""
    manifests = {"train": lfw / "train.csv", "dev": lfw / "dev.csv", "test": lfw / "test.csv", "fiw": fiw}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        sets = {
            part: copied(path, Path(name) / f"{part}.csv", images)
            for part, path in manifests.items()
            if path.is_file()
        }
        for number, text in enumerate([*ways, *also]):
            rows.append(row(Way.parse(text), sets, Path(name) / str(number), ["--device", device]))
            print(rows[-1], file=sys.stderr, flush=True)
    # Without the ways, which the rows name: a newer table takes the place of the last one.
    call = "python benchmarks/backbones.py --lfw FOLDER --fiw MANIFEST"
    call += f" --images {images}" if images else ""
    call += f" --device {device}" if device != "auto" else ""
    publish("Backbones and detectors", call, f"{table(HEADER, rows)}\n\n{NOTE}", record=record)


if __name__ == "__main__":
    main()
