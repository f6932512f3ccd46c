"""Which image of a run has some bytes first: 22 to 28 bytes an image."""

from __future__ import annotations

import numpy as np

_KEPT = 16


class Owners:
    """Images by content key, one each. Of a key's 32 bytes 16 are kept, as in the cache's index.

    count: how many images there are.
    """

    def __init__(self, count: int) -> None:
        # Zeros that nothing was written to take no memory yet.
        self._keys = np.zeros((count, _KEPT), np.uint8)
        # By key, or at the next place that was free: 0 for none, k + 1 for image k, negative once it was dropped.
        size = 1 << (count + count // 2).bit_length()
        self._table = np.zeros(size, np.int32 if size < 1 << 31 else np.int64)

    def get(self, key: bytes) -> int:
        """The image that has this key, -1 for none."""
        return max(int(self._table[self._place(key)]), 0) - 1

    def put(self, key: bytes, index: int) -> None:
        """Let an image have a key that none has."""
        self._keys[index] = np.frombuffer(key, np.uint8, _KEPT)
        self._table[self._place(key)] = index + 1

    def drop(self, key: bytes) -> None:
        """Let no image have this key."""
        # Its place is not free: keys that came to stand behind it are still to be found.
        place = self._place(key)
        self._table[place] = -abs(self._table[place])

    def _place(self, key: bytes) -> int:
        """Where a key stands or would stand."""
        mask = len(self._table) - 1
        at = int.from_bytes(key[:8], "little") & mask
        while (number := abs(int(self._table[at]))) and self._keys[number - 1].tobytes() != key[:_KEPT]:
            at = (at + 1) & mask
        return at
