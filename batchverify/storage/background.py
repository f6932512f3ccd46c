"""Background threads: items prefetched before they are needed, and work done in order beside the main thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from types import TracebackType
from typing import Any, TypeVar

# Items prefetched, and tasks that may wait.
QUEUE_LENGTH = 2
T = TypeVar("T")


def prefetch(items: Iterator[T], ahead: int = QUEUE_LENGTH) -> Iterator[T]:
    """The items, made in a thread while earlier ones are used: Arrow parses without the GIL.

    ahead: the most items that wait.
    """
    end: Any = object()
    with ThreadPoolExecutor(1, "prefetch") as pool:
        pending = deque(pool.submit(next, items, end) for _ in range(ahead))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item


class BackgroundWorker:
    """Runs tasks in a thread, in order; when the `with` block ends, all are done.

    A task's exception is raised at a later call or at the end of the block, and no further task is run. If the
    block raises, waiting tasks are dropped. In any case the thread is idle afterwards: Ctrl-C waits for that.
    """

    def __enter__(self) -> BackgroundWorker:
        self._pool, self._pending = ThreadPoolExecutor(1, "worker"), deque[Future[None]]()
        self._busy, self._stopped = Lock(), False
        return self

    def __call__(self, task: Callable[[], None]) -> None:
        """Hand over a task; waits while the queue is full."""
        while len(self._pending) >= QUEUE_LENGTH:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._run, task))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while error is None and self._pending:
                self._pending.popleft().result()
        finally:
            self._stop()

    def _run(self, task: Callable[[], None]) -> None:
        with self._busy:
            if self._stopped:
                return
            try:
                task()
            except BaseException:
                self._stopped = True
                raise

    def _stop(self) -> None:
        """Start no further task and wait for the running one, even if Ctrl-C is pressed meanwhile."""
        self._stopped, interrupted = True, False
        while True:
            try:
                with self._busy:
                    break
            except KeyboardInterrupt:
                interrupted = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        if interrupted:
            raise KeyboardInterrupt
