"""One function per command: the Python API, of which the command line is a client."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchverify.engine.gallery import Gallery
from batchverify.engine.scheduler import ImageRun
from batchverify.errors import NothingScoredError, UsageError
from batchverify.job import Job
from batchverify.launch import engine_of
from batchverify.manifest.tables import would_find
from batchverify.options import EmbedOptions, ScoreOptions
from batchverify.output import Output
from batchverify.progress import Progress
from batchverify.records import Reason
from batchverify.results import output_schema
from batchverify.scoring import MemoryRows, PartRows, run_counts, score_rows
from batchverify.storage.location import Location
from batchverify.summary import EmbedSummary, ScoreSummary


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
            summary = ScoreSummary(**score_rows(job, head, threshold, rows, rows.path))
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
    summary, gallery = embed_job(job)
    check_failed(summary.failed, len(gallery.codes), options.max_failed, summary)
    return summary


def embed_job(job: Job) -> tuple[EmbedSummary, Gallery]:
    """The embeddings of a manifest's unique images, from the cache or anew."""
    progress = Progress(quiet=job.options.quiet)
    with engine_of(job, progress) as (engine, cache):
        engine.require_shared(None, job.scan.images)
        gallery = ImageRun(engine, job.scan.images, cache, progress).run()
        done = run_counts(job, engine, gallery, progress)
    return EmbedSummary(**done), gallery


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
