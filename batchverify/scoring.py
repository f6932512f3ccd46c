"""One run of `score`: the images that missing rows need are embedded, the missing rows scored and published."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from batchverify.engine.base import Engine
from batchverify.engine.gallery import Gallery
from batchverify.engine.scheduler import ImageRun, score_pairs
from batchverify.errors import UsageError
from batchverify.job import PATHS, Job, reason_of, same_path
from batchverify.jobfolder import JobFolder
from batchverify.launch import engine_of
from batchverify.manifest.manifest import Block
from batchverify.output import Output, reasons_of
from batchverify.parts import PartRecord, Parts, PartWriter
from batchverify.process import peak_memory
from batchverify.progress import Progress
from batchverify.results import RECORD_KEY, record_text, result_table
from batchverify.sinks import writing
from batchverify.storage.background import Behind
from batchverify.summary import EmbedSummary


class Rows(Protocol):
    """Where the result rows of a run go."""

    resumed: int
    # A local folder for large temporary files; None for the system's.
    scratch: str | None
    # The output's path or URI; None in memory.
    place: str | None

    def missing(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The rows that are to be scored."""

    def write(self, first: int, table: pa.Table) -> None:
        """Take rows; `first`: the number of the first in the whole manifest."""

    def wanted(self, job: Job, gallery: Gallery) -> np.ndarray | None:
        """The indices of the images to be looked up, None for all; what finished rows tell goes to `gallery`."""

    def keep_path(self, path: str) -> None:
        """Take note of the compute path of fresh vectors; `UsageError` where the job has another."""

    def counts(self) -> dict[str, int]:
        """Rows scored, and labelled different, of the whole output."""


@dataclass
class MemoryRows:
    """Keeps the rows; for the Python API without an output file."""

    schema: pa.Schema
    resumed: int = 0
    scratch: str | None = None
    place: str | None = None
    _tables: list[pa.Table] = field(default_factory=list)

    def missing(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """See `Rows`."""
        return iter(blocks)

    def write(self, first: int, table: pa.Table) -> None:
        """See `Rows`."""
        self._tables.append(table)

    def wanted(self, job: Job, gallery: Gallery) -> np.ndarray | None:
        """See `Rows`."""
        return None

    def keep_path(self, path: str) -> None:
        """See `Rows`: nothing is taken up again."""

    def counts(self) -> dict[str, int]:
        """See `Rows`."""
        records = [PartRecord.of(table, "", 0) for table in self._tables]
        return {name: sum(getattr(each, name) for each in records) for name in ("scored", "different")}

    def table(self, record: dict[str, Any]) -> pa.Table:
        """All rows, the run record in the metadata."""
        schema = self.schema.with_metadata({RECORD_KEY: record_text(record)})
        return pa.concat_tables([self.schema.empty_table(), *self._tables]).cast(schema)


class PartRows:
    """Publishes rows as parts, and knows those that an earlier run published."""

    def __init__(
        self, output: Output, parts: Parts, state: dict[str, Any], schema: pa.Schema, rows: int
    ) -> None:
        self._folder: JobFolder = output.folder
        self._parts, self._state, self._computing = parts, state, False
        self.resumed = sum(each.rows for each in parts.done.values())
        self.scratch = self._folder.location.path if self._folder.location.is_local else None
        self.place: str | None = str(output.target)
        self._writer = PartWriter(parts, schema, rows, output.clear_success)

    @property
    def path(self) -> str:
        """The compute path that the job keeps; empty while no vector was computed."""
        return str(self._state.get("compute_path") or "")

    def missing(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """See `Rows`."""
        return self._parts.missing(blocks)

    def write(self, first: int, table: pa.Table) -> None:
        """See `Rows`."""
        self._writer.write(first, table)

    def wanted(self, job: Job, gallery: Gallery) -> np.ndarray | None:
        """See `Rows`. An image that failed in a finished row has failed in the rows that are missing, too."""
        if not self._parts.done:
            return None
        needed = np.zeros(len(job.scan.images), bool)
        reasons: tuple[pa.ChunkedArray, ...] = ()
        opened = -1
        for number, piece in self._parts.split(job.manifest.blocks(job.scan)):
            if number not in self._parts.done:
                needed[piece.a] = needed[piece.b] = True
                continue
            if number != opened:
                reasons, opened = reasons_of(self._parts.place(number)), number
            start = piece.first - number * self._parts.size
            for indices, column in zip((piece.a, piece.b), reasons, strict=True):
                gallery.restore(indices, column.slice(start, len(indices)))
        return np.flatnonzero(needed & (gallery.codes < 0))

    def keep_path(self, path: str) -> None:
        """See `Rows`."""
        if not path:
            return
        kept = self.path.split(PATHS) if self.path else []
        new = [each for each in path.split(PATHS) if not any(same_path(each, other) for other in kept)]
        if new and kept and not self._computing:
            raise UsageError(
                f"{self._folder.output}: this job's vectors were computed on '{self.path}', here they would be "
                f"on '{path}': go on where that is possible, or --overwrite starts anew"
            )
        # Later ones are of other nodes of the cluster that the job has now.
        self._computing = True
        if new:
            self._state["compute_path"] = PATHS.join(sorted({*kept, *new}))
            with writing(self._folder.location):
                self._folder.keep(self._state)

    def counts(self) -> dict[str, int]:
        """See `Rows`."""
        records = self._parts.done.values()
        return {name: sum(getattr(each, name) for each in records) for name in ("scored", "different")}

    def abandon(self) -> None:
        """Remove the part in the making."""
        self._writer.abandon()


def score_rows(job: Job, head: Any, threshold: float, rows: Rows, path: str = "") -> dict[str, Any]:
    """Embed what is needed and score what is missing; returns the fields of the summary."""
    progress = Progress(total_rows=job.scan.rows, quiet=job.options.quiet)
    gallery = Gallery(len(job.scan.images), rows.scratch)
    wanted = rows.wanted(job, gallery)
    with engine_of(job, progress, wanted, path) as (engine, cache):
        references = job.scan.images
        engine.require_shared(rows.place, references)
        ImageRun(engine, references, cache, progress, gallery, wanted, rows.keep_path).run()
        progress.rows = rows.resumed
        missing = rows.missing(job.manifest.blocks(job.scan))

        def write(block: Block, scores: tuple[np.ndarray, np.ndarray]) -> None:
            with progress.watch.stage("write rows"):
                rows.write(block.first, result_table(block, gallery, scores, threshold))
            progress.rows += len(block.a)

        with Behind() as behind:
            for block, scores in score_pairs(engine, head, missing, gallery, progress):
                behind(partial(write, block, scores))
                progress.show()
        done = run_counts(job, engine, gallery, progress)
    counts = rows.counts()
    return {
        **done,
        "compute_path": done["compute_path"] or path,
        **counts,
        "failed_rows": job.scan.rows - counts["scored"],
        "resumed_rows": rows.resumed,
        "threshold": threshold,
        "head": head.digest,
    }


def run_counts(job: Job, engine: Engine, gallery: Gallery, progress: Progress) -> dict[str, Any]:
    """The fields of `EmbedSummary`."""
    failures = gallery.failures()
    counts = EmbedSummary.counts(progress, engine.workers.count)
    failed, unique = sum(failures.values()), len(gallery.codes)
    done = counts["embedded"] + counts["cached"] + counts["repeated"]
    return {
        **counts,
        "rows": job.scan.rows,
        "unique_images": unique,
        "failed": failed,
        "resumed": unique - failed - done,
        "failures": failures,
        "seconds": round(time.monotonic() - job.started, 2),
        "engine": engine.name,
        "peak_memory_mb": _peaks(engine, progress),
        "compute_path": engine.compute_path(),
        "compute_reason": reason_of(engine.compute_path()),
        "cache": job.options.cache_root,
    }


def _peaks(engine: Engine, progress: Progress) -> dict[str, float]:
    """The most memory of the driver and of its hungriest worker; threads are the driver's own."""
    peaks = {"driver": round(peak_memory(), 1)}
    if engine.name != "local":
        peaks["workers"] = round(progress.worker_memory, 1)
    return peaks
