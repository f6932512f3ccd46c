"""Manifests: tables of image pairs, opened, checked and streamed, with the set of their unique images."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from batchverify.errors import ManifestError, UsageError
from batchverify.manifest.columns import (
    LABEL,
    LosslessTypes,
    check_cells,
    check_label_type,
    check_names,
    check_same_names,
    common_type,
    convert,
    quoted,
    read_labels,
    read_paths,
)
from batchverify.manifest.columns import TRUE_LABEL as TRUE_LABEL
from batchverify.manifest.paths import ImageRoot
from batchverify.manifest.tables import BATCH_ROWS, TableFile, find_files, stream_table, table_of
from batchverify.manifest.unique_images import UniqueImages
from batchverify.storage.background import prefetch
from batchverify.storage.location import Location


@dataclass(frozen=True)
class Columns:
    """Which columns hold the two images of a pair."""

    a: str = "image_a"
    b: str = "image_b"


@dataclass(frozen=True)
class Block:
    """N consecutive rows of a manifest.

    first: index of the first row in the whole manifest. carried: the columns that come back in the output, the
    label as int8 `true_label`. a, b: (N,) int64 indices of unique images.
    """

    first: int
    carried: pa.RecordBatch
    a: np.ndarray
    b: np.ndarray

    def slice(self, start: int, rows: int) -> Block:
        """At most `rows` rows of this block, from its row `start` on."""
        part = slice(start, start + rows)
        return Block(self.first + start, self.carried.slice(start, rows), self.a[part], self.b[part])


@dataclass(frozen=True)
class Scan:
    """The result of the first pass over a manifest. carried: as in `Block`. file_rows: rows of each file."""

    images: UniqueImages
    rows: int
    carried: pa.Schema
    file_rows: tuple[int, ...]


class Manifest:
    """A manifest: one or several files, which are streamed, or a table in memory.

    Call `scan` first and then `blocks`, as often as needed: it yields the same rows. follow_symlinks: symbolic links
    may lead out of `image_root`. limit: read only that many rows. Raises `ManifestError` with file, row, column and
    value for a manifest that cannot be read.
    """

    def __init__(
        self,
        files: list[TableFile | pa.Table],
        *,
        columns: Columns | None = None,
        image_root: str | None = None,
        follow_symlinks: bool = False,
        limit: int | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise UsageError(f"limit must be at least 1, got {limit}")
        self.columns = columns or Columns()
        self._files = files
        self._limit = limit
        root = Location.parse(image_root) if image_root is not None else None
        self._image_root = ImageRoot(root, fenced=True, follow_symlinks=follow_symlinks) if root else None
        self._schemas = [file.schema() if isinstance(file, TableFile) else file.schema for file in files]
        self._check_columns()
        self._types = {name: self._common_type(name) for name in self._schemas[0].names}

    @classmethod
    def open(
        cls,
        source: Any,
        *,
        columns: Columns | None = None,
        image_root: str | os.PathLike[str] | None = None,
        follow_symlinks: bool = False,
        limit: int | None = None,
    ) -> Manifest:
        """Open a path, glob, folder, URI, DataFrame, pyarrow Table or another table with an Arrow stream."""
        root = os.fspath(image_root) if image_root is not None else None
        files: list[TableFile | pa.Table]
        if isinstance(source, str | os.PathLike):
            files = [TableFile(location) for location in find_files(os.fspath(source))]
        else:
            files = [table_of(source)]
        return cls(files, columns=columns, image_root=root, follow_symlinks=follow_symlinks, limit=limit)

    @cached_property
    def names(self) -> list[str]:
        """The paths or URIs of the files; `the table` for a table in memory."""
        return [str(file.location) if isinstance(file, TableFile) else "the table" for file in self._files]

    @cached_property
    def has_label(self) -> bool:
        """Whether the manifest has labels."""
        return LABEL in self._schemas[0].names

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files' bytes, in hex; for a table, of its Arrow stream."""
        digest = hashlib.sha256()
        for file in self._files:
            if isinstance(file, TableFile):
                for chunk in file.chunks():
                    digest.update(chunk)
            else:
                stream_table(file, digest.update)
        return digest.hexdigest()

    @property
    def roots(self) -> str | list[str]:
        """Where relative image paths start: the given root, or the folders of the files."""
        if self._image_root is not None:
            return str(self._image_root.root)
        return sorted({str(self._root(file).root) for file in self._files})

    @property
    def fence(self) -> str | None:
        """The folder that no local image may lie outside of; None without an image root."""
        return self._image_root.fence if self._image_root is not None else None

    @cached_property
    def scanned(self) -> Scan:
        """The result of `scan`, computed once."""
        return self.scan()

    def scan(self) -> Scan:
        """Read all rows: check them, collect the unique images, find the types of CSV columns."""
        images, rows = UniqueImages(), [0] * len(self._files)
        others = [name for name in self._types if name not in (self.columns.a, self.columns.b, LABEL)]
        # Readers of text look whether it is UTF-8, and have to find the types. Parquet and tables have types.
        is_text = _is_text(self._files[0])
        kinds = LosslessTypes(others if is_text else [])
        for number, root, batch in self._batches():
            images.indices(root, self._paths(number, rows[number], batch, self.columns.a))
            images.indices(root, self._paths(number, rows[number], batch, self.columns.b))
            if self.has_label:
                read_labels(_column(batch, LABEL), self.names[number], rows[number])
            for name in others if not is_text else ():
                check_cells(_column(batch, name), self.names[number], rows[number], name)
            kinds.see(batch)
            rows[number] += batch.num_rows
        if not any(rows):
            more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            raise ManifestError(f"{self.names[0]}{more}: the manifest has no rows")
        types = {TRUE_LABEL if name == LABEL else name: kind for name, kind in (self._types | kinds.types()).items()}
        return Scan(images, sum(rows), pa.schema(types), tuple(rows))

    def blocks(self, scan: Scan) -> Iterator[Block]:
        """Stream the rows after a scan. Raises `ManifestError` if the rows, images or types have changed since."""
        rows = [0] * len(self._files)
        for number, root, batch in self._batches():
            a, b = (
                scan.images.indices(root, self._paths(number, rows[number], batch, name), add=False)
                for name in (self.columns.a, self.columns.b)
            )
            if min(a.min(), b.min()) < 0:
                raise self._changed(number, "an image is new")
            if rows[number] + batch.num_rows > scan.file_rows[number]:
                raise self._changed(number, f"{scan.file_rows[number]} rows at first, more now")
            carried = self._carried(number, rows[number], batch, scan.carried)
            yield Block(sum(rows), carried, a, b)
            rows[number] += batch.num_rows
        for number, (count, expected) in enumerate(zip(rows, scan.file_rows, strict=True)):
            if count != expected:
                raise self._changed(number, f"{expected} rows at first, {count} now")

    def locate(self, scan: Scan, row: int) -> tuple[str, int]:
        """The file of a row of the whole manifest (from 0) and the row's number in it (from 1)."""
        ends = list(accumulate(scan.file_rows))
        number = bisect_right(ends, row)
        return self.names[number], row - (ends[number] - scan.file_rows[number]) + 1

    def _changed(self, number: int, what: str) -> ManifestError:
        return ManifestError(f"{self.names[number]}: the file changed while it was read: {what}")

    def _batches(self) -> Iterator[tuple[int, ImageRoot, pa.RecordBatch]]:
        """The index of a file, the root of its images and its next rows (at least one), up to the limit."""
        left = self._limit
        for number, (file, schema) in enumerate(zip(self._files, self._schemas, strict=True)):
            root = self._root(file)
            for batch in (
                prefetch(file.batches(schema)) if isinstance(file, TableFile) else file.to_batches(BATCH_ROWS)
            ):
                if left is not None:
                    batch = batch.slice(0, left)
                    left -= batch.num_rows
                if batch.num_rows:
                    yield number, root, batch
                if left == 0:
                    return

    def _root(self, file: TableFile | pa.Table) -> ImageRoot:
        if self._image_root is not None:
            return self._image_root
        return ImageRoot(file.location.parent if isinstance(file, TableFile) else Location.parse("."))

    def _paths(self, number: int, row: int, batch: pa.RecordBatch, name: str) -> pa.Array:
        return read_paths(_column(batch, name), self.names[number], row, name)

    def _carried(self, number: int, row: int, batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
        columns = []
        for source, target in zip(self._types, schema, strict=True):
            cells = _column(batch, source)
            if source == LABEL:
                cells = read_labels(cells, self.names[number], row)
            elif _is_text(self._files[number]):
                try:
                    cells = convert(cells, target.type)
                except pa.ArrowInvalid as exc:
                    raise self._changed(number, f"column {quoted(source)} no longer holds {target.type}") from exc
            elif cells.type != target.type:
                cells = cells.cast(target.type)
            columns.append(cells)
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def _check_columns(self) -> None:
        first = self.names[0]
        for file, name, schema in zip(self._files, self.names, self._schemas, strict=True):
            check_names(name, schema.names, self.columns.a, self.columns.b)
            if _is_text(file) != _is_text(self._files[0]):
                raise ManifestError(f"{name}: {first} has another format; give files of one format only")
            check_same_names(name, schema.names, first, self._schemas[0].names)
            if self.has_label:
                check_label_type(name, schema.field(LABEL).type)

    def _common_type(self, name: str) -> pa.DataType:
        if name == LABEL:
            return pa.int8()
        kinds = {file: schema.field(name).type for file, schema in zip(self.names, self._schemas, strict=True)}
        return common_type(name, kinds, paths=name in (self.columns.a, self.columns.b))


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    return batch.column(batch.schema.get_field_index(name))


def _is_text(file: TableFile | pa.Table) -> bool:
    return isinstance(file, TableFile) and not file.is_parquet
