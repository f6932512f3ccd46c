"""Work in a thread beside: items made before they are wanted, or done with while the next are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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

    What raises there raises at the next call, or at the end. When the block itself raises, what waits is dropped.
    """

    def __enter__(self) -> Behind:
        self._pool, self._waiting = ThreadPoolExecutor(1, "behind"), deque[Future[None]]()
        return self

    def __call__(self, work: Callable[[], None]) -> None:
        """Hand over work; waits while there is enough to do."""
        while len(self._waiting) >= AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            for each in self._waiting:
                each.result()
