"""An open-addressing hash table of numbers: 7 to 13 bytes each, millions added in one call."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Fuller tables make long searches, emptier ones cost memory.
_FULL = 0.6
_SMALLEST = 1024
# Numbers put in at a time when the table grows: bounds the memory of doing so.
_AT_ONCE = 1 << 20


class Slots:
    """Numbers by 64-bit hash. What the numbers stand for, and its equality, is the caller's.

    hashes_of: the (N,) int64 hashes of (N,) numbers that were added. table: (2^k,) numbers, -1 where there is none;
    a number stands at its hash's last k bits or, where others were first, at the next place that was free.
    """

    def __init__(self, hashes_of: Callable[[np.ndarray], np.ndarray]) -> None:
        self._hashes_of = hashes_of
        self.table = np.full(_SMALLEST, -1, np.int32)
        self._count = 0

    def find_one(self, value: int, same: Callable[[int], bool]) -> int:
        """The number of one hash, -1 where there is none; `same` is asked about a number."""
        mask = len(self.table) - 1
        at = value & mask
        while (number := int(self.table[at])) >= 0 and not same(number):
            at = (at + 1) & mask
        return number

    def add(self, hashes: np.ndarray, numbers: np.ndarray) -> None:
        """Put in (N,) numbers of things that are not there yet, all different."""
        if self._count + len(numbers) > len(self.table) * _FULL:
            self._grow(self._count + len(numbers))
        self._put(hashes, numbers)

    def _grow(self, count: int) -> None:
        old = self.table[self.table >= 0]
        size = len(self.table)
        while count > size * _FULL / 1.5:
            size *= 2
        self.table = np.full(size, -1, np.int32 if size < 1 << 31 else np.int64)
        self._count = 0
        for start in range(0, len(old), _AT_ONCE):
            some = old[start : start + _AT_ONCE]
            self._put(self._hashes_of(some), some)

    def _put(self, hashes: np.ndarray, numbers: np.ndarray) -> None:
        self._count += len(numbers)
        mask = len(self.table) - 1
        at = hashes & mask
        while len(numbers):
            free = self.table[at] < 0
            # Of several that want one slot the last gets it; the others see that and go on.
            self.table[at[free]] = numbers[free]
            lost = self.table[at] != numbers
            at, numbers = (at[lost] + 1) & mask, numbers[lost]
