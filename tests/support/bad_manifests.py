"""What tests of badly damaged manifests share: how many are tried, how they are read, what damages them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, settings

from batchverify.errors import UsageError
from batchverify.manifest.manifest import Manifest
from batchverify.manifest.paths import ImageRoot
from batchverify.records import Skipped
from batchverify.storage.location import Location

FACTOR = int(os.environ.get("BATCHVERIFY_FUZZ", "1"))
# What cells of the column `label` mean.
LABELS = {"0": 0, "1": 1, "": None, " 1": 1, "TRUE": 1, "f": 0, "NA": None, "0.0": 0}


def tries(count: int) -> Callable:
    """Settings of a property: the same examples in every run, unless BATCHVERIFY_FUZZ asks for more."""
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


Rows = tuple[list[tuple[str | Skipped, str | Skipped]], pa.Table]


def read(source: Any, name: str) -> Rows | None:
    """The images and columns of every row, or None if the manifest is refused with a message that names it."""
    try:
        manifest = Manifest.open(source)
        scan = manifest.scan()
        blocks = list(manifest.blocks(scan))
    except UsageError as exc:
        assert str(exc).startswith(f"{name}: ") and "\n" not in str(exc), str(exc)  # noqa: PT017
        return None
    pairs = [(scan.images[a], scan.images[b]) for block in blocks for a, b in zip(block.a, block.b, strict=True)]
    return pairs, pa.Table.from_batches([block.carried for block in blocks], scan.carried)


def put(folder: Path, name: str, data: bytes) -> Path:
    """A file with these bytes."""
    path = folder / name
    path.write_bytes(data)
    return path


def resolved(folder: Path, cells: list[str | None]) -> list[str | Skipped]:
    """The images that cells of a manifest in a folder mean."""
    root = ImageRoot(Location.parse(folder))
    return [root.resolve(cell) for cell in cells]


SPICE = (
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xc3",
    b'""',
    b"\r\n\r\n",
    b"x",
    b"sep=,\n",
    b" ",
)


def damaged(data: bytes, chance: random.Random, spice: tuple[bytes, ...] = SPICE) -> bytes:
    """Data with one to three cuts, insertions, deletions, repetitions or flipped bits."""
    for _ in range(chance.randint(1, 3)):
        at, size = chance.randrange(len(data) + 1), chance.randint(1, 4)
        kind = chance.randrange(5)
        if kind == 0:
            data = data[:at] + chance.choice(spice) + data[at:]
        elif kind == 1:
            data = data[:at] + data[at + size :]
        elif kind == 2:
            data = data[:at] + data[at : at + 8 * size] * 2 + data[at + 8 * size :]
        elif kind == 3 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        elif at > len(data) // 2:
            data = data[:at]
    return data
