"""Drives chunks of images, then blocks of pairs, through an engine: every image once, every row in order."""

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
from batchverify.engine.stages import Embeddings, Loaded, PairScores
from batchverify.errors import BatchverifyError, first_line
from batchverify.manifest.manifest import Block
from batchverify.progress import Progress
from batchverify.records import Reason, Skipped
from batchverify.runtime.compute_path import ComputePath, paths_to_text

log = logging.getLogger(__name__)

# What a chunk shrinks to at the end of a run.
SMALLEST_SHARE = 4
# Silence for this long is reported; the second time in a row the workers at work are taken for hung.
PATIENCE_SECONDS = 300.0
SILENCES = 2
STRIKES = 2
PAIR_TRIES = 5


@dataclass(eq=False)
class _Embedding:
    """Images of a loaded chunk that wait for, or are with, the embedder. places: among the loaded images."""

    loaded: Task
    places: list[int]
    indices: list[int]
    keys: list[bytes]


@dataclass
class ImageRun:
    """Embeds the images of a run: what the cache has is taken from it, equal bytes are embedded once.

    A worker that dies, or hangs and is killed, makes suspects of the images it had. Suspects run when all
    else is done, nothing beside them, in halves until the one that kills or hangs workers is alone; its
    second strike makes it `crashed`.
    On Ctrl-C what is with the embedder is finished and committed.

    into: a table that knows some images already. wanted: (K,) indices of those to embed, all by default.
    on_paths: is told the compute paths of vectors before they are kept.
    """

    engine: Engine
    image_paths: Sequence[str | Skipped]
    cache: EmbeddingCache | None
    progress: Progress
    into: EmbeddingTable | None = None
    wanted: np.ndarray | None = None
    on_paths: Callable[[set[ComputePath]], None] | None = None
    embeddings: EmbeddingTable = field(init=False)

    def __post_init__(self) -> None:
        self.embeddings = EmbeddingTable(len(self.image_paths)) if self.into is None else self.into
        self._next = 0
        self._content = ContentIndex(len(self.image_paths))
        self._waiting: dict[bytes, list[int]] = {}
        self._strikes: dict[int, int] = {}
        self._silences = 0
        self._to_load: deque[list[int]] = deque()
        self._suspects: deque[list[int]] = deque()
        self._to_embed: deque[_Embedding] = deque()
        self._loading: dict[Task, list[int]] = {}
        self._embedding: dict[Task, _Embedding] = {}

    def run(self) -> EmbeddingTable:
        """Embed everything; returns when the fate of every image is known and committed."""
        started = time.monotonic()
        self.progress.total = self._count = len(self.image_paths) if self.wanted is None else len(self.wanted)
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
        """Cut the next chunks, no more than are soon loaded: what is ahead takes no memory."""
        while self._next < self._count and len(self._to_load) < self.engine.workers.loaders:
            size = chunk_size(self._count - self._next, self.engine.workers)
            end = self._next + size
            some = range(self._next, end) if self.wanted is None else self.wanted[self._next : end].tolist()
            self._next, chunk = end, []
            for index in some:
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
            self._to_load.append(self._suspects.popleft())
        workers = self.engine.workers
        while self._to_embed and len(self._embedding) < workers.count * (1 + QUEUED_PER_WORKER):
            each = self._to_embed.popleft()
            self._embedding[self.engine.embed(each.loaded, each.places, each.keys)] = each
        room = workers.loaders + workers.count - len(self._to_embed)
        while self._to_load and len(self._loading) < min(workers.loaders, room):
            chunk = self._to_load.popleft()
            image_paths = [str(self.image_paths[index]) for index in chunk]
            self._loading[self.engine.load(image_paths)] = chunk

    def _wait(self) -> list[Task]:
        done = self.engine.wait([*self._loading, *self._embedding], timeout=PATIENCE_SECONDS)
        self._silences = 0 if done else self._silences + 1
        if not done:
            self.progress.say(
                f"no progress for {PATIENCE_SECONDS:g} s: waiting for {len(self._loading)} chunks to load and "
                f"{len(self._embedding)} to be embedded, the first with {self._first_path()}"
            )
        if self._silences >= SILENCES:
            self._silences = 0
            for task in (*self._loading, *self._embedding):
                self.engine.kill(task, self._first_path())
        return done

    def _first_path(self) -> str:
        first = [*(each.indices for each in self._embedding.values()), *self._loading.values()][0][0]
        return str(self.image_paths[first])

    def _finish(self, task: Task) -> None:
        if task in self._loading:
            self._finish_load(task, self._loading.pop(task))
        else:
            # Taken off the list last: Ctrl-C in between must find it there.
            self._finish_embed(task, self._embedding[task])
            del self._embedding[task]

    def _finish_load(self, task: Task, chunk: list[int]) -> None:
        try:
            loaded: Loaded = self.engine.result(task)
        except WorkerLostError as exc:
            self._strike(chunk, exc)
            return
        self.progress.measure(loaded)
        if len(loaded.keys) < len(chunk):
            self._to_load.appendleft(chunk[len(loaded.keys) :])
        wanted = self._take(loaded, chunk)
        if wanted:
            places = [loaded.missing.index(position) for position in wanted]
            keys = [loaded.keys[position] or b"" for position in wanted]
            self._to_embed.append(_Embedding(task, places, [chunk[position] for position in wanted], keys))

    def _take(self, loaded: Loaded, indices: Sequence[int]) -> list[int]:
        """Settle what a load settled; returns the positions that are to be embedded."""
        wanted = []
        for position, key in enumerate(loaded.keys):
            index = indices[position]
            if position in loaded.found:
                self._settle_found(index, loaded.found[position])
            elif position in loaded.skipped:
                self._settle_skipped(index, key, loaded.skipped[position])
            elif key is not None and (owner := self._content.get(key)) >= 0:
                self._share_owner(index, key, owner)
            elif key is not None and position in loaded.missing:
                self._content.put(key, index)
                wanted.append(position)
        return wanted

    def _settle_found(self, index: int, entry: Entry) -> None:
        if entry.skipped is not None:
            self._fail(index, entry.skipped)
        elif entry.vector is not None:
            self.embeddings.put(index, entry.vector)
            self.progress.cached += 1

    def _settle_skipped(self, index: int, key: bytes | None, skipped: Skipped) -> None:
        self._fail(index, skipped)
        if key is not None:
            if self._content.get(key) < 0:
                self._content.put(key, index)
            self._remember([Entry(key, None, skipped=skipped)])

    def _share_owner(self, index: int, key: bytes, owner: int) -> None:
        """An image with the bytes of an earlier one: it gets the same result, now or later."""
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

    def _finish_embed(self, task: Task, each: _Embedding) -> None:
        try:
            done: Embeddings = self.engine.result(task)
        except WorkerLostError as exc:
            for key in each.keys:
                self._content.drop(key)
                self._suspects.extend([other] for other in self._waiting.pop(key, []))
            self._strike(each.indices, exc)
            return
        self.progress.measure(done)
        if self.on_paths is not None:
            self.on_paths(self.engine.compute_paths())
        for index, entry in zip(each.indices, done.entries, strict=True):
            if entry.skipped is not None:
                self._fail(index, entry.skipped)
            elif entry.vector is not None:
                self.embeddings.put(index, entry.vector)
                self.progress.embedded += 1
            for other in self._waiting.pop(entry.key, []):
                self._copy(index, other)
        if self.cache is not None:
            self.cache.set_compute_path(paths_to_text(self.engine.compute_paths()))
        self._remember(done.entries)

    def _strike(self, indices: list[int], exc: WorkerLostError) -> None:
        """A worker died with these images: look closer at them, or call the last suspect `crashed`."""
        if isinstance(exc, NodeLostError):
            return self._to_load.append(indices)
        if len(indices) > 1:
            self._suspects.extend([indices[: len(indices) // 2], indices[len(indices) // 2 :]])
            return
        index = indices[0]
        self._strikes[index] = self._strikes.get(index, 0) + 1
        if self._strikes[index] < STRIKES:
            self._suspects.append(indices)
            return
        # Ray's errors may have no text.
        why = first_line(exc)
        log.warning("%s: crashed: %s", self.image_paths[index], why)
        self._fail(index, Skipped(Reason.CRASHED, f"its worker died or hung {STRIKES} times"))

    def _fail(self, index: int, skipped: Skipped) -> None:
        log.info("%s: %s: %s", self.image_paths[index], skipped.reason.value, skipped.message)
        self.embeddings.fail(index, skipped)
        self.progress.failed += 1

    def _remember(self, entries: Sequence[Entry]) -> None:
        if self.cache is not None:
            with self.progress.watch.stage("write"):
                self.cache.append(entries)

    def _drain(self) -> None:
        """After Ctrl-C: take in what the embedder has in hand; a second Ctrl-C goes without."""
        begun = [task for task in self._embedding if not self.engine.withdraw(task)]
        if begun:
            self.progress.say(
                "stopping: what is being embedded is finished and kept (Ctrl-C again to drop it)"
            )
        for task in begun:
            self._finish_embed(task, self._embedding[task])


def chunk_size(left: int, workers: Workers) -> int:
    """How many of the images that are left the next chunk takes.

    Towards the end chunks get smaller, so that no worker stands idle while another has a long one; they are
    whole forward passes all the same.
    """
    smallest = workers.chunk // SMALLEST_SHARE
    share = -(-left // (2 * workers.count * smallest)) * smallest
    return min(workers.chunk, share, left)


def score_pairs(
    engine: Engine, head: Any, blocks: Iterable[Block], embeddings: EmbeddingTable, progress: Progress
) -> Iterator[tuple[Block, tuple[np.ndarray, np.ndarray]]]:
    """Score blocks of pairs on the workers: each with (probability, similarity) of its usable pairs, in order."""
    engine.share(head, embeddings.vectors)
    window: deque[tuple[Block, Task]] = deque()
    for block in blocks:
        window.append((block, _score_block(engine, embeddings, block)))
        if len(window) > engine.workers.count * (1 + QUEUED_PER_WORKER):
            yield _scored(engine, embeddings, progress, *window.popleft())
    while window:
        yield _scored(engine, embeddings, progress, *window.popleft())


def _score_block(engine: Engine, embeddings: EmbeddingTable, block: Block) -> Task:
    usable = embeddings.usable(block.a, block.b)
    return engine.score(block.a[usable], block.b[usable])


def _scored(
    engine: Engine, embeddings: EmbeddingTable, progress: Progress, block: Block, task: Task
) -> tuple[Block, tuple[np.ndarray, np.ndarray]]:
    """The scores of a block; a worker that dies costs another try, pairs of vectors kill none by themselves."""
    reason = ""
    for _ in range(PAIR_TRIES):
        try:
            while not engine.wait([task], timeout=PATIENCE_SECONDS):
                progress.say(
                    f"no progress for {PATIENCE_SECONDS:g} s: waiting for the scores of {len(block.a):,} rows "
                    f"from {block.first + 1:,}"
                )
            done: PairScores = engine.result(task)
        except WorkerLostError as exc:
            reason = first_line(exc)
            log.warning("rows from %d are scored again: %s", block.first + 1, reason)
            task = _score_block(engine, embeddings, block)
        else:
            progress.measure(done)
            return block, (done.probability, done.similarity)
    raise BatchverifyError(
        f"rows from {block.first + 1}: {PAIR_TRIES} workers died while they were scored; the last: {reason}"
    )
