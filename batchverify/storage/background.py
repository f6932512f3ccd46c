"""Work in a thread beside: items made before they are wanted, or done with while the next are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from types import TracebackType
from typing import Any, TypeVar

# Items that are made beforehand, or wait to be done with.
AHEAD = 2
T = TypeVar("T")


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, made in a thread while those before them are used: Arrow parses without the GIL."""
    end: Any = object()
    with ThreadPoolExecutor(1, "ahead") as pool:
        coming = deque(pool.submit(next, items, end) for _ in range(AHEAD))
        while (item := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, items, end))
            yield item


class Behind:
    """Does one thing after the other in a thread, in order; at the end of the `with` block all is done.

    What raises there raises at the next call, or at the end, and nothing more is done. Where the block raises, what
    waits is dropped. In any case the thread is idle when the block has been left: Ctrl-C waits for that.
    """

    def __enter__(self) -> Behind:
        self._pool, self._waiting = ThreadPoolExecutor(1, "behind"), deque[Future[None]]()
        self._working, self._stopped = Lock(), False
        return self

    def __call__(self, work: Callable[[], None]) -> None:
        """Hand over work; waits while there is enough to do."""
        while len(self._waiting) >= AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._do, work))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while error is None and self._waiting:
                self._waiting.popleft().result()
        finally:
            self._stop()

    def _do(self, work: Callable[[], None]) -> None:
        with self._working:
            if self._stopped:
                return
            done = False
            try:
                work()
                done = True
            finally:
                self._stopped |= not done

    def _stop(self) -> None:
        """Begin nothing more, and see what is being done to its end, whoever presses Ctrl-C meanwhile."""
        self._stopped, interrupted = True, False
        while True:
            try:
                with self._working:
                    break
            except KeyboardInterrupt:
                interrupted = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        if interrupted:
            raise KeyboardInterrupt
