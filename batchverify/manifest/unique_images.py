"""The unique images of a manifest, as numbered texts: about 30 bytes an image beside its path."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.manifest.paths import ImageRoot, borders_and_bytes, from_bytes, resolve_many
from batchverify.records import Skipped

# Cells at a time: what is made of them stays in the CPU's cache. Twice as many took a third longer.
_AT_ONCE = 32_768
# Fuller tables make long searches, emptier ones cost memory.
_FULL = 0.6
_SMALLEST = 1024
# Numbers put into a new table at a time: bounds the memory of doing so.
_PUT_AT_ONCE = 1 << 20


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


class TextNumbers:
    """A set of texts, found by their hashes and told apart as texts.

    hash_of: the (N,) int64 hashes of (N,) large_binary texts; by default Python's, which have a secret, so that
    nobody can make a manifest whose texts have one hash.
    """

    def __init__(self, hash_of: Callable[[pa.Array], np.ndarray] | None = None) -> None:
        self._hash_of = hash_of or _hashes
        self._text = bytearray()
        self._borders = array("q", [0])
        self._hashes = array("q")
        # Numbers by hash, -1 where there is none: each at its hash's last bits or at the next place that was free.
        self._table = np.full(_SMALLEST, -1, np.int32)
        # Texts whose hash an earlier text has. They are not in the table.
        self._twins: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._hashes)

    def __getitem__(self, number: int) -> bytes:
        return bytes(self._text[self._borders[number] : self._borders[number + 1]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextNumbers) and (self._borders, self._text) == (other._borders, other._text)

    __hash__ = None  # type: ignore[assignment]

    def numbers(self, texts: pa.Array, *, add: bool) -> np.ndarray:
        """The number of each of (N,) large_binary texts without nulls: (N,) int64.

        New ones are added, or -1 where `add` is off.
        """
        numbers = self._find(texts)
        new = np.flatnonzero(numbers < 0)
        if add and len(new):
            distinct = texts.take(pa.array(new)).dictionary_encode()
            numbers[new] = len(self) + distinct.indices.to_numpy()
            self._append(distinct.dictionary)
        return numbers

    def _find(self, texts: pa.Array) -> np.ndarray:
        """(N,) int64, -1 for texts that are not known."""
        numbers = self._of_hashes(self._hash_of(texts))
        buffers = [None, pa.py_buffer(self._borders), pa.py_buffer(self._text)]
        known = pa.Array.from_buffers(pa.large_binary(), len(self), buffers)
        same = pc.equal(known.take(pa.array(numbers, mask=numbers < 0)), texts).fill_null(True)
        for at in np.flatnonzero(~same.to_numpy(zero_copy_only=False)).tolist():
            numbers[at] = self._twins.get(texts[at].as_py(), -1)
        return numbers

    def _of_hashes(self, hashes: np.ndarray) -> np.ndarray:
        """The number of the first text that has each of (N,) int64 hashes, -1 for none: (N,) int64."""
        known, mask = np.frombuffer(self._hashes, np.int64), len(self._table) - 1
        at = hashes & mask
        numbers = self._table[at].astype(np.int64)
        going = np.flatnonzero(numbers >= 0)
        while len(going := going[known[numbers[going]] != hashes[going]]):
            at[going] = (at[going] + 1) & mask
            numbers[going] = self._table[at[going]]
            going = going[numbers[going] >= 0]
        return numbers

    def _append(self, texts: pa.Array) -> None:
        """Add texts that are new and all different."""
        first, start, hashes = len(self), self._borders[-1], self._hash_of(texts)
        borders, data = borders_and_bytes(texts)
        self._text += data[borders[0] : borders[-1]].data
        self._borders.frombytes((borders[1:] - borders[0] + start).tobytes())
        self._hashes.frombytes(hashes.tobytes())
        if len(self) > len(self._table) * _FULL:
            size = 1 << int(len(self) / _FULL).bit_length()
            self._table = np.full(size, -1, np.int32 if size < 1 << 31 else np.int64)
            for begin in range(0, first, _PUT_AT_ONCE):
                self._put(begin, min(begin + _PUT_AT_ONCE, first))
        self._put(first, len(self))
        for at in np.flatnonzero(self._of_hashes(hashes) != np.arange(first, len(self))).tolist():
            self._twins[texts[at].as_py()] = first + at

    def _put(self, first: int, end: int) -> None:
        """Put numbers into the table, but for those whose hash an earlier one has."""
        known, mask = np.frombuffer(self._hashes, np.int64), len(self._table) - 1
        numbers = np.arange(first, end)
        at = known[numbers] & mask
        while len(numbers):
            free = self._table[at] < 0
            # Written backwards: of several that want one place the first gets it.
            self._table[at[free][::-1]] = numbers[free][::-1]
            other = known[self._table[at]] != known[numbers]
            at, numbers = (at[other] + 1) & mask, numbers[other]


def _hashes(texts: pa.Array) -> np.ndarray:
    """Python's hashes of (N,) large_binary texts: (N,) int64, by a secret of this process."""
    return np.fromiter(map(hash, texts.to_pylist()), np.int64, len(texts))
