"""What an engine is: who runs the stages, and what every engine promises."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from batchverify.engine.stages import (
    LoadPlan,
)
from batchverify.records import Skipped
from batchverify.runtime.compute_path import ComputePath
from batchverify.runtime.devices import resolve_device

# Workers with one thread each beat one worker with all threads: the Python between the layers runs side by side.
MOST_WORKERS = 8
# Threads that share one GPU, each with a stream of its own: while one prepares or copies, another computes.
MOST_WORKERS_A_GPU = 4
# Chunks that wait for a worker beyond the one it has: enough to keep it busy, few enough to bound memory.
QUEUED_PER_WORKER = 1
# Images that are loaded, and embedded, as one task. A GPU's is the largest batch that the embedder tries.
CPU_CHUNK = 128
GPU_CHUNK = 512


@dataclass(frozen=True)
class WorkPlan:
    """What a worker needs, in any process: paths and options only, nothing large.

    backbone, weights, batch_size, device, runtime, dtype: as `Embedder` takes them.
    """

    load: LoadPlan
    backbone: str
    weights: str | None = None
    device: str = "auto"
    runtime: str = "auto"
    batch_size: int | None = None
    dtype: str = "auto"

    def embedder(self, workers: int = 1, threads: int | None = None) -> Any:
        """Build the embedder for so many threads that call it, each with so many CPUs."""
        from batchverify.embedding.embedder import Embedder

        settings = self.load.settings
        return Embedder(
            self.backbone,
            crop=settings.crop,
            margin=settings.margin,
            tta=settings.tta,
            face=settings.face,
            min_face=settings.min_face,
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
    """How a machine is cut up: `count` workers with `threads` threads each, `loaders` reading and decoding.

    chunk: the most images of a task.
    """

    count: int
    threads: int
    loaders: int
    chunk: int = CPU_CHUNK

    @classmethod
    def for_cpus(cls, cpus: int, gpus: int = 0) -> Workers:
        """Up to eight workers that share the CPUs, or up to four a GPU; with GPUs the other CPUs load."""
        if gpus:
            count = gpus * max(1, min(cpus // (2 * gpus), MOST_WORKERS_A_GPU))
            return cls(count, 1, max(1, cpus - count), GPU_CHUNK)
        count = max(1, min(cpus, MOST_WORKERS))
        return cls(count, max(1, cpus // count), max(1, min(cpus, 2 * count)))


class WorkerLostError(Exception):
    """A worker process died while it had this task; the scheduler finds out which image did it."""


class NodeLostError(WorkerLostError):
    """A whole machine died while it had this task: the task is done again, its images are innocent."""


@dataclass(eq=False)
class Task:
    """A stage at work. handle: the engine's own. images: where the images of a loaded chunk are."""

    handle: Any
    images: Any = field(default=None, repr=False)


class Engine(Protocol):
    """Runs stages somewhere. Jobs are submitted, waited for, and asked for their results."""

    name: str

    @property
    def workers(self) -> Workers:
        """What runs the tasks now; nodes of a cluster come and go."""

    def require_shared(self, output: str | None, image_paths: Sequence[str | Skipped]) -> None:
        """Raise `UsageError` where machines do not see the cache, the output's folder or the images alike."""

    def load(self, image_paths: Sequence[str]) -> Task:
        """Read, look up and decode images: the result is a `Loaded`."""

    def embed(self, loaded: Task, positions: Sequence[int], keys: Sequence[bytes]) -> Task:
        """Embed images of a finished load by their places among its images: a list of `Entry`."""

    def share(self, head: Any, vectors: np.ndarray) -> None:
        """Make the head and the (N, 512) float16 vectors known to all workers before pairs are scored."""

    def score(self, a: np.ndarray, b: np.ndarray) -> Task:
        """Score pairs of indices into the shared vectors: the result is `PairScores`."""

    def wait(self, tasks: Iterable[Task], timeout: float) -> list[Task]:
        """The tasks that are done; empty when `timeout` seconds pass first."""

    def result(self, task: Task) -> Any:
        """The result of a task, waiting for it; `WorkerLostError` when its worker died."""

    def withdraw(self, task: Task) -> bool:
        """Take back a task that has not begun; False where it has, or where that cannot be told."""

    def kill(self, task: Task, image: str) -> None:
        """End a task that hangs, with its worker: its result is then `WorkerLostError`. `image` is for messages."""

    def compute_paths(self) -> set[ComputePath]:
        """What computed the vectors; none when nothing was embedded, several where machines differ."""

    def close(self) -> None:
        """End everything that this engine started."""


def limit_threads(head: Any, threads: int) -> None:
    """Let the calling thread score with so many CPUs; heads that need no torch take one anyway."""
    if head.needs_torch:
        import torch

        torch.set_num_threads(threads)


def visible_gpus(device: str) -> int:
    """GPUs that this process may use: one at most, since all of them are Ray's to share out.

    Raises `UsageError` for one that is asked for and absent.
    """
    if device == "cpu":
        return 0
    return int(resolve_device(device) != "cpu")
