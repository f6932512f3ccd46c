"""Where the result rows of a run go: into memory, or into the parts of an output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from batchverify.engine.fused_table import Table
from batchverify.errors import BatchverifyError, UsageError
from batchverify.manifest.columns import BACKBONES
from batchverify.manifest.manifest import Block
from batchverify.runtime.compute_path import (
    ComputePath,
    members_from_text,
    members_to_text,
    paths_from_text,
    paths_to_text,
)
from batchverify.scoring.job import Job
from batchverify.scoring.job_folder import JobState
from batchverify.scoring.output import Output, Parts, RowCounts
from batchverify.scoring.parquet import RECORD_KEY, FileSink, record_text, writing


class Rows:
    """Takes the result rows of a run. This one is of a run that nothing went before and that cannot be resumed.

    resumed: rows that an earlier run finished. scratch: a local folder for large temporary files; None for the
    system's. target: the output's path or URI; None in memory.
    """

    resumed: int = 0
    scratch: str | None = None
    target: str | None = None

    def missing(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The rows that have to be scored."""
        return iter(blocks)

    def write(self, first: int, table: pa.Table) -> None:
        """Take rows. first: the index of the first one in the whole manifest."""
        raise NotImplementedError

    def wanted(self, job: Job, embeddings: Table) -> np.ndarray | None:
        """Indices of the images of missing rows, None for all. Reasons in finished rows go to `embeddings`."""
        return None

    def earlier_paths(self, member: int = 0) -> list[ComputePath]:
        """The compute paths of an interrupted run's vectors. member: which of several backbones made them."""
        return []

    def record_paths(self, paths: set[ComputePath], member: int = 0) -> None:
        """Record the compute paths of new vectors; `UsageError` if the job has vectors of another path."""

    def kept_prior(self) -> dict[str, Any] | None:
        """The record of the share of same pairs that an earlier run of this job estimated."""
        return None

    def keep_prior(self, prior: dict[str, Any]) -> None:
        """Keep an estimate for the parts to come and for resumed runs, before the first row is written."""

    def counts(self) -> RowCounts:
        """Counts of the whole output."""
        raise NotImplementedError


class MemoryRows(Rows):
    """Keeps the rows in memory, for the Python API without an output."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema, self._tables = schema, list[pa.Table]()

    def write(self, first: int, table: pa.Table) -> None:
        """See `Rows`."""
        self._tables.append(table)

    def counts(self) -> RowCounts:
        """See `Rows`."""
        return RowCounts.total([RowCounts.of(table) for table in self._tables])

    def table(self, record: dict[str, Any]) -> pa.Table:
        """All rows, with the run record in the metadata."""
        schema = self._schema.with_metadata({RECORD_KEY: record_text(record)})
        # No cast, which unions do not have.
        return pa.concat_tables(self._tables).replace_schema_metadata(schema.metadata)


class PartRows(Rows):
    """Publishes each part of an output once its last row is written. total: rows of the whole output."""

    def __init__(self, output: Output, parts: Parts, state: JobState, schema: pa.Schema, total: int) -> None:
        self._output, self._folder = output, output.folder
        self._parts, self._state, self._schema, self._total = parts, state, schema, total
        # The backbones that have made vectors in this run.
        self._has_new_vectors: set[int] = set()
        self.resumed = RowCounts.total(parts.done.values()).rows
        self.scratch = self._folder.location.path if self._folder.location.is_local else None
        self.target: str | None = str(output.target)
        self._sink: FileSink | None = None
        self._written: list[RowCounts] = []
        # Closing a file while another thread writes to it would crash the process.
        self._busy, self._abandoned = Lock(), False

    def earlier_paths(self, member: int = 0) -> list[ComputePath]:
        """See `Rows`."""
        return paths_from_text(self._path_texts()[member])

    def _path_texts(self) -> list[str]:
        """The texts of the compute paths of each backbone."""
        count = len(self._state["job"].get(BACKBONES, [""]))
        return members_from_text(self._state.get("compute_path") or "", count)

    def missing(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """See `Rows`."""
        return self._parts.missing(blocks)

    def write(self, first: int, table: pa.Table) -> None:
        """See `Rows`. They are of one part, come in order and from one thread."""
        with self._busy:
            if self._abandoned:
                raise BatchverifyError(f"{self._parts.folder}: rows came after the run was abandoned")
            number = first // self._parts.size
            self._sink = self._sink or self._parts.sink(number, self._schema)
            self._sink.write(table)
            self._written.append(RowCounts.of(table))
            if first + table.num_rows == min((number + 1) * self._parts.size, self._total):
                self._publish(number, self._sink)

    def _publish(self, number: int, sink: FileSink) -> None:
        counts = RowCounts.total(self._written)
        self._output.clear_success()
        sink.finish(self._parts.record(number, counts))
        self._parts.done[number] = counts
        self._sink, self._written = None, []

    def wanted(self, job: Job, embeddings: Table) -> np.ndarray | None:
        """See `Rows`. An image that failed in a finished row fails in the missing rows too."""
        if not self._parts.done:
            return None
        needed = np.zeros(len(job.scan.images), bool)
        reasons: tuple[pa.ChunkedArray, ...] = ()
        read = -1
        for number, piece in self._parts.split(job.manifest.blocks(job.scan)):
            if number not in self._parts.done:
                needed[piece.a] = needed[piece.b] = True
                continue
            if number != read:
                reasons, read = self._parts.reasons(number), number
            start = piece.first - number * self._parts.size
            for indices, column in zip((piece.a, piece.b), reasons, strict=True):
                embeddings.restore(indices, column.slice(start, len(indices)))
        return np.flatnonzero(needed)

    def record_paths(self, paths: set[ComputePath], member: int = 0) -> None:
        """See `Rows`."""
        earlier = self.earlier_paths(member)
        new = [path for path in paths if not any(path.same_vectors(other) for other in earlier)]
        if new and earlier and member not in self._has_new_vectors:
            raise UsageError(
                f"{self._folder.output}: this job's vectors were computed on '{paths_to_text(earlier)}', here they "
                f"would be on '{paths_to_text(paths)}': continue on a machine like the first, or start anew with "
                "--overwrite"
            )
        # Paths that come later are those of other nodes of this run's cluster.
        self._has_new_vectors.add(member)
        if new:
            texts = self._path_texts()
            texts[member] = paths_to_text([*earlier, *new])
            self._state["compute_path"] = members_to_text(texts)
            with writing(self._folder.location):
                self._folder.write_state(self._state)

    def kept_prior(self) -> dict[str, Any] | None:
        """See `Rows`."""
        return self._state.get("prior")

    def keep_prior(self, prior: dict[str, Any]) -> None:
        """See `Rows`."""
        self._state["prior"] = prior
        with writing(self._folder.location):
            self._folder.write_state(self._state)

    def counts(self) -> RowCounts:
        """See `Rows`."""
        return RowCounts.total(self._parts.done.values())

    def abandon(self) -> None:
        """Remove the unfinished part and accept no more rows."""
        with self._busy:
            self._abandoned = True
            if self._sink is not None:
                self._sink.abandon()
                self._sink = None
