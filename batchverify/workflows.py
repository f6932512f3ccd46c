"""One function per command: the Python API, of which the command line is a client."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from batchverify.cache import EmbeddingCache, KeyIndex
from batchverify.engine import Engine, LocalEngine, Workers, WorkPlan, available_cpus, visible_gpus
from batchverify.errors import NothingScoredError, UsageError
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.gallery import Gallery
from batchverify.images import read_image
from batchverify.locations import Location
from batchverify.manifest import Columns, Manifest, Scan
from batchverify.options import EmbedOptions, ScoreOptions
from batchverify.pipeline import Loader, LoadPlan
from batchverify.planning import backbone_fingerprint, work_plan
from batchverify.progress import Progress
from batchverify.records import Skipped
from batchverify.results import output_schema, result_table
from batchverify.scheduler import ImageRun, score_pairs
from batchverify.sinks import Sink, open_sink
from batchverify.summary import EmbedSummary, ScoreSummary
from batchverify.version import __version__

# Up to so many images to embed, some minutes of work, threads are the faster engine: on two cores a local Ray
# takes 8 s to start and stop and a fifth of the rate. Beyond, it matters more that no image can end the run.
RAY_WORTH_IMAGES = 10_000
SAMPLE = 64


@dataclass(frozen=True)
class Job:
    """A manifest and the settings of a run, checked and ready."""

    options: EmbedOptions
    manifest: Manifest
    scan: Scan
    manifest_fingerprint: str
    backbone_fingerprint: str
    settings: EmbeddingSettings
    fingerprint: EmbeddingFingerprint
    run_id: str
    started: float

    @classmethod
    def open(cls, manifest: Any, options: EmbedOptions) -> Job:
        """Open and scan the manifest, find the backbone. Raises the errors of bad input."""
        started = time.monotonic()
        columns = Columns(options.column_a, options.column_b)
        opened = Manifest.open(manifest, columns=columns, image_root=options.image_root, limit=options.limit)
        # Read now: the files may be gone when the run record is written.
        hashed = opened.fingerprint
        backbone = backbone_fingerprint(options)
        settings = options.settings
        fingerprint = EmbeddingFingerprint.of(backbone, settings)
        run_id = uuid.uuid4().hex[:12]
        return cls(options, opened, opened.scan(), hashed, backbone, settings, fingerprint, run_id, started)

    def of_view(self, view: int) -> Job:
        """The same images in an augmented view, cached under a fingerprint of its own."""
        settings = replace(self.settings, view=view)
        fingerprint = EmbeddingFingerprint.of(self.backbone_fingerprint, settings)
        run_id, started = uuid.uuid4().hex[:12], time.monotonic()
        return replace(self, settings=settings, fingerprint=fingerprint, run_id=run_id, started=started)

    def open_cache(self) -> EmbeddingCache | None:
        """The run's cache, made where it is not there yet."""
        root = self.options.cache_root
        if root is None:
            return None
        cache = EmbeddingCache(root, self.fingerprint, run_id=self.run_id)
        cache.create()
        cache.refresh()
        return cache

    def plan(self) -> WorkPlan:
        """What workers need to know."""
        return work_plan(self.options, self.settings, self.fingerprint)


def score(
    manifest: Any, output: str | Path | None = None, options: ScoreOptions | None = None, **changes: Any
) -> ScoreSummary:
    """Score every pair of a manifest: a path, glob, folder, URI, DataFrame or pyarrow Table.

    output: a `.parquet` file, a folder, or None to keep the rows in memory. Options come as a
    `ScoreOptions`, as keyword arguments of its fields, or both. Every row comes back, in order.

    Raises `ManifestError`, `ArtifactError` and `UsageError` for bad input before anything is embedded,
    `NothingScoredError` after writing when no row, or too few rows, could be scored.
    """
    from batchverify.head import find_head

    options = replace(options or ScoreOptions(), **changes)
    job = Job.open(manifest, options)
    head = find_head(options.head, job.fingerprint)
    threshold = head.threshold(options.threshold, options.at_far)
    progress = Progress(total_rows=job.scan.rows, quiet=options.quiet)
    schema = output_schema(job.scan.carried)
    sink = open_sink(output, schema, [Location.parse(name) for name in job.manifest.names])
    try:
        with _engine(job, progress) as (engine, cache):
            engine.require_shared(os.fspath(output) if output else None, job.scan.images.references)
            gallery = ImageRun(engine, job.scan.images.references, cache, progress).run()
            counts = _write_scores(job, engine, head, gallery, sink, threshold, progress)
            done = _summary(job, engine, gallery, progress)
        name = os.fspath(output) if output is not None else None
        summary = ScoreSummary(**done, **counts, threshold=threshold, head=head.digest, output=name)
        sink.finish(_record(job, summary))
    finally:
        sink.abandon()
    summary = replace(summary, _table=getattr(sink, "table", None))
    check_failed(summary.failed_rows, summary.rows, options.max_failed, summary)
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
    with _engine(job, progress) as (engine, cache):
        engine.require_shared(None, job.scan.images.references)
        gallery = ImageRun(engine, job.scan.images.references, cache, progress).run()
        done = _summary(job, engine, gallery, progress)
    return EmbedSummary(**done), gallery


def _write_scores(
    job: Job, engine: Engine, head: Any, gallery: Gallery, sink: Sink, threshold: float, progress: Progress
) -> dict[str, Any]:
    scored = different = 0
    for block, scores in score_pairs(engine, head, job.manifest.blocks(job.scan), gallery):
        table = result_table(block, gallery, scores, threshold)
        sink.write(table)
        scored += len(scores[0])
        different += pc.sum(table.column("label")).as_py() or 0
        progress.rows += table.num_rows
        progress.show()
    return {"scored": scored, "different": different, "failed_rows": job.scan.rows - scored}


@contextmanager
def _engine(job: Job, progress: Progress) -> Iterator[tuple[Engine, EmbeddingCache | None]]:
    """The engine that the options ask for and the run's cache; ended, cleared and committed afterwards."""
    cache = job.open_cache()
    index = cache.index if cache is not None else None
    engine = _build_engine(job, index)
    try:
        yield engine, cache
    finally:
        progress.clear()
        engine.close()


def _build_engine(job: Job, index: KeyIndex | None) -> Engine:
    options = job.options
    address = options.address or cluster_address()
    kind = options.engine if options.engine != "auto" else _choose_engine(job, index, address)
    if kind == "ray":
        from batchverify.ray_engine import RayEngine

        return RayEngine(
            job.plan(), index, address=address, num_cpus=options.num_cpus, verbose=options.verbose
        )
    cpus = options.num_cpus or available_cpus()
    return LocalEngine(job.plan(), index, Workers.for_cpus(cpus, visible_gpus(options.device)))


def cluster_address() -> str | None:
    """The cluster that the environment names: `$RAY_ADDRESS`, or the one that runs this process as its job."""
    return os.environ.get("RAY_ADDRESS") or ("auto" if os.environ.get("RAY_JOB_ID") else None)


def _choose_engine(job: Job, index: KeyIndex | None, address: str | None) -> str:
    """Ray where a cluster is named or enough images are not in the cache, by a sample of them."""
    if address is not None:
        return "ray"
    references = [each for each in job.scan.images.references if isinstance(each, str)]
    if len(references) <= RAY_WORTH_IMAGES:
        return "local"
    missing = _missing_share(job.plan().load, index, references[:: max(1, len(references) // SAMPLE)])
    return "ray" if missing * len(references) > RAY_WORTH_IMAGES else "local"


def _missing_share(plan: LoadPlan, index: KeyIndex | None, sample: Sequence[str]) -> float:
    if index is None:
        return 1.0
    with ThreadPoolExecutor(16) as pool:
        data = list(pool.map(lambda name: read_image(name, plan.limits), sample))
    keys = [Loader.key(each) for each in data if not isinstance(each, Skipped)]
    return float((index.find(keys) < 0).sum()) / len(sample)


def _summary(job: Job, engine: Engine, gallery: Gallery, progress: Progress) -> dict[str, Any]:
    seconds = time.monotonic() - job.started
    return {
        **EmbedSummary.counts(progress, engine.workers.count),
        "rows": job.scan.rows,
        "failures": gallery.failures(),
        "seconds": round(seconds, 2),
        "engine": engine.name,
        "compute_path": engine.compute_path(),
        "cache": job.options.cache_root,
    }


def _record(job: Job, summary: ScoreSummary) -> dict[str, Any]:
    """The run record of design: who made this file, from what, with which settings."""
    return {
        "version": __version__,
        "run_id": job.run_id,
        "options": job.options.as_record(),
        "manifest": job.manifest.names,
        "manifest_fingerprint": job.manifest_fingerprint,
        "image_root": job.options.image_root,
        "backbone_fingerprint": job.backbone_fingerprint,
        "embedding": dict(job.fingerprint.document),
        "embedding_fingerprint": job.fingerprint.id,
        **summary.to_json(),
    }


def check_failed(failed: int, total: int, most: float, summary: EmbedSummary) -> None:
    """Raise `NothingScoredError`, which carries the summary, when all or too many failed."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary.failures.items())
    if total and failed == total:
        message = f"nothing could be scored: all {total:,} failed ({reasons}); is --image-root right?"
        raise NothingScoredError(message, summary)
    if total and failed / total > most:
        message = f"{failed:,} of {total:,} failed, more than --max-failed {most:g} allows ({reasons})"
        raise NothingScoredError(message, summary)
