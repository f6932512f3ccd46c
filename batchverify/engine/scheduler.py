"""Sends chunks of images, then blocks of pairs, through an engine: every image once, every row in order."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.segment import Entry
from batchverify.engine.base import QUEUED_PER_WORKER, Engine, NodeLostError, Task, WorkerLostError, Workers
from batchverify.engine.embedding_table import ContentIndex, EmbeddingTable
from batchverify.engine.fused_table import Table
from batchverify.engine.stages import EmbeddedChunk, LoadedChunk, PairScores
from batchverify.errors import BatchverifyError, first_line
from batchverify.manifest.manifest import Block
from batchverify.progress import Progress
from batchverify.records import Reason, Skipped
from batchverify.runtime.compute_path import ComputePath, paths_to_text

log = logging.getLogger(__name__)

# Towards the end of a run chunks shrink to this fraction.
SMALLEST_FRACTION = 4
# If no task ends for so long, that is reported; after the second time in a row the busy workers count as hung.
PATIENCE_SECONDS = 300.0
SILENCES = 2
# An image that loses so many workers when it is alone is `crashed`.
STRIKES = 2
# How many workers may be lost with a block of pairs. One that is silent so often counts as hung: pairs do not hang
# workers as images do, and a large block may take its time.
PAIR_TRIES = 5
PAIR_SILENCES = 12


@dataclass(eq=False)
class _EmbedRequest:
    """Images of a loaded chunk to be embedded. positions: among its decoded images. indices: of the run's images."""

    loaded: Task
    positions: list[int]
    indices: list[int]
    keys: list[bytes]


@dataclass
class ImageRun:
    """Embeds the images of a run that the cache does not have; equal bytes are embedded once.

    When a worker dies, or hangs and is killed, its images become suspects, in two halves. Suspects are tried again
    after all other images, one half at a time. A half that loses its worker is halved again, until the image that is
    to blame is alone. After its second strike that image is `crashed`.
    On Ctrl-C the chunks that are being embedded are finished and committed.

    into: a table with results of some images. wanted: (K,) indices of the images to embed, by default all.
    on_paths: called with the compute paths before vectors are stored. patience: see `PATIENCE_SECONDS`.
    """

    engine: Engine
    image_paths: Sequence[str | Skipped]
    cache: EmbeddingCache | None
    progress: Progress
    into: EmbeddingTable | None = None
    wanted: np.ndarray | None = None
    on_paths: Callable[[set[ComputePath]], None] | None = None
    patience: float = PATIENCE_SECONDS
    embeddings: EmbeddingTable = field(init=False)

    def __post_init__(self) -> None:
        self.embeddings = EmbeddingTable(len(self.image_paths)) if self.into is None else self.into
        self._indices = range(len(self.image_paths)) if self.wanted is None else self.wanted
        self._next = 0
        self._content = ContentIndex(len(self.image_paths))
        self._waiting: dict[bytes, list[int]] = {}
        self._strikes: dict[int, int] = {}
        self._silences = 0
        self._to_load: deque[list[int]] = deque()
        self._suspects: deque[list[int]] = deque()
        # The suspects that run now, with nothing beside them.
        self._alone: list[int] = []
        self._to_embed: deque[_EmbedRequest] = deque()
        self._loading: dict[Task, list[int]] = {}
        self._embedding: dict[Task, _EmbedRequest] = {}
        self._finishing: Task | None = None

    def run(self) -> EmbeddingTable:
        """Embed all images; returns when every image has a vector or a reason and all are committed."""
        started = time.monotonic()
        self.progress.total = len(self._indices)
        try:
            self._cut()
            while self._busy() or self._suspects:
                self._submit()
                for task in self._wait():
                    self._finish(task)
                self._cut()
                self.progress.show()
        except KeyboardInterrupt:
            self._drain()
            raise
        finally:
            if self.cache is not None:
                with self.progress.watch.stage("write"):
                    self.cache.commit()
            self.progress.image_seconds = time.monotonic() - started
        self.embeddings.require_complete(self.wanted)
        return self.embeddings

    def _cut(self) -> None:
        """Cut the next chunks, only as many as are loaded soon."""
        while self._next < len(self._indices) and len(self._to_load) < self.engine.workers.loaders:
            start = self._next
            self._next += chunk_size(len(self._indices) - start, self.engine.workers)
            chunk = []
            for index in map(int, self._indices[start : self._next]):
                image_path = self.image_paths[index]
                if isinstance(image_path, Skipped):
                    self._fail(index, image_path)
                else:
                    chunk.append(index)
            if chunk:
                self._to_load.append(chunk)

    def _busy(self) -> bool:
        return bool(self._to_load or self._to_embed or self._loading or self._embedding)

    def _submit(self) -> None:
        if not self._busy():
            self._alone = self._suspects.popleft()
            self._to_load.append(self._alone)
        workers = self.engine.workers
        while self._to_embed and len(self._embedding) < workers.count * (1 + QUEUED_PER_WORKER):
            request = self._to_embed.popleft()
            task = self.engine.embed(request.loaded, request.positions, request.keys)
            self._embedding[task] = request
        room = workers.loaders + workers.count - len(self._to_embed)
        while self._to_load and len(self._loading) < min(workers.loaders, room):
            chunk = self._to_load.popleft()
            image_paths = [str(self.image_paths[index]) for index in chunk]
            self._loading[self.engine.load(image_paths)] = chunk

    def _wait(self) -> list[Task]:
        done = self.engine.wait([*self._loading, *self._embedding], timeout=self.patience)
        self._silences = 0 if done else self._silences + 1
        if not done:
            self.progress.say(
                f"no progress for {self.patience:g} s: waiting for {len(self._loading)} chunks to load and "
                f"{len(self._embedding)} to be embedded, the first with {self._first_path()}"
            )
        if self._silences >= SILENCES:
            self._silences = 0
            for task in (*self._loading, *self._embedding):
                self.engine.kill(task, f"{self._first_path()} or an image near it")
        return done

    def _first_path(self) -> str:
        chunks = [*(request.indices for request in self._embedding.values()), *self._loading.values()]
        return str(self.image_paths[chunks[0][0]])

    def _finish(self, task: Task) -> None:
        if task in self._loading:
            self._finish_load(task, self._loading.pop(task))
        else:
            # Removed last: after a Ctrl-C in between, `_drain` must find it.
            self._finishing = task
            self._finish_embed(task, self._embedding[task])
            del self._embedding[task]

    def _finish_load(self, task: Task, chunk: list[int]) -> None:
        try:
            loaded: LoadedChunk = self.engine.result(task)
        except WorkerLostError as exc:
            self._strike(chunk, exc)
            return
        self.progress.measure(loaded.seconds, loaded.peak_memory)
        if len(loaded.keys) < len(chunk):
            self._to_load.appendleft(chunk[len(loaded.keys) :])
        request = _EmbedRequest(task, [], [], [])
        position_of = {number: position for position, number in enumerate(loaded.missing)}
        for number, (index, key) in enumerate(zip(chunk, loaded.keys, strict=False)):
            if key is not None:
                self.embeddings.see(index, key)
            if number in loaded.cached:
                self.progress.cached += self._take(index, loaded.cached[number])
            elif number in loaded.skipped:
                self._take_skipped(index, key, loaded.skipped[number])
            elif key is not None and (owner := self._content.get(key)) >= 0:
                self._share_result(index, key, owner)
            elif key is not None and number in position_of:
                self._content.put(key, index)
                request.positions.append(position_of[number])
                request.indices.append(index)
                request.keys.append(key)
        if request.indices:
            self._to_embed.append(request)

    def _take(self, index: int, entry: Entry) -> bool:
        """Give an image its result; whether that is a vector."""
        if entry.skipped is not None:
            self._fail(index, entry.skipped)
        if entry.vector is None:
            return False
        self.embeddings.put(index, entry.vector)
        self.embeddings.describe(index, entry)
        return True

    def _take_skipped(self, index: int, key: bytes | None, skipped: Skipped) -> None:
        self._fail(index, skipped)
        if key is not None and self._content.get(key) < 0:
            self._content.put(key, index)
            self._store([Entry(key, None, skipped=skipped)])

    def _share_result(self, index: int, key: bytes, owner: int) -> None:
        """Give an image the result of an earlier one with the same bytes, now or when it is there."""
        if self.embeddings.known(owner):
            self._copy(owner, index)
        else:
            self._waiting.setdefault(key, []).append(index)

    def _copy(self, source: int, index: int) -> None:
        self.embeddings.copy(source, index)
        if self.embeddings.codes[index]:
            self.progress.failed += 1
        else:
            self.progress.repeated += 1

    def _finish_embed(self, task: Task, request: _EmbedRequest) -> None:
        try:
            done: EmbeddedChunk = self.engine.result(task)
        except WorkerLostError as exc:
            for key in request.keys:
                self._content.drop(key)
                self._suspects.extend([other] for other in self._waiting.pop(key, []))
            self._strike(request.indices, exc)
            return
        self.progress.measure(done.seconds, done.peak_memory)
        if self.on_paths is not None:
            self.on_paths(self.engine.compute_paths())
        for index, entry in zip(request.indices, done.entries, strict=True):
            self.progress.embedded += self._take(index, entry)
            for other in self._waiting.pop(entry.key, []):
                self._copy(index, other)
        if self.cache is not None:
            self.cache.compute_path = paths_to_text(self.engine.compute_paths())
        self._store(done.entries)

    def _strike(self, indices: list[int], exc: WorkerLostError) -> None:
        """A worker died with these images: try them again in halves, or give up the one that is left."""
        if isinstance(exc, NodeLostError):
            self._to_load.append(indices)
            return
        if len(indices) > 1:
            self._suspects.extend([indices[: len(indices) // 2], indices[len(indices) // 2 :]])
            return
        if indices != self._alone:
            # It ran beside others, of which one may be to blame.
            self._suspects.append(indices)
            return
        index = indices[0]
        self._strikes[index] = self._strikes.get(index, 0) + 1
        if self._strikes[index] < STRIKES:
            self._suspects.append(indices)
            return
        log.warning("%s: crashed: %s", self.image_paths[index], first_line(exc))
        self._fail(index, Skipped(Reason.CRASHED, f"its worker died or hung {STRIKES} times"))

    def _fail(self, index: int, skipped: Skipped) -> None:
        log.info("%s: %s: %s", self.image_paths[index], skipped.reason.value, skipped.message)
        self.embeddings.fail(index, skipped)
        self.progress.failed += 1

    def _store(self, entries: Sequence[Entry]) -> None:
        if self.cache is not None:
            with self.progress.watch.stage("write"):
                self.cache.append(entries)

    def _drain(self) -> None:
        """After Ctrl-C: store what is being embedded; a second Ctrl-C skips that."""
        begun = [task for task in self._embedding if not self.engine.withdraw(task)]
        if begun:
            self.progress.say(
                "stopping: images that are being embedded are finished and kept (Ctrl-C again to drop them)"
            )
        # First the one that Ctrl-C interrupted: the cache knows an entry again only until its commit after next.
        for task in sorted(begun, key=lambda task: task is not self._finishing):
            self._finish_embed(task, self._embedding[task])


def chunk_size(left: int, workers: Workers) -> int:
    """How many of the images that are left go into the next chunk.

    Towards the end chunks get smaller, so that all workers end at about the same time. They remain multiples of
    the smallest one, which fills a forward pass.
    """
    smallest = workers.chunk // SMALLEST_FRACTION
    share = -(-left // (2 * workers.count * smallest)) * smallest
    return min(workers.chunk, share, left)


def score_pairs(
    engine: Engine,
    head: Any,
    blocks: Iterable[Block],
    embeddings: Table,
    progress: Progress,
    *,
    patience: float = PATIENCE_SECONDS,
) -> Iterator[tuple[Block, tuple[np.ndarray, np.ndarray]]]:
    """Score blocks of pairs; yields each, in order, with (probability, similarity) of its usable pairs."""
    engine.share(head, embeddings.vectors)
    window: deque[tuple[Block, Task]] = deque()
    for block in blocks:
        window.append((block, _score_block(engine, embeddings, block)))
        if len(window) > engine.workers.count * (1 + QUEUED_PER_WORKER):
            yield _scored(engine, embeddings, progress, patience, *window.popleft())
    while window:
        yield _scored(engine, embeddings, progress, patience, *window.popleft())


def _score_block(engine: Engine, embeddings: Table, block: Block) -> Task:
    usable = embeddings.usable(block.a, block.b)
    return engine.score(block.a[usable], block.b[usable])


def _wait_for_scores(engine: Engine, progress: Progress, patience: float, block: Block, task: Task) -> None:
    """Wait for the scores of a block; a worker that is silent for too long is ended."""
    rows = f"{len(block.a):,} rows from row {block.first + 1:,}"
    silences = 0
    while not engine.wait([task], timeout=patience):
        progress.say(f"no progress for {patience:g} s: waiting for the scores of {rows}")
        silences += 1
        if silences % PAIR_SILENCES == 0:
            engine.kill(task, f"the scores of {rows}")


def _scored(
    engine: Engine,
    embeddings: Table,
    progress: Progress,
    patience: float,
    block: Block,
    task: Task,
) -> tuple[Block, tuple[np.ndarray, np.ndarray]]:
    """The scores of a block. If a worker dies, another one tries: pairs of vectors are not what kills workers."""
    reason = ""
    for _ in range(PAIR_TRIES):
        try:
            _wait_for_scores(engine, progress, patience, block, task)
            done: PairScores = engine.result(task)
        except WorkerLostError as exc:
            reason = first_line(exc)
            log.warning("rows from row %d are scored again: %s", block.first + 1, reason)
            task = _score_block(engine, embeddings, block)
        else:
            progress.measure(done.seconds, done.peak_memory)
            return block, (done.probability, done.similarity)
    raise BatchverifyError(
        f"rows from row {block.first + 1}: {PAIR_TRIES} workers died while scoring them, the last with: {reason}"
    )
