"""Items made in a thread while those before them are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

# Items that are made beforehand.
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
