"""Manifests: open, check and stream tables of image pairs; the set of their unique images."""

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
    check_label_type,
    check_names,
    check_same_names,
    common_type,
    convert,
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
    """Some consecutive rows of a manifest.

    carried: the columns that come back, the label as `true_label` int8. first: index of the first row in
    the whole manifest. a, b: (N,) int64 indices of unique images.
    """

    first: int
    carried: pa.RecordBatch
    a: np.ndarray
    b: np.ndarray

    def slice(self, start: int, rows: int) -> Block:
        """At most `rows` of the rows, from the row `start` of this block on."""
        some = slice(start, start + rows)
        return Block(self.first + start, self.carried.slice(start, rows), self.a[some], self.b[some])


@dataclass(frozen=True)
class Scan:
    """What one reading of a manifest tells; carried: the columns that come back, file_rows: rows by file."""

    images: UniqueImages
    rows: int
    carried: pa.Schema
    file_rows: tuple[int, ...]


class Manifest:
    """A manifest of one or several files, or a table in memory; streamed, never held whole.

    `scan` first, then `blocks`, again and again: it yields the same rows. limit: only the first so many
    rows exist. Raises `ManifestError` for what is no manifest, with file, row, column and value.
    """

    def __init__(
        self,
        files: list[TableFile | pa.Table],
        *,
        columns: Columns | None = None,
        image_root: str | None = None,
        limit: int | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise UsageError(f"limit must be at least 1, got {limit}")
        self.columns = columns or Columns()
        self._files = files
        self._limit = limit
        self._image_root = Location.parse(image_root) if image_root is not None else None
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
        limit: int | None = None,
    ) -> Manifest:
        """Open a path, glob, folder, URI, DataFrame, pyarrow Table or other table with an Arrow stream."""
        root = os.fspath(image_root) if image_root is not None else None
        files: list[TableFile | pa.Table]
        if isinstance(source, str | os.PathLike):
            files = [TableFile(location) for location in find_files(os.fspath(source))]
        else:
            files = [table_of(source)]
        return cls(files, columns=columns, image_root=root, limit=limit)

    @cached_property
    def names(self) -> list[str]:
        """Where the manifest lies, file by file."""
        return [_name(file) for file in self._files]

    @cached_property
    def has_label(self) -> bool:
        """Whether the manifest states the truth."""
        return LABEL in self._schemas[0].names

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the files' bytes, in hex; of a table, over its Arrow stream."""
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
        """Where relative image paths start: the root that was given, or the folder of each file."""
        if self._image_root is not None:
            return str(self._image_root)
        return sorted({str(self._root(file).root) for file in self._files})

    @cached_property
    def scanned(self) -> Scan:
        """The first reading's result, kept."""
        return self.scan()

    def scan(self) -> Scan:
        """Read everything once: check it, collect the unique images, find the types of CSV columns."""
        images, rows = UniqueImages(), [0] * len(self._files)
        kinds = LosslessTypes(self._untyped_names())
        for number, root, batch in self._batches():
            images.indices(root, self._paths(number, rows[number], batch, self.columns.a))
            images.indices(root, self._paths(number, rows[number], batch, self.columns.b))
            if self.has_label:
                read_labels(_column(batch, LABEL), self.names[number], rows[number])
            kinds.see(batch)
            rows[number] += batch.num_rows
        if not any(rows):
            more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            raise ManifestError(f"{self.names[0]}{more}: the manifest has no rows")
        return Scan(images, sum(rows), self._carried_schema(kinds.types()), tuple(rows))

    def blocks(self, scan: Scan) -> Iterator[Block]:
        """Stream the rows of a manifest that was scanned.

        Raises `ManifestError` when its files changed since: other rows, images or types.
        """
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
        for number, (found, expected) in enumerate(zip(rows, scan.file_rows, strict=True)):
            if found != expected:
                raise self._changed(number, f"{expected} rows at first, {found} now")

    def place(self, scan: Scan, row: int) -> tuple[str, int]:
        """Where a row of the whole manifest (from 0) stands: its file, and its number there (from 1)."""
        ends = list(accumulate(scan.file_rows))
        number = bisect_right(ends, row)
        return self.names[number], row - (ends[number] - scan.file_rows[number]) + 1

    def _changed(self, number: int, what: str) -> ManifestError:
        return ManifestError(f"{self.names[number]}: the file changed while it was read: {what}")

    def _carried_schema(self, kinds: dict[str, pa.DataType]) -> pa.Schema:
        fields = []
        for name, kind in self._types.items():
            if name == LABEL:
                fields.append(pa.field(TRUE_LABEL, pa.int8()))
            else:
                fields.append(pa.field(name, kinds.get(name, kind)))
        return pa.schema(fields)

    def _batches(self) -> Iterator[tuple[int, ImageRoot, pa.RecordBatch]]:
        """Number of the file, root of its images, and its next rows (at least one), up to the limit."""
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
            return ImageRoot(self._image_root, fenced=True)
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
                    raise self._changed(number, f"column '{source}' no longer holds {target.type}") from exc
            elif cells.type != target.type:
                cells = cells.cast(target.type)
            columns.append(cells)
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def _untyped_names(self) -> list[str]:
        """The CSV columns whose types are to be found; none for Parquet and tables."""
        if not _is_text(self._files[0]):
            return []
        known = {self.columns.a, self.columns.b, LABEL}
        return [name for name in self._types if name not in known]

    def _check_columns(self) -> None:
        first = self.names[0]
        for file, name, schema in zip(self._files, self.names, self._schemas, strict=True):
            check_names(name, schema.names, self.columns.a, self.columns.b)
            if _is_text(file) != _is_text(self._files[0]):
                raise ManifestError(f"{name}: {first} is of another format; give files of one format only")
            check_same_names(name, schema.names, first, self._schemas[0].names)
            if self.has_label:
                check_label_type(name, schema.field(LABEL).type)

    def _common_type(self, name: str) -> pa.DataType:
        if name == LABEL:
            return pa.int8()
        kinds = {file: each.field(name).type for file, each in zip(self.names, self._schemas, strict=True)}
        return common_type(name, kinds, paths=name in (self.columns.a, self.columns.b))


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    return batch.column(batch.schema.get_field_index(name))


def _is_text(file: TableFile | pa.Table) -> bool:
    return isinstance(file, TableFile) and not file.is_parquet


def _name(file: TableFile | pa.Table) -> str:
    return str(file.location) if isinstance(file, TableFile) else "the table"
