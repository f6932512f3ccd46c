"""`score` and `embed`: from a manifest to result rows, in memory or in an output."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from batchverify.engine.embedding_table import EmbeddingTable
from batchverify.engine.fused_table import FusedTable
from batchverify.engine.scheduler import score_pairs
from batchverify.errors import NothingScoredError, UsageError
from batchverify.manifest.columns import BACKBONES
from batchverify.manifest.manifest import Block
from batchverify.manifest.tables import would_find
from batchverify.options import EmbedOptions, ScoreOptions
from batchverify.records import Reason
from batchverify.runtime.compute_path import (
    ComputePath,
    members_from_text,
    members_to_text,
    paths_from_text,
    paths_to_text,
)
from batchverify.scoring.base_rate import Prior, shifted_for
from batchverify.scoring.embedding_run import Table, embedded, fused_summary, table_of
from batchverify.scoring.job import Job, head_of
from batchverify.scoring.job_folder import JobState
from batchverify.scoring.output import Output, PartRecord, Parts, PartWriter, RowCounts
from batchverify.scoring.parquet import (
    RECORD_KEY,
    check_columns,
    output_schema,
    record_text,
    result_table,
    writing,
)
from batchverify.scoring.summary import EmbedSummary, ScoreSummary
from batchverify.storage.background import BackgroundWorker
from batchverify.storage.location import Location

if TYPE_CHECKING:
    from batchverify.heads.fused_head import FusedHead
    from batchverify.heads.head import Head
    from batchverify.heads.review_band import ReviewBand


def score(
    manifest: Any, output: str | Path | None = None, options: ScoreOptions | None = None, **changes: Any
) -> ScoreSummary:
    """Score every pair of a manifest: a path, glob, folder, URI, DataFrame or pyarrow Table.

    output: a `.parquet` file, a folder, or None to keep the rows in memory. Give options as a `ScoreOptions`, as
    keyword arguments of its fields, or both. Every row comes back, in order. The same call resumes a run that was
    killed, and returns at once if the output is finished.

    Raises `ManifestError`, `ArtifactError` and `UsageError` for bad input before anything is embedded, and
    `NothingScoredError` after writing if no row, or too few rows, could be scored.
    """
    options = replace(options or ScoreOptions(), **changes)
    return score_job(Job.open(manifest, options), options, output, source=manifest)


def score_job(
    job: Job, options: ScoreOptions, output: str | Path | None = None, *, source: Any = None
) -> ScoreSummary:
    """Score the pairs of an open job. Returns and raises what `score` does.

    source: the manifest as the caller gave it. An output that the next run would read as a part of it is refused.
    """
    head = head_of(options.head, [member.fingerprint for member in job.members])
    judge = Judge.of(head, options)
    document = job.document(head.digest, judge.threshold, judge.band)
    document |= judge.prior.document() if judge.prior else {}
    if output is None:
        summary = _score_in_memory(job, judge, document)
    else:
        names = [Location.parse(name) for name in job.manifest.names]
        target = Output(output, names, part_rows=options.part_rows)
        _spare_source(source, target)
        finished = _finished(job, options, target, document)
        summary = finished or _score_to(job, options, judge, document, target)
        summary = replace(summary, output=os.fspath(output))
    check_failed(summary.failed_rows, summary.rows, options.max_failed, summary)
    return summary


def _spare_source(source: Any, output: Output) -> None:
    """Refuse an output that the next run of the same command would read as a part of its manifest."""
    written = output.target if output.single else output.target.join("part-00000.parquet")
    if isinstance(source, str | os.PathLike) and would_find(os.fspath(source), written):
        raise UsageError(
            f"{output.target}: the next run would read the output as a part of the manifest {source}; give another "
            "folder with -o"
        )


@dataclass(frozen=True)
class Judge:
    """What gives scores and verdicts. band: of three verdicts, with `--review`. prior: shifts the probabilities."""

    head: Head | FusedHead
    threshold: float
    band: ReviewBand | None = None
    prior: Prior | None = None

    @classmethod
    def of(cls, head: Head | FusedHead, options: ScoreOptions) -> Judge:
        """The head with the thresholds that the options choose. Raises `UsageError` for those that it lacks."""
        threshold = head.threshold(options.threshold, options.at_far, options.confidence)
        band = head.review(*options.review) if options.review is not None else None
        return cls(head, threshold, band, Prior.of(head, options))

    def schema(self, job: Job) -> pa.Schema:
        """The columns of the output."""
        details, review = job.options.details, self.band is not None
        return output_schema(job.scan.carried, fused=bool(job.fused), details=details, review=review)


def _score_in_memory(job: Job, judge: Judge, document: Mapping[str, Any]) -> ScoreSummary:
    rows = MemoryRows(judge.schema(job))
    summary = score_rows(job, judge, rows)
    return replace(summary, _table=rows.table(job.record(document, summary.to_json())))


def _finished(
    job: Job, options: ScoreOptions, output: Output, document: Mapping[str, Any]
) -> ScoreSummary | None:
    """The summary if the output is finished already; None if there is work to do."""
    record = output.finished(document, overwrite=options.overwrite)
    if record is None or (options.retry_failed and record["failed_rows"]):
        return None
    output.forget_leftovers(document)
    return ScoreSummary.of_record(record, time.monotonic() - job.started)


def _score_to(
    job: Job,
    options: ScoreOptions,
    judge: Judge,
    document: Mapping[str, Any],
    output: Output,
) -> ScoreSummary:
    # The manifest is read before anything is written, so that a bad one leaves no job folder.
    schema, total = judge.schema(job), job.scan.rows
    check_columns(job.manifest.names[0], job.scan.carried, partial(job.manifest.blocks, job.scan))
    claim = output.claimed(document, total, overwrite=options.overwrite, retry_failed=options.retry_failed)
    with claim as (parts, state):
        rows = PartRows(output, parts, state, schema, total)
        try:
            summary = score_rows(job, judge, rows)
        finally:
            rows.abandon()
        record = {
            **job.record(document, summary.to_json()),
            "token": parts.token,
            "part_rows": parts.size,
            "output": str(output.target),
        }
        output.publish(parts, record, total)
    return summary


def embed(manifest: Any, options: EmbedOptions | None = None, **changes: Any) -> EmbedSummary:
    """Embed every unique image of a manifest into the cache. Raises what `score` raises."""
    options = replace(options or EmbedOptions(), **changes)
    if options.no_cache:
        raise UsageError("embed fills the cache, so --no-cache leaves it nothing to do")
    job = Job.open(manifest, options)
    runs = [embed_job(member) for member in job.members]
    summaries, tables = zip(*runs, strict=True)
    summary = fused_summary(job, summaries) if job.fused else summaries[0]
    check_failed(FusedTable(tables).failed(), summary.unique_images, options.max_failed, summary)
    return summary


def embed_job(job: Job) -> tuple[EmbedSummary, EmbeddingTable]:
    """The embeddings of a manifest's unique images, cached or new, by a job of one backbone."""
    table = EmbeddingTable(len(job.scan.images), dimension=job.fingerprint.dimension)
    with embedded(job, table) as run:
        return run.summary(), table


def check_failed(failed: int, total: int, most: float, summary: EmbedSummary) -> None:
    """Raise `NothingScoredError` with the summary if all of `total`, or a share above `most`, failed."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary.failures.items())
    if total and failed == total:
        missing = {Reason.NOT_FOUND.value, Reason.FORBIDDEN.value} & summary.failures.keys()
        hint = "; is --image-root right?" if missing else ""
        message = f"nothing could be scored: all {total:,} failed ({reasons}){hint}"
        raise NothingScoredError(message, summary)
    if total and failed / total > most:
        message = f"{failed:,} of {total:,} failed, more than --max-failed {most:g} allows ({reasons})"
        raise NothingScoredError(message, summary)


class Rows(Protocol):
    """Takes the result rows of a run."""

    # Rows that an earlier run finished.
    resumed: int
    # A local folder for large temporary files; None for the system's.
    scratch: str | None
    # The output's path or URI; None in memory.
    target: str | None

    def missing(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The rows that have to be scored."""

    def write(self, first: int, table: pa.Table) -> None:
        """Take rows. first: the index of the first one in the whole manifest."""

    def wanted(self, job: Job, embeddings: Table) -> np.ndarray | None:
        """Indices of the images of missing rows, None for all. Reasons in finished rows go to `embeddings`."""

    def earlier_paths(self, member: int = 0) -> list[ComputePath]:
        """The compute paths of an interrupted run's vectors. member: which of several backbones made them."""

    def record_paths(self, paths: set[ComputePath], member: int = 0) -> None:
        """Record the compute paths of new vectors; `UsageError` if the job has vectors of another path."""

    def kept_prior(self) -> dict[str, Any] | None:
        """The record of the share of same pairs that an earlier run of this job estimated."""

    def keep_prior(self, prior: dict[str, Any]) -> None:
        """Keep an estimate for the parts to come and for resumed runs."""

    def counts(self) -> RowCounts:
        """Counts of the whole output."""


@dataclass
class MemoryRows:
    """Keeps the rows in memory, for the Python API without an output."""

    schema: pa.Schema
    resumed: int = 0
    scratch: str | None = None
    target: str | None = None
    _tables: list[pa.Table] = field(default_factory=list)

    def missing(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """See `Rows`."""
        return iter(blocks)

    def write(self, first: int, table: pa.Table) -> None:
        """See `Rows`."""
        self._tables.append(table)

    def wanted(self, job: Job, embeddings: Table) -> np.ndarray | None:
        """See `Rows`."""
        return None

    def earlier_paths(self, member: int = 0) -> list[ComputePath]:
        """See `Rows`."""
        return []

    def record_paths(self, paths: set[ComputePath], member: int = 0) -> None:
        """See `Rows`. Not needed: the run cannot be resumed."""

    def kept_prior(self) -> dict[str, Any] | None:
        """See `Rows`."""
        return None

    def keep_prior(self, prior: dict[str, Any]) -> None:
        """See `Rows`. Not needed: the run cannot be resumed."""

    def counts(self) -> RowCounts:
        """See `Rows`."""
        return RowCounts.total([PartRecord.of(table, "", 0) for table in self._tables])

    def table(self, record: dict[str, Any]) -> pa.Table:
        """All rows, with the run record in the metadata."""
        schema = self.schema.with_metadata({RECORD_KEY: record_text(record)})
        # No cast, which unions do not have.
        return pa.concat_tables(self._tables).replace_schema_metadata(schema.metadata)


class PartRows:
    """Publishes rows as parts of an output. total: rows of the whole output."""

    def __init__(self, output: Output, parts: Parts, state: JobState, schema: pa.Schema, total: int) -> None:
        self._folder = output.folder
        self._parts, self._state = parts, state
        # The backbones that have made vectors in this run.
        self._has_new_vectors: set[int] = set()
        self.resumed = RowCounts.total(parts.done.values()).rows
        self.scratch = self._folder.location.path if self._folder.location.is_local else None
        self.target: str | None = str(output.target)
        self._writer = PartWriter(parts, schema, total, output.begin_part)

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
        """See `Rows`."""
        self._writer.write(first, table)

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
        """Remove the unfinished part."""
        self._writer.abandon()


def score_rows(job: Job, judge: Judge, rows: Rows) -> ScoreSummary:
    """Embed the images that are needed and score the rows that are missing."""
    embeddings = table_of(job, rows.scratch)
    wanted = rows.wanted(job, embeddings)
    with embedded(job, embeddings, wanted, rows) as run:
        progress = run.progress
        progress.rows = rows.resumed
        shifted = shifted_for(judge.prior, judge.threshold, judge.band, job, judge.head, embeddings, rows)
        missing = rows.missing(job.manifest.blocks(job.scan))

        def write(block: Block, scores: tuple[np.ndarray, np.ndarray]) -> None:
            with progress.watch.stage("write rows"):
                table = result_table(
                    block, embeddings, shifted(scores), shifted.threshold, job.names, shifted.band
                )
                rows.write(block.first, table)
            progress.rows += len(block.a)

        with BackgroundWorker() as worker:
            for block, scores in score_pairs(run.engine, judge.head, missing, embeddings, progress):
                worker(partial(write, block, scores))
                progress.show()
        images = run.summary()
    counts = rows.counts()
    return ScoreSummary(
        **vars(images),
        scored=counts.scored,
        different=counts.different,
        failed_rows=job.scan.rows - counts.scored,
        resumed_rows=rows.resumed,
        threshold=shifted.threshold,
        head=judge.head.digest,
        review=counts.review(shifted.band) if shifted.band is not None else None,
        prior=shifted.record,
    )
