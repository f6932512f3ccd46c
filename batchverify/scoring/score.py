"""`score` and `embed`: from a manifest to rows in memory or in parts of an output."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from batchverify.engine.base import Engine
from batchverify.engine.embedding_table import EmbeddingTable
from batchverify.engine.scheduler import ImageRun, score_pairs
from batchverify.errors import NothingScoredError, UsageError
from batchverify.manifest.manifest import Block
from batchverify.manifest.tables import would_find
from batchverify.options import EmbedOptions, ScoreOptions
from batchverify.process import peak_memory
from batchverify.progress import Progress
from batchverify.records import Reason
from batchverify.runtime.compute_path import ComputePath, paths_from_text, paths_to_text
from batchverify.scoring.job import Job, engine_of
from batchverify.scoring.job_folder import JobFolder
from batchverify.scoring.output import Output, PartRecord, Parts, PartWriter, reasons_of
from batchverify.scoring.parquet import RECORD_KEY, output_schema, record_text, result_table, writing
from batchverify.scoring.summary import EmbedSummary, ScoreSummary
from batchverify.storage.background import BackgroundWorker
from batchverify.storage.location import Location


def score(
    manifest: Any, output: str | Path | None = None, options: ScoreOptions | None = None, **changes: Any
) -> ScoreSummary:
    """Score every pair of a manifest: a path, glob, folder, URI, DataFrame or pyarrow Table.

    output: a `.parquet` file, a folder, or None to keep the rows in memory. Options come as a
    `ScoreOptions`, as keyword arguments of its fields, or both. Every row comes back, in order. A run that
    was killed is taken up again by the same call; one that is finished returns at once.

    Raises `ManifestError`, `ArtifactError` and `UsageError` for bad input before anything is embedded,
    `NothingScoredError` after writing when no row, or too few rows, could be scored.
    """
    options = replace(options or ScoreOptions(), **changes)
    return score_job(Job.open(manifest, options), options, output, source=manifest)


def score_job(
    job: Job, options: ScoreOptions, output: str | Path | None = None, *, source: Any = None
) -> ScoreSummary:
    """Score the pairs of a job that was opened; returns and raises as `score` does.

    source: the manifest as it was given; an output that it would take in at the next run is refused.
    """
    from batchverify.heads.head import find_head

    head = find_head(options.head, job.fingerprint)
    threshold = head.threshold(options.threshold, options.at_far)
    document = job.document(head.digest, threshold)
    if output is None:
        summary = _score_in_memory(job, head, threshold, document)
    else:
        place = Output(output, [Location.parse(name) for name in job.manifest.names])
        _spare_source(source, place)
        found = _finished(job, options, place, document)
        summary = found or _score_to(job, options, head, threshold, document, place)
        summary = replace(summary, output=os.fspath(output))
    check_failed(summary.failed_rows, summary.rows, options.max_failed, summary)
    return summary


def _spare_source(source: Any, place: Output) -> None:
    """Refuse an output that the next run of the same command would take for a part of its manifest."""
    written = place.target if place.single else place.target.join("part-00000.parquet")
    if isinstance(source, str | os.PathLike) and would_find(os.fspath(source), written):
        raise UsageError(
            f"{place.target}: the next run would read the output as a part of the manifest {source}; give it "
            "another folder with -o"
        )


def _score_in_memory(job: Job, head: Any, threshold: float, document: Mapping[str, Any]) -> ScoreSummary:
    rows = MemoryRows(output_schema(job.scan.carried))
    summary = ScoreSummary(**score_rows(job, head, threshold, rows))
    return replace(summary, _table=rows.table(job.record(document, summary.to_json())))


def _finished(
    job: Job, options: ScoreOptions, place: Output, document: Mapping[str, Any]
) -> ScoreSummary | None:
    """The summary of a run that finds its output finished; None where there is work to do."""
    record = place.finished(document, overwrite=options.overwrite)
    if record is None or (options.retry_failed and record["failed_rows"]):
        return None
    place.forget_leftovers(document)
    return ScoreSummary.of_record(record, time.monotonic() - job.started)


def _score_to(
    job: Job, options: ScoreOptions, head: Any, threshold: float, document: Mapping[str, Any], place: Output
) -> ScoreSummary:
    # Read before anything is written: a manifest that is none leaves no job folder behind.
    schema, total = output_schema(job.scan.carried), job.scan.rows
    begin = place.claimed(document, total, overwrite=options.overwrite, retry_failed=options.retry_failed)
    with begin as claim:
        parts, state = claim
        rows = PartRows(place, parts, state, schema, total)
        try:
            summary = ScoreSummary(**score_rows(job, head, threshold, rows, rows.kept_paths))
        finally:
            rows.abandon()
        record = {
            **job.record(document, summary.to_json()),
            "token": parts.token,
            "part_rows": parts.size,
            "output": str(place.target),
        }
        place.publish(parts, record, total)
    return summary


def embed(manifest: Any, options: EmbedOptions | None = None, **changes: Any) -> EmbedSummary:
    """Embed every unique image of a manifest into the cache, and no more.

    Raises as `score` does.
    """
    options = replace(options or EmbedOptions(), **changes)
    if options.no_cache:
        raise UsageError("embed fills the cache; with --no-cache it has nothing to do")
    job = Job.open(manifest, options)
    summary, embeddings = embed_job(job)
    check_failed(summary.failed, len(embeddings.codes), options.max_failed, summary)
    return summary


def embed_job(job: Job) -> tuple[EmbedSummary, EmbeddingTable]:
    """The embeddings of a manifest's unique images, from the cache or anew."""
    progress = Progress(quiet=job.options.quiet)
    with engine_of(job, progress) as (engine, cache):
        engine.require_shared(None, job.scan.images)
        embeddings = ImageRun(engine, job.scan.images, cache, progress).run()
        done = run_counts(job, engine, embeddings, progress)
    return EmbedSummary(**done), embeddings


def check_failed(failed: int, total: int, most: float, summary: EmbedSummary) -> None:
    """Raise `NothingScoredError`, which carries the summary, when all or too many failed."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary.failures.items())
    if total and failed == total:
        lost = any(each in summary.failures for each in (Reason.NOT_FOUND.value, Reason.FORBIDDEN.value))
        hint = "; is --image-root right?" if lost else ""
        message = f"nothing could be scored: all {total:,} failed ({reasons}){hint}"
        raise NothingScoredError(message, summary)
    if total and failed / total > most:
        message = f"{failed:,} of {total:,} failed, more than --max-failed {most:g} allows ({reasons})"
        raise NothingScoredError(message, summary)


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

    def wanted(self, job: Job, embeddings: EmbeddingTable) -> np.ndarray | None:
        """The indices of the images to be looked up, None for all; what finished rows tell goes to `embeddings`."""

    def keep_paths(self, paths: set[ComputePath]) -> None:
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

    def wanted(self, job: Job, embeddings: EmbeddingTable) -> np.ndarray | None:
        """See `Rows`."""
        return None

    def keep_paths(self, paths: set[ComputePath]) -> None:
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
    def kept_paths(self) -> list[ComputePath]:
        """The compute paths that the job keeps; none while no vector was computed."""
        return paths_from_text(self._state.get("compute_path") or "")

    def missing(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """See `Rows`."""
        return self._parts.missing(blocks)

    def write(self, first: int, table: pa.Table) -> None:
        """See `Rows`."""
        self._writer.write(first, table)

    def wanted(self, job: Job, embeddings: EmbeddingTable) -> np.ndarray | None:
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
                embeddings.restore(indices, column.slice(start, len(indices)))
        return np.flatnonzero(needed & (embeddings.codes < 0))

    def keep_paths(self, paths: set[ComputePath]) -> None:
        """See `Rows`."""
        kept = self.kept_paths
        new = [path for path in paths if not any(path.same_vectors(other) for other in kept)]
        if new and kept and not self._computing:
            raise UsageError(
                f"{self._folder.output}: this job's vectors were computed on '{paths_to_text(kept)}', here they "
                f"would be on '{paths_to_text(paths)}': go on where that is possible, or --overwrite starts anew"
            )
        # Later ones are of other nodes of the cluster that the job has now.
        self._computing = True
        if new:
            self._state["compute_path"] = paths_to_text([*kept, *new])
            with writing(self._folder.location):
                self._folder.keep(self._state)

    def counts(self) -> dict[str, int]:
        """See `Rows`."""
        records = self._parts.done.values()
        return {name: sum(getattr(each, name) for each in records) for name in ("scored", "different")}

    def abandon(self) -> None:
        """Remove the part in the making."""
        self._writer.abandon()


def score_rows(
    job: Job, head: Any, threshold: float, rows: Rows, kept: Sequence[ComputePath] = ()
) -> dict[str, Any]:
    """Embed what is needed and score what is missing; returns the fields of the summary."""
    progress = Progress(total_rows=job.scan.rows, quiet=job.options.quiet)
    embeddings = EmbeddingTable(len(job.scan.images), rows.scratch)
    wanted = rows.wanted(job, embeddings)
    with engine_of(job, progress, wanted, kept) as (engine, cache):
        image_paths = job.scan.images
        engine.require_shared(rows.place, image_paths)
        ImageRun(engine, image_paths, cache, progress, embeddings, wanted, rows.keep_paths).run()
        progress.rows = rows.resumed
        missing = rows.missing(job.manifest.blocks(job.scan))

        def write(block: Block, scores: tuple[np.ndarray, np.ndarray]) -> None:
            with progress.watch.stage("write rows"):
                rows.write(block.first, result_table(block, embeddings, scores, threshold))
            progress.rows += len(block.a)

        with BackgroundWorker() as worker:
            for block, scores in score_pairs(engine, head, missing, embeddings, progress):
                worker(partial(write, block, scores))
                progress.show()
        done = run_counts(job, engine, embeddings, progress)
    counts = rows.counts()
    return {
        **done,
        "compute_path": done["compute_path"] or paths_to_text(kept),
        **counts,
        "failed_rows": job.scan.rows - counts["scored"],
        "resumed_rows": rows.resumed,
        "threshold": threshold,
        "head": head.digest,
    }


def run_counts(job: Job, engine: Engine, embeddings: EmbeddingTable, progress: Progress) -> dict[str, Any]:
    """The fields of `EmbedSummary`."""
    failures, paths = embeddings.failures(), engine.compute_paths()
    counts = EmbedSummary.counts(progress, engine.workers.count)
    failed, unique = sum(failures.values()), len(embeddings.codes)
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
        "compute_path": paths_to_text(paths),
        "compute_reason": min(paths, key=str).reason if paths else "",
        "cache": job.options.cache_root,
    }


def _peaks(engine: Engine, progress: Progress) -> dict[str, float]:
    """The most memory of the driver and of its hungriest worker; threads are the driver's own."""
    peaks = {"driver": round(peak_memory(), 1)}
    if engine.name != "local":
        peaks["workers"] = round(progress.worker_memory, 1)
    return peaks
