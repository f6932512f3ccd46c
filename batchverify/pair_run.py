"""Drives blocks of pairs through an engine, in order."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from batchverify.engine import QUEUED_PER_WORKER, Engine, Job, WorkerLostError
from batchverify.errors import BatchverifyError
from batchverify.gallery import Gallery
from batchverify.manifest.manifest import Block
from batchverify.pipeline import Scores
from batchverify.progress import Progress
from batchverify.scheduler import PATIENCE_SECONDS

log = logging.getLogger(__name__)

PAIR_TRIES = 5


def score_pairs(
    engine: Engine, head: Any, blocks: Iterable[Block], gallery: Gallery, progress: Progress
) -> Iterator[tuple[Block, tuple[np.ndarray, np.ndarray]]]:
    """Score blocks of pairs on the workers: each with (probability, similarity) of its usable pairs, in order."""
    engine.share(head, gallery.vectors)
    window: deque[tuple[Block, Job]] = deque()
    for block in blocks:
        window.append((block, _score_block(engine, gallery, block)))
        if len(window) > engine.workers.count * (1 + QUEUED_PER_WORKER):
            yield _scored(engine, gallery, progress, *window.popleft())
    while window:
        yield _scored(engine, gallery, progress, *window.popleft())


def _score_block(engine: Engine, gallery: Gallery, block: Block) -> Job:
    usable = gallery.usable(block.a, block.b)
    return engine.score(block.a[usable], block.b[usable])


def _scored(
    engine: Engine, gallery: Gallery, progress: Progress, block: Block, job: Job
) -> tuple[Block, tuple[np.ndarray, np.ndarray]]:
    """The scores of a block; a worker that dies costs another try, pairs of vectors kill none by themselves."""
    reason = ""
    for _ in range(PAIR_TRIES):
        try:
            while not engine.wait([job], timeout=PATIENCE_SECONDS):
                progress.say(
                    f"no progress for {PATIENCE_SECONDS:g} s: waiting for the scores of {len(block.a):,} rows "
                    f"from {block.first + 1:,}"
                )
            done: Scores = engine.result(job)
        except WorkerLostError as exc:
            reason = str(exc).splitlines()[0]
            log.warning("rows from %d are scored again: %s", block.first + 1, reason)
            job = _score_block(engine, gallery, block)
        else:
            progress.measure(done)
            return block, (done.probability, done.similarity)
    raise BatchverifyError(
        f"rows from {block.first + 1}: {PAIR_TRIES} workers died while they were scored; the last: {reason}"
    )
