"""The unique images of a manifest, numbered. Memory: about 30 bytes an image besides its path."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.manifest.paths import ImageRoot, borders_and_bytes, from_bytes, resolve_many
from batchverify.records import Skipped

# Cells resolved at a time, so that their data stay in the CPU's cache. Twice as many took a third longer.
_AT_ONCE = 32_768
# Largest load of the hash table: fuller tables make searches longer, emptier ones cost memory.
_FULL = 0.6
_SMALLEST = 1024
# Numbers inserted into a new table at a time, which bounds the memory for it.
_PUT_AT_ONCE = 1 << 20


class UniqueImages(Sequence["str | Skipped"]):
    """Every distinct image of a manifest, in order of first appearance (batch by batch, side a first).

    Each is an absolute path or URI, or the reason why it is refused. Cells that name the same file (`a.jpg`,
    `./a.jpg`) are one image. texts: an empty set to use.
    """

    def __init__(self, texts: TextNumbers | None = None, *, at_once: int = _AT_ONCE) -> None:
        self._texts = TextNumbers() if texts is None else texts
        self._at_once = at_once

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
            return [self[number] for number in range(len(self))[index]]
        return from_bytes(self._texts[range(len(self))[index]])

    def indices(self, root: ImageRoot, cells: pa.Array, *, add: bool = True) -> np.ndarray:
        """The index of each image of (N,) string cells: (N,) int64.

        New images are added; without `add` their index is -1.
        """
        parts = [
            self._texts.numbers(resolve_many(root, cells.slice(start, self._at_once)), add=add)
            for start in range(0, len(cells), self._at_once)
        ]
        return np.concatenate([np.zeros(0, np.int64), *parts])


class TextNumbers:
    """A set of numbered texts, found by hash and compared as texts.

    hash_of: the (N,) int64 hashes of (N,) large_binary texts. By default Python's, which depend on a secret, so that
    nobody can make a manifest whose texts share one hash.
    """

    def __init__(
        self, hash_of: Callable[[pa.Array], np.ndarray] | None = None, *, put_at_once: int = _PUT_AT_ONCE
    ) -> None:
        self._hash_of = hash_of or _hashes
        self._put_at_once = put_at_once
        self._text = bytearray()
        self._borders = array("q", [0])
        self._hashes = array("q")
        # Open addressing: a number is in the slot of its hash's last bits or in the next free one; -1 is free.
        self._table = np.full(_SMALLEST, -1, np.int32)
        # Texts with the hash of an earlier text, which are not in the table.
        self._twins: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._hashes)

    def __getitem__(self, number: int) -> bytes:
        return bytes(self._text[self._borders[number] : self._borders[number + 1]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextNumbers) and (self._borders, self._text) == (other._borders, other._text)

    __hash__ = None  # type: ignore[assignment]

    def numbers(self, texts: pa.Array, *, add: bool) -> np.ndarray:
        """The numbers of (N,) large_binary texts without nulls: (N,) int64.

        New texts are added; without `add` their number is -1.
        """
        numbers = self._find(texts)
        new = np.flatnonzero(numbers < 0)
        if add and len(new):
            distinct = texts.take(pa.array(new)).dictionary_encode()
            numbers[new] = len(self) + distinct.indices.to_numpy()
            self._append(distinct.dictionary)
        return numbers

    def _find(self, texts: pa.Array) -> np.ndarray:
        """The numbers of (N,) texts, -1 for unknown ones: (N,) int64."""
        numbers = self._of_hashes(self._hash_of(texts))
        buffers = [None, pa.py_buffer(self._borders), pa.py_buffer(self._text)]
        known = pa.Array.from_buffers(pa.large_binary(), len(self), buffers)
        same = pc.equal(known.take(pa.array(numbers, mask=numbers < 0)), texts).fill_null(True)
        for position in np.flatnonzero(~same.to_numpy(zero_copy_only=False)).tolist():
            numbers[position] = self._twins.get(texts[position].as_py(), -1)
        return numbers

    def _of_hashes(self, hashes: np.ndarray) -> np.ndarray:
        """The number of the first text with each of (N,) int64 hashes, -1 for none: (N,) int64."""
        known, mask = np.frombuffer(self._hashes, np.int64), len(self._table) - 1
        slots = hashes & mask
        numbers = self._table[slots].astype(np.int64)
        searching = np.flatnonzero(numbers >= 0)
        while len(searching := searching[known[numbers[searching]] != hashes[searching]]):
            slots[searching] = (slots[searching] + 1) & mask
            numbers[searching] = self._table[slots[searching]]
            searching = searching[numbers[searching] >= 0]
        return numbers

    def _append(self, texts: pa.Array) -> None:
        """Add texts that are all new and distinct."""
        first, start, hashes = len(self), self._borders[-1], self._hash_of(texts)
        borders, data = borders_and_bytes(texts)
        self._text += data[borders[0] : borders[-1]].data
        self._borders.frombytes((borders[1:] - borders[0] + start).tobytes())
        self._hashes.frombytes(hashes.tobytes())
        if len(self) > len(self._table) * _FULL:
            size = 1 << int(len(self) / _FULL).bit_length()
            self._table = np.full(size, -1, np.int32 if size < 1 << 31 else np.int64)
            for begin in range(0, first, self._put_at_once):
                self._put(begin, min(begin + self._put_at_once, first))
        self._put(first, len(self))
        for position in np.flatnonzero(self._of_hashes(hashes) != np.arange(first, len(self))).tolist():
            self._twins[texts[position].as_py()] = first + position

    def _put(self, first: int, end: int) -> None:
        """Insert numbers into the table, except those with the hash of an earlier one."""
        known, mask = np.frombuffer(self._hashes, np.int64), len(self._table) - 1
        numbers = np.arange(first, end)
        slots = known[numbers] & mask
        while len(numbers):
            free = self._table[slots] < 0
            # Written in reverse order, so that the first of several numbers with one slot gets it.
            self._table[slots[free][::-1]] = numbers[free][::-1]
            other = known[self._table[slots]] != known[numbers]
            slots, numbers = (slots[other] + 1) & mask, numbers[other]


def _hashes(texts: pa.Array) -> np.ndarray:
    """Python's hashes of (N,) large_binary texts, which depend on a secret of this process: (N,) int64."""
    return np.fromiter(map(hash, texts.to_pylist()), np.int64, len(texts))
