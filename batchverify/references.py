"""The set of unique images of a manifest, as bytes: 30 bytes an image beside its path."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.images import ImageRoot
from batchverify.records import Skipped
from batchverify.slots import Slots
from batchverify.spelling import from_bytes, resolve_many


class References(Sequence["str | Skipped"]):
    """One entry an image: an absolute path or URI, or the reason why it is refused.

    The texts lie one after the other in one buffer; they are found by their hashes and told apart as texts.
    """

    def __init__(self) -> None:
        self._text = bytearray()
        self._borders = array("q", [0])
        self._hashes = array("q")
        self._slots = Slots(lambda numbers: np.frombuffer(self._hashes, np.int64)[numbers])

    def __len__(self) -> int:
        return len(self._hashes)

    @overload
    def __getitem__(self, index: int) -> str | Skipped: ...

    @overload
    def __getitem__(self, index: slice) -> list[str | Skipped]: ...

    def __getitem__(self, index: int | slice) -> str | Skipped | list[str | Skipped]:
        if isinstance(index, slice):
            return [self[at] for at in range(len(self))[index]]
        at = range(len(self))[index]
        return from_bytes(bytes(self._text[self._borders[at] : self._borders[at + 1]]))

    def __iter__(self) -> Iterator[str | Skipped]:
        return (self[at] for at in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, References):
            return self._text == other._text and self._borders == other._borders
        return isinstance(other, list) and list(self) == other

    __hash__ = None  # type: ignore[assignment]

    def numbers(self, texts: pa.Array, *, add: bool) -> np.ndarray:
        """The number of each of (N,) large_binary texts: (N,) int64. New ones are added, or -1 without `add`."""
        hashes = np.fromiter(map(hash, texts.to_pylist()), np.int64, len(texts))
        numbers = self._find(texts, hashes)
        new = np.flatnonzero(numbers < 0)
        if add and len(new):
            distinct = texts.take(pa.array(new)).dictionary_encode()
            indices = distinct.indices.to_numpy()
            first = np.unique(indices, return_index=True)[1]
            numbers[new] = len(self) + indices
            self._append(distinct.dictionary, hashes[new[first]])
        return numbers

    def _find(self, texts: pa.Array, hashes: np.ndarray) -> np.ndarray:
        known_hashes = np.frombuffer(self._hashes, np.int64)
        buffers = [None, pa.py_buffer(self._borders), pa.py_buffer(self._text)]
        known = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self), buffers)

        def same(positions: np.ndarray, numbers: np.ndarray) -> np.ndarray:
            equal: np.ndarray = known_hashes[numbers] == hashes[positions]
            at = np.flatnonzero(equal)
            mine, theirs = texts.take(pa.array(positions[at])), known.take(pa.array(numbers[at]))
            equal[at] = pc.equal(mine, theirs).to_numpy(zero_copy_only=False)
            return equal

        return self._slots.find(hashes, same)

    def _append(self, texts: pa.Array, hashes: np.ndarray) -> None:
        first, start = len(self), self._borders[-1]
        offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
        self._text += memoryview(texts.buffers()[2])[offsets[0] : offsets[-1]]
        self._borders.frombytes((offsets[1:] - offsets[0] + start).tobytes())
        self._hashes.frombytes(hashes.tobytes())
        self._slots.add(hashes, np.arange(first, len(self)))


class UniqueImages:
    """Every distinct image of a manifest, in order of first appearance (batch by batch, side a first).

    Cells that name the same file (`a.jpg`, `./a.jpg`) are one image.
    """

    def __init__(self) -> None:
        self.references = References()

    def __len__(self) -> int:
        return len(self.references)

    def indices(self, root: ImageRoot, cells: pa.Array, *, add: bool = True) -> np.ndarray:
        """The index of each cell's image: (N,) int64. New images are added, or -1 where `add` is off."""
        encoded = cells.dictionary_encode(null_encoding="encode")
        numbers = self.references.numbers(resolve_many(root, encoded.dictionary), add=add)
        return numbers[encoded.indices.to_numpy()]
