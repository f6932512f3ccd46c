"""An array on disk that is written block by block: whole blocks are known again after a kill, damage is noticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from batchverify.documents import read_document
from batchverify.errors import BatchverifyError
from batchverify.storage.location import Location

VALUES, NOTES, DOCUMENT = "values", "notes", "document.json"


class StoredBlocks:
    """An array (N, ...) in a folder of its own, in blocks of `rows` rows, each with a note.

    origin: what the values are computed from. If the folder holds values of another origin, shape or type, they are
    deleted. `values` holds the array, `document.json` the origin, `notes` a line for each block with the checksum of
    its values; blocks without a line, and those that do not fit theirs, are `missing`. One process writes at a time;
    copies by pickle read the same files. Raises `BatchverifyError` if the disk fails or has too little space.
    """

    def __init__(
        self, folder: Path, origin: Mapping[str, Any], shape: tuple[int, ...], dtype: Any, rows: int
    ) -> None:
        self.folder, self.shape, self.dtype, self.rows = folder, shape, np.dtype(dtype), rows
        self.notes: dict[int, dict[str, Any]] = {}
        document = {"origin": dict(origin), "shape": list(shape), "dtype": self.dtype.str, "rows": rows}
        with self._reported():
            folder.mkdir(parents=True, exist_ok=True)
            if self._stored_document() != json.loads(json.dumps(document)):
                self._begin(document)
            # A file that was cut short gets its length again; the blocks that it lost have other checksums now.
            os.truncate(folder / VALUES, self._bytes(shape[0]))
            self.notes = self._whole()
            self._require_space()

    @property
    def missing(self) -> list[int]:
        """The numbers of the blocks that are still to be written."""
        return [block for block in range(-(-self.shape[0] // self.rows)) if block not in self.notes]

    @cached_property
    def array(self) -> np.ndarray:
        """All values, mapped from disk to be read; those of missing blocks are anything."""
        if not prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        with self._reported():
            return np.memmap(self.folder / VALUES, self.dtype, "r", shape=self.shape)

    def span(self, block: int) -> range:
        """The rows of a block."""
        return range(block * self.rows, min((block + 1) * self.rows, self.shape[0]))

    def write(self, block: int, values: np.ndarray, **note: Any) -> None:
        """Write a block, durably. values: (rows of the block, ...). note: JSON to keep with it."""
        data = np.ascontiguousarray(values, self.dtype).data.cast("B")
        line = json.dumps({**note, "block": block, "values": crc32(data)})
        with self._reported():
            with (self.folder / VALUES).open("r+b") as file:
                _write_at(file.fileno(), data, self._bytes(self.span(block).start))
                os.fsync(file.fileno())
            # After a line that a kill or a full disk has torn comes a new one.
            with (self.folder / NOTES).open("ab") as file:
                file.write(f"\n{crc32(line.encode()):08x} {line}\n".encode())
                file.flush()
                os.fsync(file.fileno())
        self.notes[block] = json.loads(line)

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapping, which would be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "array"}

    def _bytes(self, rows: int) -> int:
        return rows * prod(self.shape[1:]) * self.dtype.itemsize

    def _stored_document(self) -> Any:
        with suppress(FileNotFoundError, ValueError):
            if (self.folder / VALUES).is_file():
                return read_document((self.folder / DOCUMENT).read_bytes())
        return None

    def _begin(self, document: Mapping[str, Any]) -> None:
        """Delete what there is. The document comes last: without it a later run begins again."""
        for name in (DOCUMENT, NOTES, VALUES):
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / VALUES).touch(mode=0o600)
        Location(str(self.folder / DOCUMENT)).write_bytes(json.dumps(document).encode())

    def _whole(self) -> dict[int, dict[str, Any]]:
        """The notes of the blocks whose values are what was written."""
        notes = {note["block"]: note for note in self._read_notes()}
        return {block: note for block, note in notes.items() if self._checksum(block) == note["values"]}

    def _read_notes(self) -> Iterator[dict[str, Any]]:
        """All notes in the order of writing; a torn or damaged line is none."""
        try:
            lines = (self.folder / NOTES).read_bytes().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            known, _, text = line.partition(b" ")
            if known == b"%08x" % crc32(text):
                yield json.loads(text)

    def _checksum(self, block: int) -> int:
        span = self.span(block)
        return crc32(np.ascontiguousarray(self.array[span.start : span.stop]).data.cast("B"))

    def _require_space(self) -> None:
        needed = sum(self._bytes(len(self.span(block))) for block in self.missing)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise BatchverifyError(
                f"{self.folder}: {needed / 1e9:,.2f} GB are needed, but the disk has only {free / 1e9:,.2f} GB free"
            )

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise BatchverifyError(
                f"{self.folder}: cannot be written or read: {exc.strerror or exc}; run the same command to continue"
            ) from exc


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all bytes at a place in a file; the system may write fewer than asked."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
