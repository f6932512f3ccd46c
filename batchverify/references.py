"""The set of unique images of a manifest, as bytes: 30 bytes an image beside its path."""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa

from batchverify.images import ImageRoot
from batchverify.records import Skipped
from batchverify.slots import Slots
from batchverify.spelling import frame_of, from_bytes, resolve_many
from batchverify.texts import find_all, hash_all


class References(Sequence["str | Skipped"]):
    """One entry an image: an absolute path or URI, or the reason why it is refused.

    The texts lie one after the other in one buffer; they are found by their hashes and told apart as texts.
    secret: seed and factor of the hashes, drawn at random by default.
    """

    def __init__(self, secret: tuple[int, int] | None = None) -> None:
        # Drawn anew: nobody can make a manifest whose texts have one hash.
        seed, factor = secret or struct.unpack("2Q", os.urandom(16))
        self._secret = np.uint64(seed), np.uint64(factor | (secret is None))
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

    def find(
        self, texts: pa.Array, frame: tuple[bytes, bytes] = (b"", b""), *, plain: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The number of each of (N,) large_binary texts between the two of `frame`, -1 for none: (N,) int64.

        Its hash, too, where it was looked for. plain: look for plain paths alone.
        """
        found = np.empty(len(texts), np.int64), np.empty(len(texts), np.int64)
        mine, between = _buffers(texts), (_bytes(frame[0]), _bytes(frame[1]))
        hash_all(mine, between, self._secret, plain, found)
        if not len(self):
            found[0][:] = -1
            return found
        known = (
            np.frombuffer(memoryview(self._borders).toreadonly(), np.int64),
            _bytes(self._text),
            np.frombuffer(memoryview(self._hashes).toreadonly(), np.int64),
        )
        find_all(mine, between, known, self._slots.table, found)
        return found

    def numbers(self, texts: pa.Array, *, add: bool) -> np.ndarray:
        """The number of each of (N,) large_binary texts: (N,) int64. New ones are added, or -1 without `add`."""
        numbers, hashes = self.find(texts)
        new = np.flatnonzero(numbers < 0)
        if add and len(new):
            distinct = texts.take(pa.array(new)).dictionary_encode()
            indices = distinct.indices.to_numpy()
            first = np.unique(indices, return_index=True)[1]
            numbers[new] = len(self) + indices
            self._append(distinct.dictionary, hashes[new[first]])
        return numbers

    def _append(self, texts: pa.Array, hashes: np.ndarray) -> None:
        first, start = len(self), self._borders[-1]
        offsets, data = _buffers(texts)
        self._text += data[offsets[0] : offsets[-1]].data
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
        found = frame_of(root)
        numbers = np.full(len(cells), -1, np.int64)
        if found is not None:
            numbers, _ = self.references.find(cells.cast(pa.large_binary()), found, plain=True)
        if cells.null_count:
            # Under a cell that is null there may be bytes.
            numbers[cells.is_null().to_numpy(zero_copy_only=False)] = -1
        left = np.flatnonzero(numbers < 0)
        if len(left):
            encoded = cells.take(pa.array(left)).dictionary_encode(null_encoding="encode")
            others = self.references.numbers(resolve_many(root, encoded.dictionary), add=add)
            numbers[left] = others[encoded.indices.to_numpy()]
        return numbers


def _buffers(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Borders (N + 1,) int64 and bytes (M,) uint8 of large_binary texts, as they lie there."""
    _, borders, data = texts.buffers()
    if borders is None:
        return np.frombuffer(bytes(8), np.int64), _bytes(b"")
    return np.frombuffer(borders, np.int64)[texts.offset : texts.offset + len(texts) + 1], _bytes(data or b"")


def _bytes(data: bytes | bytearray | pa.Buffer) -> np.ndarray:
    """(N,) uint8, the same memory, not to be written to: compiled loops would be compiled for each kind."""
    return np.frombuffer(memoryview(data).toreadonly(), np.uint8)
