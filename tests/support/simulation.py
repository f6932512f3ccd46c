"""A cluster in one thread and virtual time, whose workers, nodes and calls fail by a seed.

`World` holds images and a cache, `Cluster` the machines, and `SimulatedEngine` is an `Engine` on them.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from itertools import count
from random import Random
from typing import Any

import numpy as np

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.segment import Entry
from batchverify.engine.base import NodeLostError, Task, WorkerLostError, Workers
from batchverify.engine.ray.engine import NODE_LOSSES
from batchverify.engine.stages import EmbeddedChunk, LoadedChunk, PairScores
from batchverify.errors import HungError
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.records import Reason, Skipped
from batchverify.runtime.compute_path import ComputePath

PATIENCE = 100.0
FOREVER = float("inf")
FINGERPRINT = EmbeddingFingerprint.of("51" * 32, EmbeddingSettings(crop="none"))
PATH = ComputePath("simulated")
Tell = Callable[[str], None]


class StuckError(Exception):
    """Nothing will ever happen again."""


class Kind(Enum):
    """What an image is, or what it does to the worker that has it."""

    GOOD = "good"
    REFUSED = "its path is forbidden"
    ABSENT = "no such file"
    TEXT = "no image"
    FACELESS = "no face"
    KILLS_LOADER = "kills the process that loads it"
    HANGS_LOADER = "hangs the process that loads it"
    KILLS_WORKER = "kills the worker that embeds it"
    HANGS_WORKER = "hangs the worker that embeds it"
    KILLS_NODE = "kills the node that embeds it"
    MOODY = "kills the worker that embeds it, every other time"


# What harmless images without a vector are given.
FAILURES = {
    Kind.REFUSED: Skipped(Reason.FORBIDDEN),
    Kind.ABSENT: Skipped(Reason.NOT_FOUND),
    Kind.TEXT: Skipped(Reason.UNDECODABLE),
    Kind.FACELESS: Skipped(Reason.NO_FACE),
}
HARMLESS = (Kind.GOOD, *FAILURES)
HARMFUL = [kind for kind in Kind if kind not in HARMLESS]
CULPRITS = {
    ("load", Kind.KILLS_LOADER): "die",
    ("load", Kind.HANGS_LOADER): "hang",
    ("embed", Kind.KILLS_WORKER): "die",
    ("embed", Kind.HANGS_WORKER): "hang",
    ("embed", Kind.KILLS_NODE): "node",
}


@dataclass(frozen=True)
class Content:
    """The bytes of one or several images."""

    number: int
    kind: Kind

    @property
    def key(self) -> bytes:
        """Its cache key. Many keys begin alike, so that they meet in the run's hash table."""
        return b"%08d%08d%016d" % (self.number % 8, self.number, 0)

    def entry(self, key: bytes) -> Entry:
        """What the embedder makes of it for a caller who says that this is its key."""
        skipped = FAILURES.get(self.kind)
        return Entry(key, None if skipped else vector(self.number), skipped=skipped)


@cache
def vector(number: int) -> np.ndarray:
    """(512,) float16, another one for each number."""
    return np.full(512, number + 1, np.float16)


def scores(head: Any, vectors: np.ndarray, a: np.ndarray, b: np.ndarray) -> PairScores:
    """What `score_indices` returns. head: a function."""
    probability, similarity = head(vectors, a, b)
    return PairScores(probability, similarity, {})


class World:
    """Images, and a cache that outlives runs. Image k has path `str(k)` and the bytes `contents[k]`."""

    def __init__(self, rng: Random, *, harmless: bool = False) -> None:
        self.contents: list[Content] = []
        self.committed: dict[bytes, Entry] = {}
        harm = 0.0 if harmless else rng.choice([0.0, 0.05, 0.2])
        for number in range(rng.choice([1, 3, 8, 16, 24, 40])):
            if self.contents and rng.random() < 0.15:
                self.contents.append(rng.choice(self.contents))
            else:
                kinds = HARMFUL if rng.random() < harm else [Kind.GOOD] * 12 + [*HARMLESS]
                self.contents.append(Content(number, rng.choice(kinds)))
        self.image_paths: list[str | Skipped] = [
            FAILURES[Kind.REFUSED] if content.kind is Kind.REFUSED else str(number)
            for number, content in enumerate(self.contents)
        ]

    def commit(self, entries: Iterable[Entry]) -> None:
        """What a cache of this world writes; each key once."""
        for entry in entries:
            assert entry.key not in self.committed, f"{entry.key!r} is committed twice"
            self.committed[entry.key] = entry


class MemoryCache(EmbeddingCache):
    """The cache with its segments in a world. before_write: may fail or press Ctrl-C."""

    def __init__(self, world: World, commit_rows: int, before_write: Callable[[], None]) -> None:
        super().__init__("/simulated", FINGERPRINT, commit_rows=commit_rows)
        self._world, self._before_write = world, before_write

    def _write(self, entries: Sequence[Entry]) -> None:
        self._before_write()
        self._world.commit(entries)


@dataclass(eq=False)
class Node:
    """A machine of the cluster."""

    number: int
    alive: bool = True


@dataclass(eq=False)
class Worker:
    """A process that takes its calls one after the other."""

    node: Node
    calls: deque[Call] = field(default_factory=deque)
    alive: bool = True


@dataclass(eq=False)
class Call:
    """What runs, or waits to run, in the cluster.

    images: their numbers, none for pairs. source: the call that loaded them. lost: "worker" or "node".
    """

    stage: str
    images: list[int]
    answer: Callable[[], Any]
    node: Node
    worker: Worker | None = None
    source: Call | None = None
    begun: float | None = None
    outcome: Any = None
    done: bool = False
    killed: bool = False
    lost: str = ""


class Cluster:
    """Nodes with workers, and processes that load. All of them die, hang and are late.

    If a worker dies, the calls in its queue are lost with it, and its node starts another one. If the last node dies,
    another one joins. A killed call may have answered just before.

    calm: no call is late or hangs unless its images make it. tell: is given a line for every event.
    busy, starting: seconds of the calls that were not killed, and of starts. killed: how many were. joined: nodes.
    faults: those that no image caused.
    """

    def __init__(
        self,
        world: World,
        rng: Random,
        *,
        nodes: int,
        size: int,
        calm: bool = False,
        tell: Tell | None = None,
    ) -> None:
        self.world, self.size, self.now = world, size, 0.0
        self.busy = self.starting = 0.0
        self.faults = self.killed = self.joined = 0
        self.nodes: list[Node] = []
        # The nodes that live, and their workers that have started.
        self.alive: list[Node] = []
        self.ready: list[Worker] = []
        self.known = dict(world.committed)
        self._rng, self._calm, self._tell = rng, calm, tell
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._open: dict[Call, None] = {}
        self._hangs = 0
        for _ in range(nodes):
            self.join()

    # Time.

    def next_event(self, deadline: float = FOREVER) -> bool:
        """Let the next event happen; if there is none before the deadline, False, and that is the time."""
        if not self._events or self._events[0][0] > deadline:
            self.now = self.now if deadline == FOREVER else deadline
            return False
        self.now, _, event = heapq.heappop(self._events)
        event()
        return True

    def until(self, happened: Callable[[], Any], deadline: float = FOREVER) -> None:
        """Let time pass until something happened. Raises `StuckError` if it never will."""
        while not happened():
            if not self.next_event(deadline):
                if deadline == FOREVER:
                    raise StuckError
                return

    def say(self, line: str) -> None:
        """Tell an event."""
        if self._tell is not None:
            self._tell(f"{self.now:8.1f}  {line}")

    def storm(self, faults: int, *, only_hangs: bool = False) -> None:
        """Let faults that no image causes happen soon, at random times."""
        self.faults += faults
        kinds = [
            self._any_worker_dies,
            self._any_load_dies,
            self._any_node_dies,
            self._next_call_hangs,
            self.join,
        ]
        for _ in range(faults):
            fault = self._next_call_hangs if only_hangs else self._rng.choice(kinds)
            self._after(self._rng.uniform(0, 60), fault)

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), event))

    # Machines.

    def join(self) -> None:
        """A node joins; its workers start."""
        node = Node(len(self.nodes))
        self.nodes.append(node)
        self.alive.append(node)
        self.joined += 1
        self.say(f"node {node.number} joins")
        for _ in range(self.size):
            self.start(node)

    def start(self, node: Node) -> Worker:
        """Start a worker."""
        worker, seconds = Worker(node), self._rng.uniform(0.1, 5)
        self.starting += seconds
        self._after(seconds, lambda: self.ready.append(worker) if worker.alive and node.alive else None)
        return worker

    def kill_worker(self, worker: Worker) -> None:
        """A worker dies."""
        if not worker.alive or not worker.node.alive:
            return
        self.say(f"a worker of node {worker.node.number} dies")
        worker.alive = False
        self.ready = [other for other in self.ready if other is not worker]
        self.start(worker.node)
        self._lose([*worker.calls], "worker")

    def kill_node(self, node: Node) -> None:
        """A node dies."""
        if not node.alive:
            return
        self.say(f"node {node.number} dies")
        node.alive = False
        self.alive.remove(node)
        self.ready = [worker for worker in self.ready if worker.node is not node]
        if not self.alive:
            self.starting += 20
            self._after(20, self.join)
        self._lose([call for call in self._open if call.node is node], "node")

    def _any_worker_dies(self) -> None:
        if self.ready:
            self.kill_worker(self._rng.choice(self.ready))

    def _any_load_dies(self) -> None:
        if loads := [call for call in self._open if call.stage == "load"]:
            self._lose([self._rng.choice(loads)], "worker")

    def _any_node_dies(self) -> None:
        if self.alive:
            self.kill_node(self._rng.choice(self.alive))

    def _next_call_hangs(self) -> None:
        self._hangs += 1

    # Calls.

    def load(self, node: Node, numbers: list[int]) -> tuple[Call, list[int]]:
        """Load images in a process of its own; also returns the list of those that will be decoded."""
        decoded: list[int] = []
        call = Call("load", numbers, lambda: self._loaded(numbers, decoded), node)
        self._open[call] = None
        self._begin(call)
        return call, decoded

    def embed(self, worker: Worker, source: Call, numbers: list[int], keys: Sequence[bytes]) -> Call:
        """Embed images that were loaded by `source`."""
        call = Call("embed", numbers, lambda: self._embedded(numbers, keys), worker.node, worker, source)
        return self._queue(call, worker)

    def score(self, worker: Worker, answer: Callable[[], PairScores]) -> Call:
        """Score pairs."""
        return self._queue(Call("score", [], answer, worker.node, worker), worker)

    def kill(self, call: Call) -> None:
        """End a call, with its worker and what waits for it."""
        if call.done:
            return
        self.killed += 1
        call.killed = True
        self.say(f"killed: {call.stage} {call.images}")
        if self._culprit(call) is None and self._rng.random() < 0.2:
            self._answer(call)
        if call.worker is not None:
            self.kill_worker(call.worker)
        elif not call.done:
            self._lose([call], "worker")

    def withdraw(self, call: Call) -> bool:
        """Forget a call that waits."""
        if call.done or call.worker is None or call.worker.calls[0] is call:
            return False
        self._end(call, None)
        call.worker.calls.remove(call)
        return True

    def _queue(self, call: Call, worker: Worker) -> Call:
        self._open[call] = None
        worker.calls.append(call)
        if len(worker.calls) == 1:
            self._begin(call)
        return call

    def _begin(self, call: Call) -> None:
        fate, call.begun = self._culprit(call), self.now
        if fate is None and self._hangs:
            self._hangs -= 1
            fate = "hang"
        self.say(f"begins: {call.stage} {call.images} {fate or ''}")
        if fate == "hang":
            return
        seconds = self._rng.uniform(1, 10)
        if not self._calm and self._rng.random() < 0.02:
            self.faults += 1
            seconds = self._rng.uniform(0.5, 3) * PATIENCE
        self._after(seconds, lambda: self._happen(call, fate))

    def _culprit(self, call: Call) -> str | None:
        """What the images of a call do to it."""
        for number in call.images:
            kind = self.world.contents[number].kind
            if fate := CULPRITS.get((call.stage, kind)):
                return fate
            if call.stage == "embed" and kind is Kind.MOODY and self._rng.random() < 0.5:
                return "die"
        return None

    def _happen(self, call: Call, fate: str | None) -> None:
        if call.done:
            return
        if fate == "node":
            self.kill_node(call.node)
        elif fate == "die" and call.worker is not None:
            self.kill_worker(call.worker)
        elif fate == "die":
            self._lose([call], "worker")
        elif call.source is not None and not call.source.node.alive:
            # The decoded images lay on a node that is gone.
            self._lose([call], "node")
            self._go_on(call)
        else:
            self._answer(call)

    def _answer(self, call: Call) -> None:
        self._end(call, call.answer())
        self._go_on(call)

    def _go_on(self, call: Call) -> None:
        """The worker of a call that ended begins the next one."""
        if call.worker is not None:
            begins = call.worker.calls[0] is call and len(call.worker.calls) > 1
            call.worker.calls.remove(call)
            if begins:
                self._begin(call.worker.calls[0])

    def _lose(self, calls: list[Call], what: str) -> None:
        for call in calls:
            call.lost = what
            self._end(call, None)

    def _end(self, call: Call, outcome: Any) -> None:
        self.say(f"ends: {call.stage} {call.images} {call.lost and 'lost with its ' + call.lost}")
        call.done, call.outcome = True, outcome
        self.busy += self.now - call.begun if call.begun is not None and not call.killed else 0
        del self._open[call]

    def _loaded(self, numbers: list[int], decoded: list[int]) -> LoadedChunk:
        """What `Loader` returns: all images, or those before a cut."""
        chunk = LoadedChunk()
        if self._rng.random() < 0.1:
            numbers = numbers[: self._rng.randint(1, len(numbers))]
        for position, number in enumerate(numbers):
            content = self.world.contents[number]
            key = None if content.kind is Kind.ABSENT else content.key
            repeated = key is not None and key in chunk.keys
            chunk.keys.append(key)
            if key in self.known:
                chunk.cached[position] = self.known[key]
            elif content.kind in (Kind.ABSENT, Kind.TEXT) and not repeated:
                chunk.skipped[position] = FAILURES[content.kind]
            elif not repeated:
                chunk.missing.append(position)
                decoded.append(number)
        return chunk

    def _embedded(self, numbers: list[int], keys: Sequence[bytes]) -> EmbeddedChunk:
        """What `embed_images` returns."""
        contents = (self.world.contents[number] for number in numbers)
        return EmbeddedChunk([content.entry(key) for content, key in zip(contents, keys, strict=True)], PATH, {})


class SimulatedEngine:
    """An `Engine` on a cluster.

    If an image was lost with more than `NODE_LOSSES` nodes, that is reported as the loss of a worker, as on Ray.
    threads: nothing can be killed, as in the engine of threads. chunk: the most images of a call.
    """

    name = "simulated"

    def __init__(self, cluster: Cluster, rng: Random, *, chunk: int, threads: bool = False) -> None:
        self.cluster = cluster
        self._rng, self._chunk, self._threads = rng, chunk, threads
        self._node_losses: Counter[Any] = Counter()
        self._embedded = False

    @property
    def workers(self) -> Workers:
        """See `Engine`; those that are expected while none is ready."""
        nodes = len(self.cluster.alive)
        expected = nodes * self.cluster.size
        return Workers(len(self.cluster.ready) or expected or 1, 1, 2 * nodes or 1, self._chunk)

    def require_shared(self, output: str | None, image_paths: Sequence[str | Skipped]) -> None:
        """See `Engine`; nothing is on disks."""

    def load(self, image_paths: Sequence[str]) -> Task:
        """See `Engine`."""
        self.cluster.until(lambda: self.cluster.alive)
        node = self._rng.choice(self.cluster.alive)
        return Task(*self.cluster.load(node, [int(path) for path in image_paths]))

    def embed(self, loaded: Task, positions: Sequence[int], keys: Sequence[bytes]) -> Task:
        """See `Engine`."""
        numbers = [loaded.images[position] for position in positions]
        return Task(self.cluster.embed(self._idlest(), loaded.handle, numbers, keys))

    def share(self, head: Any, vectors: np.ndarray) -> None:
        """See `Engine`."""
        self._head, self._vectors = head, vectors

    def score(self, a: np.ndarray, b: np.ndarray) -> Task:
        """See `Engine`."""
        return Task(self.cluster.score(self._idlest(), lambda: scores(self._head, self._vectors, a, b)))

    def wait(self, tasks: Iterable[Task], timeout: float) -> list[Task]:
        """See `Engine`: all that ended, in any order, or one of them."""
        tasks = list(tasks)
        self.cluster.until(lambda: any(task.handle.done for task in tasks), self.cluster.now + timeout)
        done = [task for task in tasks if task.handle.done]
        self._rng.shuffle(done)
        return done[: 1 if self._rng.random() < 0.5 else None]

    def result(self, task: Task) -> Any:
        """See `Engine`."""
        call: Call = task.handle
        self.cluster.until(lambda: call.done)
        if not call.lost:
            self._embedded |= call.stage == "embed"
            return call.outcome
        if call.lost == "node":
            self._node_losses.update(call.images)
            if all(self._node_losses[image] <= NODE_LOSSES for image in call.images):
                raise NodeLostError("a node died")
        raise WorkerLostError("a worker died")

    def withdraw(self, task: Task) -> bool:
        """See `Engine`; not always possible."""
        return self._rng.random() < 0.5 and self.cluster.withdraw(task.handle)

    def kill(self, task: Task, work: str) -> None:
        """See `Engine`."""
        if self._threads:
            raise HungError(f"no progress at {work}")
        self.cluster.kill(task.handle)

    def compute_paths(self) -> set[ComputePath]:
        """See `Engine`."""
        return {PATH} if self._embedded else set()

    def close(self) -> None:
        """See `Engine`."""

    def _idlest(self) -> Worker:
        self.cluster.until(lambda: self.cluster.ready)
        return min(self.cluster.ready, key=lambda worker: len(worker.calls))
