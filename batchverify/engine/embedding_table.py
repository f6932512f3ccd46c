"""The vectors and reasons of a run by image index, and which image has some bytes first."""

from __future__ import annotations

import os
from tempfile import NamedTemporaryFile, gettempdir

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.embedding.inception import DIMENSION
from batchverify.errors import BatchverifyError
from batchverify.records import Reason, Skipped

# From so many on vectors lie in a mapped file: two million images.
MAPPED_BYTES = 2 << 30
_REASONS = list(Reason)
_PENDING = -1
_OK = 0
_KEPT = 16


class EmbeddingTable:
    """Vectors and reasons of N images, 1 KB each.

    vectors: (N, 512) float16, rounded as the cache rounds them, zero where there is none; a file in `folder`
    mapped into memory where they are many, so that what does not fit in memory is paged out.
    codes: (N,) int8: 0 has a vector, k > 0 the k-th reason, -1 not known yet.
    """

    def __init__(self, count: int, folder: str | None = None) -> None:
        self.vectors = _vectors(count, folder)
        self.codes = np.full(count, _PENDING, np.int8)

    def put(self, index: int, vector: np.ndarray) -> None:
        """Store a (512,) float16 vector."""
        self.vectors[index] = vector
        self.codes[index] = _OK

    def fail(self, index: int, skipped: Skipped) -> None:
        """Store why an image has no vector."""
        self.codes[index] = _REASONS.index(skipped.reason) + 1

    def restore(self, indices: np.ndarray, reasons: pa.ChunkedArray | pa.Array) -> None:
        """Take over from finished rows why images have no vector. reasons: (N,) strings, null for none."""
        names = pa.array([reason.value for reason in _REASONS], pa.string())
        codes = pc.index_in(reasons, names).fill_null(-1).to_numpy() + 1
        failed = codes > 0
        self.codes[indices[failed]] = codes[failed]

    def known(self, index: int) -> bool:
        """Whether the fate of an image is known."""
        return bool(self.codes[index] != _PENDING)

    def require_complete(self, wanted: np.ndarray | None = None) -> None:
        """Raise `BatchverifyError` when an image was lost sight of: no row may pass for scored or failed.

        wanted: the indices that are needed, all by default.
        """
        codes = self.codes if wanted is None else self.codes[wanted]
        lost = int((codes == _PENDING).sum())
        if lost:
            raise BatchverifyError(f"{lost} images were lost sight of; please report this")

    def copy(self, source: int, index: int) -> None:
        """Give an image the result of another with the same bytes."""
        self.vectors[index] = self.vectors[source]
        self.codes[index] = self.codes[source]

    def usable(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Which pairs of (N,) indices have both vectors: (N,) bool."""
        return (self.codes[a] == _OK) & (self.codes[b] == _OK)

    def reasons(self, indices: np.ndarray) -> pa.Array:
        """The reason of each image, null where there is a vector: (N,) strings."""
        names = pa.array([None, *(reason.value for reason in _REASONS)], pa.string())
        return names.take(pa.array(self.codes[indices].astype(np.int8)))

    def failures(self) -> dict[str, int]:
        """How many images failed, by reason, those that occur."""
        counts = {reason.value: int((self.codes == at + 1).sum()) for at, reason in enumerate(_REASONS)}
        return {name: count for name, count in counts.items() if count}


def _vectors(count: int, folder: str | None) -> np.ndarray:
    """(N, 512) float16 zeros. Raises `BatchverifyError` where the disk has no room for them."""
    size = count * DIMENSION * 2
    if size <= MAPPED_BYTES:
        return np.zeros((count, DIMENSION), np.float16)
    try:
        with NamedTemporaryFile(prefix=".vectors.", suffix=".tmp", dir=folder) as file:
            # Reserved now: a disk that fills up under a mapped file would end the process without a word.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            # The name goes with the block, the room on the disk with the process, however that ends.
            return np.memmap(file, np.float16, "r+", shape=(count, DIMENSION)).view(np.ndarray)
    except OSError as exc:
        where = folder or gettempdir()
        raise BatchverifyError(f"{where}: no room for {size / 1e9:.1f} GB of vectors: {exc}") from exc


class ContentIndex:
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
