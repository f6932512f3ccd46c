"""The vectors and reasons of a run by image index, and the index of images by content."""

from __future__ import annotations

import math
import os
from tempfile import TemporaryFile, gettempdir

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.cache.segment import Entry
from batchverify.errors import BatchverifyError
from batchverify.fingerprint import DIMENSION
from batchverify.records import Reason, Skipped

# More bytes of vectors, those of two million images with 512 numbers each, lie in a mapped file.
MAPPED_BYTES = 2 << 30
_REASONS = list(Reason)
_REASON_NAMES = [reason.value for reason in _REASONS]
_PENDING = -1
_OK = 0
# Bytes that are stored of a key.
_KEY_BYTES = 16
# What a table keeps of each face under `--details`, 72 bytes; see `Entry`. Without a detector only the sharpness
# means something, and the confidence is NaN.
DETAILS = np.dtype(
    [
        ("box", np.float32, 4),
        ("landmarks", np.float32, 10),
        ("confidence", np.float32),
        ("faces", np.float32),
        ("rotation", np.float32),
        ("sharpness", np.float32),
    ]
)


class EmbeddingTable:
    """Vectors and reasons of N images, two bytes a number: 1 KB each with 512.

    vectors: (N, dimension) float16, rounded as in the cache, zero where there is none. Many of them lie in a file in
    `folder` that is mapped into memory, so that the system can page them out.
    codes: (N,) int8: 0 for a vector, k > 0 for the k-th reason, -1 for not known yet.
    keys: (N,) uint64, the start of each image's content key, 0 where it was not read; empty unless `keyed`.
    mapped_bytes: see `MAPPED_BYTES`. details: (N,) of type `DETAILS`, zero where there is no vector; None if they are
    not kept.
    """

    def __init__(
        self,
        count: int,
        folder: str | None = None,
        *,
        dimension: int = DIMENSION,
        mapped_bytes: int = MAPPED_BYTES,
        keyed: bool = False,
        details: bool = False,
    ) -> None:
        self.vectors = _zeros((count, dimension), np.dtype(np.float16), folder, mapped_bytes)
        self.details = _zeros((count,), DETAILS, folder, mapped_bytes) if details else None
        self.codes = np.full(count, _PENDING, np.int8)
        self.keys = np.zeros(count if keyed else 0, np.uint64)

    def see(self, index: int, key: bytes) -> None:
        """Note the content of an image."""
        if len(self.keys):
            self.keys[index] = int.from_bytes(key[:8], "little")

    def put(self, index: int, vector: np.ndarray) -> None:
        """Store a (dimension,) float16 vector."""
        self.vectors[index] = vector
        self.codes[index] = _OK

    def describe(self, index: int, entry: Entry) -> None:
        """Store the details of a face, if they are kept."""
        if self.details is not None:
            self.details[index] = tuple(getattr(entry, name) for name in DETAILS.names or ())

    def fail(self, index: int, skipped: Skipped) -> None:
        """Store the reason why an image has no vector."""
        self.codes[index] = _REASONS.index(skipped.reason) + 1

    def restore(self, indices: np.ndarray, reasons: pa.ChunkedArray | pa.Array) -> None:
        """Store the failures of rows from an earlier run. reasons: (N,) strings, null for none."""
        codes = pc.index_in(reasons, pa.array(_REASON_NAMES, pa.string())).fill_null(-1).to_numpy() + 1
        failed = codes > 0
        self.codes[indices[failed]] = codes[failed]

    def known(self, index: int) -> bool:
        """Whether an image has a vector or a reason."""
        return bool(self.codes[index] != _PENDING)

    def require_complete(self, wanted: np.ndarray | None = None) -> None:
        """Raise `BatchverifyError` if an image has neither a vector nor a reason.

        wanted: the indices of the images that are needed, by default all.
        """
        codes = self.codes if wanted is None else self.codes[wanted]
        lost = int((codes == _PENDING).sum())
        if lost:
            raise BatchverifyError(f"{lost} images have neither a vector nor a reason; please report this")

    def unknown(self, wanted: np.ndarray | None) -> np.ndarray | None:
        """Those of the (K,) `wanted` images that have neither a vector nor a reason; None for all images."""
        return None if wanted is None else wanted[self.codes[wanted] == _PENDING]

    def copy(self, source: int, index: int) -> None:
        """Give an image the result of `source`, which has the same bytes."""
        self.vectors[index] = self.vectors[source]
        if self.details is not None:
            self.details[index] = self.details[source]
        self.codes[index] = self.codes[source]

    def usable(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Which pairs of (N,) indices have two vectors: (N,) bool."""
        return (self.codes[a] == _OK) & (self.codes[b] == _OK)

    def reasons(self, indices: np.ndarray) -> pa.Array:
        """The reason of each image, null where there is a vector: (N,) strings."""
        return pa.array([None, *_REASON_NAMES], pa.string()).take(pa.array(self.codes[indices]))

    def failures(self) -> dict[str, int]:
        """How many images failed, for each reason that occurs."""
        counts = {name: int((self.codes == code).sum()) for code, name in enumerate(_REASON_NAMES, 1)}
        return {name: count for name, count in counts.items() if count}


def _zeros(shape: tuple[int, ...], kind: np.dtype, folder: str | None, mapped_bytes: int) -> np.ndarray:
    """Zeros of a shape and type. Raises `BatchverifyError` if they do not fit on the disk."""
    size = math.prod(shape) * kind.itemsize
    if size <= mapped_bytes:
        return np.zeros(shape, kind)
    try:
        with TemporaryFile(dir=folder) as file:
            # Reserved now: a disk that fills up later would end the process without a message.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            # The file has no name, and loses its disk space when the process ends.
            return np.memmap(file, kind, "r+", shape=shape).view(np.ndarray)
    except OSError as exc:
        where = folder or gettempdir()
        raise BatchverifyError(f"{where}: no room for {size / 1e9:.1f} GB of vectors: {exc}") from exc


class ContentIndex:
    """The image that a content key belongs to: a hash table of the first 16 bytes of keys.

    count: how many images there are.
    """

    def __init__(self, count: int) -> None:
        # Zeros take no memory until they are written to.
        self._keys = np.zeros((count, _KEY_BYTES), np.uint8)
        # Open addressing: 0 for a free slot, k + 1 for image k, negative once it was dropped.
        size = 1 << (count + count // 2).bit_length()
        self._table = np.zeros(size, np.int32 if size < 1 << 31 else np.int64)

    def get(self, key: bytes) -> int:
        """The index of the image with this key, -1 for none."""
        return max(int(self._table[self._slot(key)]), 0) - 1

    def put(self, key: bytes, index: int) -> None:
        """Give a key, which no image has, to the image `index`."""
        self._keys[index] = np.frombuffer(key, np.uint8, _KEY_BYTES)
        self._table[self._slot(key)] = index + 1

    def drop(self, key: bytes) -> None:
        """Take this key from its image."""
        # The slot does not become free: keys in the slots after it must still be found.
        slot = self._slot(key)
        self._table[slot] = -abs(self._table[slot])

    def _slot(self, key: bytes) -> int:
        """The slot of a key, or the free one where it would go."""
        mask = len(self._table) - 1
        slot = int.from_bytes(key[:8], "little") & mask
        while (owner := abs(int(self._table[slot]))) and self._keys[owner - 1].tobytes() != key[:_KEY_BYTES]:
            slot = (slot + 1) & mask
        return slot
