"""Which image of a run has some bytes first: 25 bytes an image."""

from __future__ import annotations

import numpy as np

from batchverify.slots import Slots

_KEPT = 16


class Owners:
    """Images by content key, one each. Of a key's 32 bytes 16 are kept, as in the cache's index."""

    def __init__(self, count: int) -> None:
        # Zeros that nothing was written to take no memory yet.
        self._keys = np.zeros((count, 2), np.int64)
        self._slots = Slots(lambda numbers: self._keys[numbers, 0])

    def get(self, key: bytes) -> int:
        """The image that has this key, -1 for none."""
        first, second = self._halves(key)
        keys = self._keys
        return self._slots.find_one(first, lambda at: keys[at, 0] == first and keys[at, 1] == second)

    def put(self, key: bytes, index: int) -> None:
        """Let an image have a key that none has."""
        self._keys[index] = self._halves(key)
        self._slots.add(self._keys[index : index + 1, 0], np.array([index]))

    def drop(self, key: bytes) -> None:
        """Let no image have this key."""
        # Its number stays in the table and stands for no key: none is all zeros.
        owner = self.get(key)
        if owner >= 0:
            self._keys[owner] = 0

    @staticmethod
    def _halves(key: bytes) -> tuple[int, int]:
        first, second = np.frombuffer(key[:_KEPT], "<i8").tolist()
        return first, second
