"""A stand-in for the embedder, and jobs for it: a fixed time an image, every image counted."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from batchverify.cache.segment import Entry
from batchverify.embedding.embedder import Embedded
from batchverify.engine.base import WorkPlan
from batchverify.options import ScoreOptions
from batchverify.runtime.compute_path import ComputePath
from batchverify.scoring.job import Job

# A bitmap of 8 x 8 pixels without its pixels: header, then one of 40 bytes.
SIDE = 8
HEADER = (
    b"BM" + (54 + 3 * SIDE * SIDE).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    + (40).to_bytes(4, "little") + SIDE.to_bytes(4, "little") * 2 + (1).to_bytes(2, "little")
    + (24).to_bytes(2, "little") + bytes(24)
)  # fmt: skip
FOLDER_IMAGES = 10_000
ENTRIES = 8_192


class StandIn:
    """Sleeps `seconds` an image; adds a line `process count` to `log` for each batch."""

    compute_path = ComputePath("stand-in")

    def __init__(self, log: Path, seconds: float) -> None:
        self._log, self._seconds = log, seconds
        self._vectors = unit_vectors(4096)

    def start_seconds(self) -> dict[str, float]:
        """Nothing to build."""
        return {}

    def find_faces(self, pictures: Sequence[np.ndarray]) -> list:
        """Never asked with pictures: its plans cut no faces."""
        return [None] * len(pictures)

    def embed_faces(self, faces: Sequence) -> Embedded:
        """One unit vector a face, of 4,096, by the face's pixels."""
        count = len(faces)
        time.sleep(self._seconds * count)
        with self._log.open("a") as file:
            file.write(f"{os.getpid()} {count}\n")
        chosen = [crc32(face.pixels.tobytes()) % len(self._vectors) for face in faces]
        boxes = np.array([face.box for face in faces], np.float32)
        nothing = np.ones(count, np.float32)
        return Embedded(self._vectors[chosen], boxes, nothing, np.ones(count, np.int16), [None] * count)


@dataclass(frozen=True)
class StandInPlan(WorkPlan):
    """A work plan whose workers build the stand-in."""

    log: str = ""
    seconds: float = 0.0

    def embedder(self, workers: int = 1, threads: int | None = None) -> StandIn:
        """Counts in `log`."""
        return StandIn(Path(self.log), self.seconds)


@dataclass(frozen=True)
class StandInJob(Job):
    """A job like any other, but for the embedder."""

    log: str = ""
    seconds: float = 0.0

    @classmethod
    def of(cls, manifest: Path, options: ScoreOptions, log: Path, seconds: float) -> StandInJob:
        """Open a manifest; the vectors are called those of the shipped backbone, for its head's sake."""
        job = Job.open(str(manifest), options)
        return cls(**{each.name: getattr(job, each.name) for each in fields(job)}, log=str(log), seconds=seconds)

    def plan(self, earlier: Sequence[ComputePath] = ()) -> StandInPlan:
        """See `Job`."""
        plan = vars(super().plan(earlier))
        return StandInPlan(**plan, log=self.log, seconds=self.seconds)


def counted(log: Path) -> dict[str, int]:
    """How many images each process embedded."""
    counts: dict[str, int] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        process, count = line.split()
        counts[process] = counts.get(process, 0) + int(count)
    return counts


def unit_vectors(count: int, seed: int = 0) -> np.ndarray:
    """(N, 512) float32 unit rows."""
    vectors = np.random.default_rng(seed).standard_normal((count, 512), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def image_bytes(number: int) -> bytes:
    """A small bitmap, another one for each number."""
    return HEADER + number.to_bytes(8, "little") + bytes(3 * SIDE * SIDE - 8)


def image_name(number: int) -> str:
    """Where below the images' folder a picture lies."""
    return f"{number // FOLDER_IMAGES:04d}/{number:09d}.bmp"


def make_images(folder: Path, count: int) -> None:
    """Write the first `count` pictures that are not there yet."""
    for first in range(0, count, FOLDER_IMAGES):
        wanted = range(first, min(first + FOLDER_IMAGES, count))
        below = (folder / image_name(first)).parent
        below.mkdir(parents=True, exist_ok=True)
        there = {each.name for each in below.iterdir()}
        for number in wanted if len(there) < len(wanted) else ():
            (folder / image_name(number)).write_bytes(image_bytes(number))


def make_manifest(path: Path, pairs: int, images: int) -> None:
    """A CSV of random pairs over all images, with a number, a pair_id and a text to be carried along."""
    names = pa.array([image_name(number) for number in range(images)])
    generator = np.random.default_rng(pairs)
    step, writer = 1_000_000, None
    for first in range(0, pairs, step):
        rows = np.arange(first, min(first + step, pairs))
        a, b = generator.integers(0, images, (2, len(rows)))
        table = pa.table(
            {
                "image_a": names.take(pa.array(a)),
                "image_b": names.take(pa.array(b)),
                "pair_id": rows,
                "weight": generator.integers(0, 1000, len(rows)) / 1000,
                "source": pa.array(["camera", "archive", "upload"]).take(pa.array(rows % 3)),
            }
        )
        writer = writer or pacsv.CSVWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def fill_cache(manifest: Path, options: ScoreOptions) -> None:
    """Put a vector of each of the manifest's pictures into the cache, in the order in which a run would."""
    job = Job.open(str(manifest), options)
    cache = job.open_cache()
    if cache is None:
        raise ValueError("the options name no cache")
    if len(cache.index.keys):
        return
    cache.compute_path = str(StandIn.compute_path)
    numbers = [int(Path(str(each)).stem) for each in job.scan.images]
    for start in range(0, len(numbers), ENTRIES):
        cache.append(_entries(numbers[start : start + ENTRIES]))
    cache.commit()


def _entries(numbers: Sequence[int]) -> list[Entry]:
    vectors = unit_vectors(len(numbers), numbers[0]).astype(np.float16)
    keys = [sha256(image_bytes(number)).digest() for number in numbers]
    return [Entry(key, vector, (0.0, 0.0, 8.0, 8.0), 1.0, 1) for key, vector in zip(keys, vectors, strict=True)]


def options_for(cache: Path, root: Path, **changes: Any) -> ScoreOptions:
    """The options of all runs here: whole pictures, their own cache."""
    return replace(ScoreOptions(crop="none", cache=str(cache), image_root=str(root), quiet=True), **changes)
