"""`score` and `embed`: from a manifest to result rows, in memory or in an output."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batchverify.engine.embedding_table import EmbeddingTable
from batchverify.engine.fused_table import FusedTable
from batchverify.engine.scheduler import score_pairs
from batchverify.errors import NothingScoredError, UsageError
from batchverify.manifest.manifest import Block
from batchverify.manifest.tables import would_find
from batchverify.options import EmbedOptions, ScoreOptions
from batchverify.records import Reason
from batchverify.scoring.base_rate import Judge, shifted_for
from batchverify.scoring.embedding_run import embedded, fused_summary, table_of
from batchverify.scoring.job import Job, head_of
from batchverify.scoring.output import Output
from batchverify.scoring.parquet import check_columns, output_schema, result_table
from batchverify.scoring.rows import MemoryRows, PartRows, Rows
from batchverify.scoring.summary import EmbedSummary, ScoreSummary
from batchverify.storage.background import BackgroundWorker
from batchverify.storage.location import Location


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
        rows = MemoryRows(_schema(job, judge))
        summary = score_rows(job, judge, rows)
        summary = replace(summary, _table=rows.table(job.record(document, summary.to_json())))
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


def _schema(job: Job, judge: Judge) -> pa.Schema:
    """The columns of the output."""
    details, review = job.options.details, judge.band is not None
    return output_schema(job.scan.carried, fused=bool(job.fused), details=details, review=review)


def _finished(job: Job, options: ScoreOptions, output: Output, document: Mapping[str, Any]) -> ScoreSummary | None:
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
    schema, total = _schema(job, judge), job.scan.rows
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


def score_rows(job: Job, judge: Judge, rows: Rows) -> ScoreSummary:
    """Embed the images that are needed and score the rows that are missing."""
    embeddings = table_of(job, rows.scratch)
    wanted = rows.wanted(job, embeddings)
    with embedded(job, embeddings, wanted, rows) as run:
        progress = run.progress
        progress.rows = rows.resumed
        shifted = shifted_for(judge, job, embeddings, rows)
        missing = rows.missing(job.manifest.blocks(job.scan))

        def write(block: Block, scores: tuple[np.ndarray, np.ndarray]) -> None:
            with progress.watch.stage("write rows"):
                table = result_table(block, embeddings, shifted(scores), shifted.threshold, job.names, shifted.band)
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
