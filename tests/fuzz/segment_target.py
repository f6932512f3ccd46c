"""The cache segment reader."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from cache_samples import FINGERPRINT, entry, failure, key, segments, write
from target import Target, require

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.segment import bad_norm
from batchverify.records import Reason


class SegmentTarget(Target):
    """A cache segment. The first byte chooses between vectors and failures."""

    ROWS = 5

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.numbers = itertools.count()

    def seeds(self) -> list[bytes]:
        """A segment of each kind."""
        entries = [entry(number) for number in range(self.ROWS)]
        failures = [failure(number, Reason.NO_FACE) for number in range(self.ROWS)]
        files = [write(self.folder / name, each) for name, each in (("a", entries), ("b", failures))]
        return [bytes([kind]) + file.read_bytes() for kind, [file] in enumerate(files)]

    def run(self, data: bytes) -> None:
        """Read the index of a cache with this segment, and all its entries."""
        folder = "fail" if data and data[0] % 2 else "data"
        root = self.folder / "cache"
        number = next(self.numbers)
        file = root / "v1" / FINGERPRINT.id / folder / f"{number:020d}-fuzz-{number % 2**32:08x}-r{self.ROWS}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data[1:])
        try:
            entries = []
            for details in (False, True):
                cache = EmbeddingCache(str(root), FINGERPRINT, details=details)
                cache.refresh()
                entries += cache.get_many([key(number) for number in range(self.ROWS)])
        finally:
            file.unlink()
        for each in entries:
            if each is not None and each.vector is not None:
                require(bad_norm(each.vector[None]) is None, "a vector that is not of length 1")
                require(not np.isinf([*each.landmarks, each.sharpness]).any(), "details that are infinite")
        require(not segments(root), "segments are left")


TARGET = SegmentTarget
