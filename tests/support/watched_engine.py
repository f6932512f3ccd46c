"""An engine around another one that checks at each call what no scheduler may do, and presses Ctrl-C."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from simulation import Cluster, StuckError

from batchverify.engine.base import Engine, NodeLostError, Task, WorkerLostError, Workers
from batchverify.engine.embedding_table import EmbeddingTable
from batchverify.engine.scheduler import SILENCES, STRIKES
from batchverify.engine.stages import EmbeddedChunk, LoadedChunk
from batchverify.errors import HungError
from batchverify.records import Skipped
from batchverify.runtime.compute_path import ComputePath


class BrokenPromiseError(AssertionError):
    """The scheduler did what it never should."""


def require(kept: bool, promise: str) -> None:
    """Raise `BrokenPromiseError` unless a promise is kept."""
    if not kept:
        raise BrokenPromiseError(promise)


@dataclass(eq=False)
class Request:
    """A task whose result nobody has yet. who: image numbers, or the pairs. alone: nothing was ever beside it."""

    stage: str
    who: tuple[int, ...]
    keys: Sequence[bytes] = ()
    alone: bool = True


class WatchedEngine:
    """An `Engine` that passes calls on to `inner`, and raises `BrokenPromiseError` for those that should not be.

    By image number: loads, cuts (its chunk was cut short before it), load_losses, worker_losses (with blame),
    alone_losses (with blame, and nothing else ran). By key: embeds, embed_losses. By pairs: scores, score_losses.
    delivered: the keys of embedded images that were handed over. interrupted: the step at which Ctrl-C was pressed.

    wanted: the images of the run. table: its embeddings. interrupt: the number of the step at which to press Ctrl-C.
    """

    name = "watched"

    def __init__(self, inner: Engine, cluster: Cluster, wanted: Sequence[int], interrupt: int | None = None) -> None:
        self.inner, self.cluster, self.table = inner, cluster, EmbeddingTable(0)
        self.loads, self.cuts, self.load_losses = Counter[int](), Counter[int](), Counter[int]()
        self.worker_losses, self.alone_losses = Counter[int](), Counter[int]()
        self.embeds, self.embed_losses = Counter[bytes](), Counter[bytes]()
        self.scores, self.score_losses = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
        self.delivered: set[bytes] = set()
        self.interrupted, self.twice, self.hung = "", False, False
        self.pending: dict[Task, Request] = {}
        # The decoded images of each load, by key.
        self._loaded: dict[Task, dict[bytes, int]] = {}
        self._loadable = sum(isinstance(cluster.world.image_paths[number], str) for number in wanted)
        # Keys of images that were decoded and not embedded since.
        self._decoded: set[bytes] = set()
        self._steps, self._silences, self.interrupt = 0, 0, interrupt
        self._offered = self._most = inner.workers

    @property
    def workers(self) -> Workers:
        """See `Engine`."""
        return self.inner.workers

    def step(self, what: str) -> None:
        """A moment at which Ctrl-C may be pressed."""
        self._steps += 1
        if self._steps == self.interrupt:
            self.interrupted = what
            self.cluster.say(f"Ctrl-C: {what}")
            raise KeyboardInterrupt

    def require_shared(self, output: str | None, image_paths: Sequence[str | Skipped]) -> None:
        """See `Engine`."""
        self.inner.require_shared(output, image_paths)

    def load(self, image_paths: Sequence[str]) -> Task:
        """Images that are nowhere else and have no fate yet, not too many."""
        self.step("load")
        numbers = tuple(int(path) for path in image_paths)
        pending = {number for request in self.pending.values() for number in request.who}
        require(0 < len(numbers) <= self.workers.chunk, f"a chunk of {len(numbers)}")
        most = math.ceil(math.log2(self.workers.chunk)) + 1 + STRIKES
        for number in numbers:
            require(self.worker_losses[number] < most, f"image {number} lost {most} workers and is tried again")
            require(number not in pending, f"image {number} is in two calls at once")
            require(not self.table.known(number), f"image {number} has a fate already")
        self._check_suspects(numbers)
        self.loads.update(numbers)
        return self._taken(self.inner.load(image_paths), Request("load", numbers))

    def embed(self, loaded: Task, positions: Sequence[int], keys: Sequence[bytes]) -> Task:
        """Contents that are not in the cache, not embedded, and nowhere else."""
        self.step("embed")
        numbers = tuple(self._loaded[loaded][key] for key in keys)
        require(bool(numbers), "nothing to embed")
        for key in keys:
            require(key not in self.cluster.known, f"{key!r} is cached and embedded again")
            require(self.embeds[key] == self.embed_losses[key], f"{key!r} is embedded twice")
        self._check_suspects(numbers)
        self.embeds.update(keys)
        self._decoded -= set(keys)
        return self._taken(self.inner.embed(loaded, positions, keys), Request("embed", numbers, keys))

    def share(self, head: Any, vectors: np.ndarray) -> None:
        """See `Engine`."""
        self.inner.share(head, vectors)

    def score(self, a: np.ndarray, b: np.ndarray) -> Task:
        """Blocks of pairs, not too many at once."""
        pairs = (*a.tolist(), -1, *b.tolist())
        self.scores[pairs] += 1
        return self._taken(self.inner.score(a, b), Request("score", pairs))

    def wait(self, tasks: Iterable[Task], timeout: float) -> list[Task]:
        """While no worker is idle that could do something."""
        self.step("wait")
        tasks = list(tasks)
        require(bool(tasks), "waits for nothing")
        self._check_idle()
        done = self.inner.wait(tasks, timeout)
        self._silences = 0 if done else self._silences + 1
        require(self._silences < 50, "waits for ever")
        self._offered = now = self.workers
        self._most = Workers(max(self._most.count, now.count), 1, max(self._most.loaders, now.loaders))
        return done

    def result(self, task: Task) -> Any:
        """Once, unless Ctrl-C came in between."""
        self.step("result")
        require(bool(self.interrupted) or task in self.pending, "a result is asked for twice")
        try:
            value = self.inner.result(task)
        except StuckError:
            require(bool(self.interrupted), "waits for a call that hangs")
            self.twice = True
            raise KeyboardInterrupt from None
        except WorkerLostError as exc:
            self._lost(self.pending.pop(task), blamed=not isinstance(exc, NodeLostError))
            raise
        self._see(task, value)
        self.step("result taken")
        self.pending.pop(task, None)
        if isinstance(value, EmbeddedChunk):
            self.delivered.update(entry.key for entry in value.entries)
        return value

    def withdraw(self, task: Task) -> bool:
        """See `Engine`."""
        withdrawn = self.inner.withdraw(task)
        if withdrawn:
            del self.pending[task]
        return withdrawn

    def kill(self, task: Task, work: str) -> None:
        """Only after enough silence."""
        require(self._silences >= SILENCES, "a call is killed too early")
        try:
            self.inner.kill(task, work)
        except HungError:
            self.hung = True
            raise

    def compute_paths(self) -> set[ComputePath]:
        """See `Engine`."""
        return self.inner.compute_paths()

    def close(self) -> None:
        """See `Engine`."""
        self.inner.close()

    def _taken(self, task: Task, request: Request) -> Task:
        self.step("begun")
        for other in self.pending.values():
            other.alone = request.alone = False
        self.pending[task] = request
        return task

    def _see(self, task: Task, value: Any) -> None:
        """Note what was loaded."""
        if not isinstance(value, LoadedChunk) or task not in self.pending:
            return
        who = self.pending[task].who
        self.cuts.update(who[len(value.keys) :])
        decoded = {value.keys[position] or b"": who[position] for position in value.missing}
        self._loaded[task] = decoded
        self._decoded |= {key for key in decoded if self.embeds[key] == self.embed_losses[key]}

    def _lost(self, request: Request, *, blamed: bool) -> None:
        if request.stage == "score":
            self.score_losses[request.who] += 1
            return
        if request.stage == "load":
            self.load_losses.update(request.who)
        self.embed_losses.update(request.keys)
        if blamed:
            self.worker_losses.update(request.who)
            if request.alone and len(request.who) == 1:
                self.alone_losses.update(request.who)

    def _check_suspects(self, numbers: Sequence[int]) -> None:
        """An image that lost its worker runs beside no image that did not."""
        losses = self.worker_losses
        if any(losses[number] for number in numbers):
            for request in self.pending.values():
                beside = all(losses[number] for number in request.who)
                require(beside, f"suspects among {numbers} run beside {request.who}")

    def _check_idle(self) -> None:
        """Nothing waits that a free worker could do, and no more is begun than the workers need."""
        now, before, most = self.workers, self._offered, self._most
        stages = [request.stage for request in self.pending.values()]
        loads, embeds = stages.count("load"), stages.count("embed")
        require(loads <= max(most.loaders, now.loaders), f"{loads} chunks are loaded at once")
        require(embeds <= 2 * max(most.count, now.count), f"{embeds} chunks are embedded at once")
        if "score" in stages:
            return
        if self._decoded:
            require(embeds >= min(now.count, before.count), "loaded images wait beside an idle worker")
        elif len(self.loads) < self._loadable:
            require(loads >= min(now.loaders, before.loaders), "images wait beside an idle loader")
