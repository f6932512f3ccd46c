"""Labelled pairs of the drawn faces, in manifests with absolute paths, and `train` as the command line runs it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pandas as pd
from click.testing import CliRunner, Result
from repository import REPOSITORY

from batchverify.cli.app import main

FACES = REPOSITORY / "sample_manifests" / "faces"
TRAIN = ("ada", "bola", "chen", "dan", "esra")
DEV = ("fay", "gus", "hari")


def pairs_of(*people: str) -> pd.DataFrame:
    """All pairs of these people's images, three each."""
    images = [(person, str(FACES / f"{person}_{number}.jpg")) for person in people for number in (1, 2, 3)]
    rows = [(a, b, int(p != q), p, q) for (p, a), (q, b) in itertools.combinations(images, 2)]
    return pd.DataFrame(rows, columns=["image_a", "image_b", "label", "person_a", "person_b"])


class Bench:
    """A folder with train.csv and dev.csv, to be changed at will, and a cache shared by whoever wants it."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.head = folder / "head.safetensors"
        self.write("train.csv", pairs_of(*TRAIN))
        self.write("dev.csv", pairs_of(*DEV))

    def write(self, name: str, table: pd.DataFrame) -> Path:
        """Write a manifest."""
        table.to_csv(self.folder / name, index=False)
        return self.folder / name

    def train(self, *options: str, output: str | Path | None = None, dev: str = "dev.csv") -> Result:
        """`batchverify train` with more options."""
        arguments = [str(self.folder / "train.csv"), "--dev", str(self.folder / dev)]
        return self.run("train", *arguments, "-o", str(output or self.head), *options)

    def run(self, command: str, *arguments: str) -> Result:
        """Any command with the cache."""
        return CliRunner().invoke(main, [command, *arguments, "--cache", str(self.cache)])

    def refused(self, *options: str, **others: Any) -> str:
        """The one line of a training that ends with 2 and writes no head."""
        result = self.train(*options, **others)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert not self.head.exists()
        return result.stderr
