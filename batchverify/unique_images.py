"""The set of unique images of a manifest, as bytes: about 30 bytes an image beside its path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import pyarrow as pa

from batchverify.images import ImageRoot
from batchverify.records import Skipped
from batchverify.spelling import from_bytes, resolve_many
from batchverify.text_numbers import TextNumbers

# Cells at a time: what is made of them stays in the CPU's cache. Twice as many took a third longer.
_AT_ONCE = 32_768


class UniqueImages(Sequence["str | Skipped"]):
    """Every distinct image of a manifest, in order of first appearance (batch by batch, side a first).

    An absolute path or URI each, or the reason why it is refused. Cells that name the same file (`a.jpg`,
    `./a.jpg`) are one image. texts: for what is found, none yet.
    """

    def __init__(self, texts: TextNumbers | None = None) -> None:
        self._texts = TextNumbers() if texts is None else texts

    def __len__(self) -> int:
        return len(self._texts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UniqueImages) and self._texts == other._texts

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, index: int) -> str | Skipped: ...

    @overload
    def __getitem__(self, index: slice) -> list[str | Skipped]: ...

    def __getitem__(self, index: int | slice) -> str | Skipped | list[str | Skipped]:
        if isinstance(index, slice):
            return [self[at] for at in range(len(self))[index]]
        return from_bytes(self._texts[range(len(self))[index]])

    def indices(self, root: ImageRoot, cells: pa.Array, *, add: bool = True) -> np.ndarray:
        """The index of the image of each of (N,) string cells: (N,) int64.

        New images are added, or -1 where `add` is off.
        """
        parts = [
            self._texts.numbers(resolve_many(root, cells.slice(start, _AT_ONCE)), add=add)
            for start in range(0, len(cells), _AT_ONCE)
        ]
        return np.concatenate([np.zeros(0, np.int64), *parts])
