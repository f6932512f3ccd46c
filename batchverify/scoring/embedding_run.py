"""The embeddings of a job's images: by its backbone, or by each of several, one after the other."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from batchverify.engine.base import Engine
from batchverify.engine.embedding_table import EmbeddingTable
from batchverify.engine.fused_table import FusedTable, Table
from batchverify.engine.scheduler import ImageRun
from batchverify.process import peak_memory
from batchverify.progress import Progress
from batchverify.runtime.compute_path import ComputePath, members_to_text, paths_to_text
from batchverify.scoring.job import Job, engine_of
from batchverify.scoring.rows import Rows
from batchverify.scoring.summary import EmbedSummary


@dataclass
class EmbeddingRun:
    """A run whose images are embedded by a backbone of its job; engine and progress are free to score pairs.

    earlier: compute paths of an interrupted run. before: what became of the images by the backbones before this one.
    """

    job: Job
    engine: Engine
    progress: Progress
    table: EmbeddingTable
    earlier: Sequence[ComputePath] = ()
    before: Sequence[EmbedSummary] = ()

    def summary(self) -> EmbedSummary:
        """What became of the images by all backbones so far."""
        return fused_summary(self.job, [*self.before, self.own()]) if self.job.fused else self.own()

    def own(self) -> EmbedSummary:
        """What became of the images by this backbone."""
        progress, failures, paths = self.progress, self.table.failures(), self.engine.compute_paths()
        failed, unique = sum(failures.values()), len(self.table.codes)
        stages = dict(progress.watch.seconds)
        busy = stages.get("detect", 0.0) + stages.get("embed", 0.0)
        available = progress.image_seconds * self.engine.workers.count
        if progress.embedded:
            stages["wait"] = max(available - busy, 0.0)
        peaks = {"driver": round(peak_memory(), 1)}
        if self.engine.name != "local":  # whose threads count as the driver
            peaks["workers"] = round(progress.worker_memory, 1)
        return EmbedSummary(
            rows=self.job.scan.rows,
            unique_images=unique,
            embedded=progress.embedded,
            cached=progress.cached,
            repeated=progress.repeated,
            failed=failed,
            failures=failures,
            seconds=round(time.monotonic() - self.job.started, 2),
            images_per_second=round(progress.embedded / progress.image_seconds, 1) if progress.embedded else 0.0,
            engine=self.engine.name,
            compute_path=paths_to_text(paths or self.earlier),
            cache=self.job.options.cache_root,
            stage_seconds={name: round(seconds, 3) for name, seconds in stages.items()},
            embedder_busy=round(min(busy / available, 1.0), 3) if progress.embedded else 0.0,
            compute_reason=min(paths, key=str).reason if paths else "",
            resumed=unique - failed - progress.embedded - progress.cached - progress.repeated,
            image_seconds=round(progress.image_seconds, 3),
            peak_memory_mb=peaks,
        )


def table_of(job: Job, folder: str | None = None) -> Table:
    """The empty table of a job's images, one for each of several backbones. folder: as in `EmbeddingTable`."""
    tables = [
        EmbeddingTable(
            len(job.scan.images),
            folder,
            dimension=member.fingerprint.dimension,
            keyed=bool(job.fused),
            details=member.options.details,
        )
        for member in job.members
    ]
    return FusedTable(tables) if job.fused else tables[0]


@contextmanager
def embedded(
    job: Job, table: Table, wanted: np.ndarray | None = None, rows: Rows | None = None
) -> Iterator[EmbeddingRun]:
    """Embed a job's images into its table, backbone after backbone; yields before the last engine is closed.

    wanted: (K,) indices of the images that are needed, by default all. rows: what the embeddings are for. Each
    backbone reads the images anew.
    """
    rows = rows or Rows()
    tables = table.members if isinstance(table, FusedTable) else [table]
    before: list[EmbedSummary] = []
    for number, (member, own) in enumerate(zip(job.members, tables, strict=True)):
        progress = Progress(total_rows=job.scan.rows, quiet=job.options.quiet)
        pending = own.unknown(wanted)
        earlier, on_paths = rows.earlier_paths(number), partial(rows.record_paths, member=number)
        with engine_of(member, progress, pending, earlier) as (engine, cache):
            engine.require_shared(rows.target, job.scan.images)
            ImageRun(engine, job.scan.images, cache, progress, own, pending, on_paths).run()
            run = EmbeddingRun(job, engine, progress, own, earlier, before)
            if number == len(tables) - 1:
                yield run
            else:
                before.append(run.own())


def fused_summary(job: Job, members: Sequence[EmbedSummary]) -> EmbedSummary:
    """The summary of several backbones: their counts and times together, with those of each in `backbones`."""
    totals = {
        name: sum(getattr(each, name) for each in members)
        for name in ("embedded", "cached", "repeated", "failed", "resumed")
    }
    stages: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    for each in members:
        stages.update(each.stage_seconds)
        failures.update(each.failures)
    seconds = sum(each.image_seconds for each in members)
    peaks = {name: max(each.peak_memory_mb.get(name, 0.0) for each in members) for name in members[-1].peak_memory_mb}
    # Through all backbones, one after the other.
    rate = totals["embedded"] / len(members) / seconds if totals["embedded"] else 0.0
    busy = sum(each.embedder_busy * each.image_seconds for each in members if each.embedded)
    return replace(
        members[-1],
        **totals,
        failures=dict(failures),
        image_seconds=round(seconds, 3),
        images_per_second=round(rate, 1),
        stage_seconds={name: round(value, 3) for name, value in stages.items()},
        embedder_busy=round(busy / seconds, 3) if seconds else 0.0,
        compute_path=members_to_text([each.compute_path for each in members]),
        compute_reason=members_to_text([each.compute_reason for each in members]),
        peak_memory_mb=peaks,
        backbones={name: each.of_backbone() for name, each in zip(job.names, members, strict=True)},
    )
