"""Fine-tuned against frozen: `python benchmarks/finetune.py --lfw FOLDER --fiw FIW.parquet [--record] [-- OPTIONS]`.

FOLDER holds LFW's View 1 as `batchverify prepare lfw` writes it. The backbone learns from people of FIW's train
split, its epoch is chosen on other families of that split, and it is measured on pairs of the val split, whose
families are disjoint, and on View 1 test. OPTIONS are those of `batchverify finetune`. Both backbones get a head in
the same way, fitted to View 1 train and not centred: on dev, centring takes off half of what the cosine has won.
Nothing is chosen by the two test sets.
"""

import csv
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
from backbones import FARS, Pairs, copied, evaluated, file_option, fitted_head, score, wanted
from number_types import fiw_pairs
from results import publish, table
from score import run

# Of the families of the train split, one in so many is for dev.
DEV_FAMILIES = 7
DEV_PAIRS = 2000
COLUMNS = ["image_a", "image_b", "label", "person_a", "person_b"]
HEADER = ["pairs", "backbone", "AUC", "F1", *(f"TAR at FAR {far:g}" for far in FARS)]


class Faces:
    """FIW's images as files below a folder. names, people, families, splits: (N,) texts."""

    def __init__(self, source: Path, folder: Path) -> None:
        columns = pq.read_table(source)
        self.people = np.array(columns["identity"].to_pylist())
        self.families = np.array([person.split("/")[0] for person in self.people])
        self.splits = np.array(columns["split"].to_pylist())
        self.folder, names = folder, []
        for number, (person, data) in enumerate(zip(self.people, columns["image"].to_pylist(), strict=True)):
            path = folder / person / f"{number:05}.webp"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            names.append(str(path))
        self.names = np.array(names)

    def write(self, name: str, a: np.ndarray, b: np.ndarray) -> Pairs:
        """A manifest of pairs, given by (P,) indices."""
        target = self.folder / name
        with target.open("w", newline="", encoding="utf8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for one, other in zip(a.tolist(), b.tolist(), strict=True):
                people = self.people[[one, other]]
                label = int(people[0] != people[1])
                writer.writerow([self.names[one], self.names[other], label, *people])
        return Pairs(target, self.folder)

    def training_pairs(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(a, b): every image of people with several, with the next of its person and with a stranger."""
        groups = [rows[self.people[rows] == person] for person in np.unique(self.people[rows])]
        groups = [group for group in groups if len(group) > 1]
        a = np.concatenate(groups)
        same = np.concatenate([np.roll(group, 1) for group in groups])
        strangers = rng.permutation(a)
        apart = self.people[a] != self.people[strangers]
        return np.concatenate([a, a[apart]]), np.concatenate([same, strangers[apart]])


def manifests(faces: Faces) -> dict[str, Pairs]:
    """train, dev and val."""
    rng, train = np.random.default_rng(0), faces.splits == "train"
    held_out = np.isin(faces.families, np.unique(faces.families[train])[::DEV_FAMILIES])
    learnt, dev, val = (np.flatnonzero(each) for each in (train & ~held_out, train & held_out, ~train))
    first, second = faces.training_pairs(dev, rng)
    kept = rng.permutation(len(first))[: 2 * DEV_PAIRS]
    a, b, _ = fiw_pairs(faces.people[val])
    return {
        "train": faces.write("train.csv", *faces.training_pairs(learnt, rng)),
        "dev": faces.write("dev.csv", first[kept], second[kept]),
        "val": faces.write("val.csv", val[a], val[b]),
    }


def measured(backbone: str, sets: dict[str, Pairs], folder: Path) -> dict[str, dict[str, Any]]:
    """The figures of a backbone on both test sets."""
    folder.mkdir()
    options = ["--backbone", backbone, "--cache", str(folder / "cache")]
    options += fitted_head(sets["lfw train"], sets["lfw dev"], folder / "head.safetensors", *options, "--not-centred")
    found = {}
    for name in ("val", "lfw test"):
        output = folder / f"{name.replace(' ', '-')}.parquet"
        wanted(score(sets[name], output, *options))
        found[name] = evaluated(output)
    return found


@click.command(context_settings={"ignore_unknown_options": True})
@file_option("--lfw", "Folder with train.csv, dev.csv and test.csv of View 1.")
@file_option("--fiw", "FIW's faces: columns image, identity and split.")
@click.option("--backbone", default="vggface2", show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), help="Folder that keeps the new backbone and the manifests.")
@click.option("--record", is_flag=True, help="Put the table into RESULTS.md.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(lfw: Path, fiw: Path, backbone: str, keep: Path | None, record: bool, options: tuple[str, ...]) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        sets = manifests(Faces(fiw, folder / "fiw"))
        for part in ("train", "dev", "test"):
            sets[f"lfw {part}"] = copied(lfw / f"{part}.csv", folder / f"lfw-{part}.csv", None)
        tuned = folder / "tuned.safetensors"
        files = [str(sets["train"].path), "--dev", str(sets["dev"].path), "-o", str(tuned)]
        started = time.monotonic()
        cli = ("-m", "batchverify.cli", "finetune", *files, "--backbone", backbone)
        done = run(*cli, "--image-root", str(folder / "fiw"), *options)
        minutes = (time.monotonic() - started) / 60
        print(f"{minutes:.1f} minutes", file=sys.stderr)
        figures = {
            name: measured(weights, sets, Path(temporary) / name)
            for name, weights in (("frozen", backbone), ("fine-tuned", str(tuned)))
        }
    rows = [
        [
            {"val": "FIW val", "lfw test": "LFW View 1 test"}[pairs],
            f"{backbone}, {name}",
            f"{found[pairs]['auc']:.5f}",
            f"{found[pairs]['f1']:.4f}",
            *(f"{tar:.4f}" for tar in found[pairs]["tar"]),
        ]
        for pairs in ("val", "lfw test")
        for name, found in figures.items()
    ]
    note = f"Fine-tuning took {minutes:.1f} minutes and {done.megabytes:,.0f} MB."
    call = f"python benchmarks/finetune.py --lfw FOLDER --fiw FIW.parquet --backbone {backbone}"
    call += f" -- {shlex.join(options)}" if options else ""
    publish("Fine-tuned backbones", call, f"{table(HEADER, rows)}\n\n{note}", record=record)


if __name__ == "__main__":
    main()
