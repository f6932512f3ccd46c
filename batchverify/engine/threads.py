"""The engine that runs the stages in threads of this process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor
from concurrent.futures import wait as wait_futures
from functools import cached_property
from typing import Any

import numpy as np

from batchverify.cache.embedding_cache import KeyIndex
from batchverify.engine.base import Task, Workers, WorkPlan, limit_threads, visible_gpus
from batchverify.engine.stages import LoadedChunk, Loader, PairScores, embed_images, score_indices
from batchverify.errors import HungError
from batchverify.faces.detectors import loops_of
from batchverify.kernels.loops import prepare
from batchverify.records import Skipped
from batchverify.runtime.compute_path import ComputePath
from batchverify.runtime.devices import available_cpus

# A first chunk of so many images, of several hundred in all, is enough work for compiled loops. They start while the
# embedder is built.
MANY = 100


class LocalEngine:
    """Runs the stages in threads of this process: no start-up cost, but a crash of a decoder ends the run."""

    name = "local"

    def __init__(self, plan: WorkPlan, index: KeyIndex | None, workers: Workers | None = None) -> None:
        self.plan = plan
        self.workers = workers or Workers.for_cpus(available_cpus(), visible_gpus(plan.device))
        self._loader = Loader(plan.load, index)
        self._load_pool = ThreadPoolExecutor(self.workers.loaders, "load")
        self._work_pool = ThreadPoolExecutor(self.workers.count, "work")
        self._head: Any = None
        self._hung = False
        self._vectors: Any = np.zeros((0, 0), np.float16)
        self._used_embedder = False

    def require_shared(self, output: str | None, image_paths: Sequence[str | Skipped]) -> None:
        """See `Engine`; one machine always agrees with itself."""

    def load(self, image_paths: Sequence[str]) -> Task:
        """See `Engine`."""
        task = Task(None)
        task.handle = self._load_pool.submit(self._load, task, image_paths)
        return task

    def embed(self, loaded: Task, positions: Sequence[int], keys: Sequence[bytes]) -> Task:
        """See `Engine`."""
        images = [loaded.images[position] for position in positions]
        if not self._used_embedder:
            if len(images) >= MANY:
                prepare(*loops_of(self.plan.load.settings))
            # Built before the workers ask for it, so that they do not build it several times.
            self._used_embedder = self._embedder is not None
        view = self.plan.load.settings.view
        return Task(self._work_pool.submit(embed_images, self._embedder, images, keys, view))

    def share(self, head: Any, vectors: Any) -> None:
        """See `Engine`."""
        self._head, self._vectors = head, vectors

    def score(self, a: np.ndarray, b: np.ndarray) -> Task:
        """See `Engine`."""
        return Task(self._work_pool.submit(self._score, a, b))

    def wait(self, tasks: Iterable[Task], timeout: float) -> list[Task]:
        """See `Engine`."""
        by_future = {task.handle: task for task in tasks}
        done, _ = wait_futures(by_future, timeout, return_when=FIRST_COMPLETED)
        return [by_future[future] for future in done]

    def result(self, task: Task) -> Any:
        """See `Engine`."""
        return task.handle.result()

    def withdraw(self, task: Task) -> bool:
        """See `Engine`."""
        return bool(task.handle.cancel())

    def kill(self, task: Task, work: str) -> None:
        """See `Engine`; a thread cannot be ended, so the run ends."""
        self._hung = True
        raise HungError(f"no progress at {work}; with --engine ray the run survives that")

    def compute_paths(self) -> set[ComputePath]:
        """See `Engine`."""
        return {self._embedder.compute_path} if self._used_embedder else set()

    def close(self) -> None:
        """Wait for running tasks unless one hangs; drop waiting ones."""
        self._load_pool.shutdown(wait=not self._hung, cancel_futures=True)
        self._work_pool.shutdown(wait=not self._hung, cancel_futures=True)

    @cached_property
    def _embedder(self) -> Any:
        return self.plan.embedder(self.workers.count, self.workers.threads)

    def _load(self, task: Task, image_paths: Sequence[str]) -> LoadedChunk:
        loaded, task.images = self._loader(image_paths)
        return loaded

    def _score(self, a: np.ndarray, b: np.ndarray) -> PairScores:
        limit_threads(self._head, self.workers.threads)
        return score_indices(self._head, self._vectors, a, b)
