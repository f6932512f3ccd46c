"""The set of unique images of a manifest."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from batchverify.images import ImageRoot
from batchverify.records import Skipped


@dataclass
class UniqueImages:
    """Every distinct image of a manifest, in order of first appearance (batch by batch, side a first).

    references: one entry an image, an absolute path or URI, or the reason why it is refused. Cells that name
    the same file (`a.jpg`, `./a.jpg`) are one image.
    """

    references: list[str | Skipped] = field(default_factory=list)
    _by_root: dict[ImageRoot, dict[str | None, int]] = field(default_factory=dict)
    _by_reference: dict[str | Skipped, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.references)

    def indices(self, root: ImageRoot, cells: pa.Array, *, add: bool = True) -> np.ndarray:
        """The index of each cell's image: (N,) int64. New images are added, or -1 where `add` is off."""
        known = self._by_root.setdefault(root, {})
        encoded = cells.dictionary_encode(null_encoding="encode")
        values = encoded.dictionary.to_pylist()
        table = [known.get(value, -1) for value in values]
        if add and -1 in table:
            table = [self._add(known, root, value) for value in values]
        return np.array(table, np.int64)[encoded.indices.to_numpy()]

    def _add(self, known: dict[str | None, int], root: ImageRoot, cell: str | None) -> int:
        index = known.get(cell)
        if index is None:
            reference = root.resolve(cell)
            index = known[cell] = self._by_reference.setdefault(reference, len(self.references))
            if index == len(self.references):
                self.references.append(reference)
        return index
