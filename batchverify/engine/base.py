"""What every engine provides, what its workers need, and how a machine is divided into workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from batchverify.engine.stages import LoadPlan
from batchverify.fingerprint import CHOSEN
from batchverify.records import Skipped
from batchverify.runtime.compute_path import ComputePath
from batchverify.runtime.devices import limit_torch, resolve_device

# Several workers beat one worker with all threads: their Python code between the layers overlaps.
MOST_WORKERS = 8
# Workers that share a GPU, each with its own stream: while one prepares or copies, another computes.
MOST_WORKERS_PER_GPU = 4
CPUS_PER_GPU_WORKER = 2
# Chunks that wait for a worker beyond the one it has: enough to keep it busy, few enough to bound memory.
QUEUED_PER_WORKER = 1
# Images that one task loads or embeds. GPU_CHUNK is the largest batch that the embedder tries on a GPU.
CPU_CHUNK = 128
GPU_CHUNK = 512


@dataclass(frozen=True)
class WorkPlan:
    """What a worker needs, in any process: paths and options, nothing large.

    backbone, weights, batch_size, device, runtime, dtype: see `Embedder`.
    """

    load: LoadPlan
    backbone: str
    weights: str | None = None
    device: str = "auto"
    runtime: str = "auto"
    batch_size: int | None = None
    dtype: str = "auto"

    def embedder(self, workers: int = 1, threads: int | None = None) -> Any:
        """Build the embedder. workers: threads that will call it; threads: CPUs for each of them."""
        from batchverify.embedding.embedder import Embedder

        return Embedder(
            self.backbone,
            **{name: getattr(self.load.settings, name) for name in CHOSEN},
            weights=self.weights,
            device=self.device,
            runtime=self.runtime,
            batch_size=self.batch_size,
            dtype=self.dtype,
            workers=workers,
            threads=threads,
        )


@dataclass(frozen=True)
class Workers:
    """How a machine is divided: `count` workers with `threads` threads each, and `loaders` that read and decode.

    chunk: the most images of a task.
    """

    count: int
    threads: int
    loaders: int
    chunk: int = CPU_CHUNK

    @classmethod
    def for_cpus(cls, cpus: int, gpus: int = 0) -> Workers:
        """Up to eight workers that share the CPUs, or up to four per GPU; the other CPUs then load."""
        if gpus:
            count = gpus * workers_per_gpu(cpus, gpus)
            return cls(count, 1, max(1, cpus - count), GPU_CHUNK)
        count = max(1, min(cpus, MOST_WORKERS))
        return cls(count, max(1, cpus // count), max(1, min(cpus, 2 * count)), CPU_CHUNK)


def workers_per_gpu(cpus: int, gpus: int) -> int:
    """How many workers share each GPU of a machine: as many as it has CPUs for, one to four."""
    return max(1, min(MOST_WORKERS_PER_GPU, cpus // (CPUS_PER_GPU_WORKER * gpus)))


class WorkerLostError(Exception):
    """A worker process died during this task; the scheduler finds out which image caused it."""


class NodeLostError(WorkerLostError):
    """A whole machine died during this task: the task is repeated, and its images are not blamed."""


@dataclass(eq=False)
class Task:
    """A running stage. handle: the engine's own. images: of a loaded chunk, or the engine's reference to them."""

    handle: Any
    images: Any = field(default=None, repr=False)


class Engine(Protocol):
    """Runs stages as tasks, which are submitted, waited for and asked for their results."""

    name: str

    @property
    def workers(self) -> Workers:
        """The workers available now; in a cluster nodes come and go."""

    def require_shared(self, output: str | None, image_paths: Sequence[str | Skipped]) -> None:
        """Raise `UsageError` if the machines do not all see the same cache, output folder and images."""

    def load(self, image_paths: Sequence[str]) -> Task:
        """Read, look up and decode images. Result: `LoadedChunk`."""

    def embed(self, loaded: Task, positions: Sequence[int], keys: Sequence[bytes]) -> Task:
        """Embed images of a finished load, given by their positions in it. Result: `EmbeddedChunk`."""

    def share(self, head: Any, vectors: Any) -> None:
        """Give all workers the head and the vectors of a table; comes before `score`."""

    def score(self, a: np.ndarray, b: np.ndarray) -> Task:
        """Score pairs of indices into the shared vectors. Result: `PairScores`."""

    def wait(self, tasks: Iterable[Task], timeout: float) -> list[Task]:
        """Wait until tasks are done and return them; empty after `timeout` seconds."""

    def result(self, task: Task) -> Any:
        """Wait for the result of a task. Raises `WorkerLostError` if its worker died."""

    def withdraw(self, task: Task) -> bool:
        """Cancel a task that has not started; False if it has, or if the engine cannot tell."""

    def kill(self, task: Task, work: str) -> None:
        """End a hanging task and its worker: `result` then raises `WorkerLostError`. work: named in messages."""

    def compute_paths(self) -> set[ComputePath]:
        """What computed the vectors: none if nothing was embedded, several if machines differ."""

    def close(self) -> None:
        """End everything that this engine started."""


def limit_threads(head: Any, threads: int) -> None:
    """Limit the CPUs of torch in the calling thread; heads that do not need torch use one anyway."""
    if head.needs_torch:
        limit_torch(threads)


def visible_gpus(device: str) -> int:
    """How many GPUs this process uses: at most one, since only Ray distributes work over several.

    Raises `UsageError` for a requested GPU that is absent.
    """
    if device == "cpu":
        return 0
    return int(resolve_device(device) != "cpu")
