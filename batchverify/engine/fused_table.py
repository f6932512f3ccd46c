"""The vectors and reasons of a run with several backbones: a table for each, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.engine.embedding_table import EmbeddingTable
from batchverify.records import FILE_REASONS, Reason


@dataclass(frozen=True)
class FusedTable:
    """The tables of fused backbones, all of the same images. A pair is usable if one backbone has both vectors.

    An image whose content changed between two backbones (by the tables' keys) is `unreadable`.
    """

    members: Sequence[EmbeddingTable]

    @property
    def vectors(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(M, D) float16 vectors of each backbone, and (M,) bool for which images there is one."""
        return [(table.vectors, table.codes == 0) for table in self.members]

    @property
    def details(self) -> np.ndarray | None:
        """The first backbone's."""
        return self.members[0].details

    def usable(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Which pairs of (N,) indices have two vectors of one backbone: (N,) bool."""
        usable: np.ndarray = np.any(self._usable(a, b), axis=0)
        return usable

    def reasons(self, indices: np.ndarray) -> pa.Array:
        """The first backbone's reason for each image, null where it has a vector: (N,) strings."""
        changed = pa.array(self._changed(indices))
        return pc.if_else(changed, Reason.UNREADABLE.value, self.members[0].reasons(indices))

    def makers(self, a: np.ndarray, b: np.ndarray, names: Sequence[str]) -> pa.Array:
        """The names of the backbones that make each pair's score, joined by `+`, null for none: (N,) strings."""
        usable = self._usable(a, b)
        codes = sum((has.astype(np.int64) << bit for bit, has in enumerate(usable)), np.zeros(len(a), np.int64))
        texts = [
            "+".join(name for bit, name in enumerate(names) if code >> bit & 1) or None
            for code in range(1 << len(names))
        ]
        return pa.array(texts, pa.string()).take(pa.array(codes))

    def _usable(self, a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
        """Which pairs each backbone can score: (N,) bool each."""
        unchanged = ~(self._changed(a) | self._changed(b))
        return [table.usable(a, b) & unchanged for table in self.members]

    def _changed(self, indices: np.ndarray) -> np.ndarray:
        """Which images two backbones have read with different contents: (N,) bool."""
        changed, known = np.zeros(len(indices), bool), np.zeros(len(indices), np.uint64)
        for table in self.members:
            keys = table.keys[indices] if len(table.keys) else known
            changed |= (keys != known) & (keys != 0) & (known != 0)
            known = np.where(keys != 0, keys, known)
        return changed

    def restore(self, indices: np.ndarray, reasons: pa.ChunkedArray | pa.Array) -> None:
        """Store the failures of rows from an earlier run. reasons: (N,) strings of the first backbone.

        Those of a file hold for every backbone, those of a face or a worker for the first alone.
        """
        self.members[0].restore(indices, reasons)
        of_file = [reason.value for reason in FILE_REASONS]
        kept = pc.if_else(pc.is_in(reasons, pa.array(of_file)), reasons, pa.scalar(None, pa.string()))
        for table in self.members[1:]:
            table.restore(indices, kept)

    def failed(self) -> int:
        """How many images have no vector of any backbone."""
        return int(np.all([table.codes > 0 for table in self.members], axis=0).sum())

    def keep_common(self) -> None:
        """Drop every image that one backbone has no vector of, with the reason of the first such backbone."""
        codes = self.members[0].codes.copy()
        for table in self.members[1:]:
            codes = np.where(codes > 0, codes, table.codes)
        for table in self.members:
            table.codes[:] = codes
            table.vectors[codes > 0] = 0


# That of a run, with one backbone or with several.
Table = EmbeddingTable | FusedTable
