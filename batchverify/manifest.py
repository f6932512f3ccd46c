"""Manifests: open, check and stream tables of image pairs; the set of their unique images."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.errors import ManifestError
from batchverify.images import ImageRoot
from batchverify.locations import Location, scheme_of
from batchverify.records import Skipped
from batchverify.tables import LosslessTypes, TableFile, convert, is_manifest

TRUE_LABEL = "true_label"
LABEL = "label"
SCORE_COLUMNS = ("probability", "label", "similarity", "status", "error_a", "error_b")
_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "": None, "None": None, "False": 0, "True": 1, "nan": None}


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


@dataclass
class UniqueImages:
    """Every distinct image reference of a manifest, in order of first appearance.

    references: one entry an image, an absolute path or URI, or the reason why it is refused.
    """

    references: list[str | Skipped] = field(default_factory=list)
    _by_root: dict[ImageRoot, dict[str | None, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.references)

    def indices(self, root: ImageRoot, cells: pa.Array) -> np.ndarray:
        """The index of each cell's image, new images added: (N,) int64."""
        known = self._by_root.setdefault(root, {})
        encoded = cells.dictionary_encode()
        values = [*encoded.dictionary.to_pylist(), None]
        table = np.array([self._index(known, root, value) for value in values if value is not None] + [-1])
        if encoded.null_count:
            table[-1] = self._index(known, root, None)
        codes = encoded.indices.fill_null(len(table) - 1).to_numpy(zero_copy_only=False)
        return table[codes]

    def _index(self, known: dict[str | None, int], root: ImageRoot, cell: str | None) -> int:
        index = known.get(cell)
        if index is None:
            index = known[cell] = len(self.references)
            self.references.append(root.resolve(cell))
        return index


@dataclass(frozen=True)
class Scan:
    """What one reading of a manifest tells: its unique images, its number of rows, the columns that come back."""

    images: UniqueImages
    rows: int
    carried: pa.Schema


class Manifest:
    """A manifest of one or several files, or a table in memory; streamed, never held whole.

    `scan` first, then `blocks`, again and again: it yields the same rows. Raises `ManifestError` for what is no
    manifest, with file, row, column and value.
    """

    def __init__(
        self,
        files: list[TableFile | pa.Table],
        *,
        columns: Columns | None = None,
        image_root: str | None = None,
    ) -> None:
        self.columns = columns or Columns()
        self._files = files
        self._image_root = image_root
        self._schemas = [_schema(file) for file in files]
        self._check_columns()

    @classmethod
    def open(
        cls, source: Any, *, columns: Columns | None = None, image_root: str | os.PathLike[str] | None = None
    ) -> Manifest:
        """Open a path, glob, folder, URI, pandas DataFrame or pyarrow Table."""
        root = os.fspath(image_root) if image_root is not None else None
        if isinstance(source, pa.Table):
            return cls([source], columns=columns, image_root=root)
        if hasattr(source, "columns") and hasattr(source, "to_numpy"):
            table = pa.Table.from_pandas(source, preserve_index=False).replace_schema_metadata(None)
            return cls([table], columns=columns, image_root=root)
        files: list[TableFile | pa.Table] = [TableFile(location) for location in find_files(os.fspath(source))]
        return cls(files, columns=columns, image_root=root)

    @property
    def names(self) -> list[str]:
        """Where the manifest lies, file by file."""
        return [_name(file) for file in self._files]

    @cached_property
    def has_label(self) -> bool:
        """Whether the manifest states the truth."""
        return LABEL in self._schemas[0].names

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the files' bytes, in hex."""
        digest = hashlib.sha256()
        for file in self._files:
            if isinstance(file, TableFile):
                with file.location.filesystem.open_input_stream(file.location.path, compression=None) as source:
                    while chunk := source.read(1 << 20):
                        digest.update(chunk)
            else:
                for batch in file.to_batches():
                    digest.update(batch.serialize())
        return digest.hexdigest()

    def scan(self) -> Scan:
        """Read everything once: check it, collect the unique images, find the types of CSV columns."""
        images, rows = UniqueImages(), 0
        kinds = LosslessTypes(self._untyped_names())
        for file, root, row, batch in self._batches():
            images.indices(root, self._paths(file, batch, self.columns.a))
            images.indices(root, self._paths(file, batch, self.columns.b))
            if self.has_label:
                read_labels(batch.column(batch.schema.get_field_index(LABEL)), _name(file), row)
            kinds.see(batch)
            rows += batch.num_rows
        if not rows:
            raise ManifestError(f"{', '.join(self.names)}: the manifest has no rows")
        return Scan(images, rows, self._carried_schema(kinds.types()))

    def blocks(self, scan: Scan) -> Iterator[Block]:
        """Stream the rows of a manifest that was scanned."""
        first = 0
        for file, root, row, batch in self._batches():
            a = scan.images.indices(root, self._paths(file, batch, self.columns.a))
            b = scan.images.indices(root, self._paths(file, batch, self.columns.b))
            yield Block(first, self._carried(file, row, batch, scan.carried), a, b)
            first += batch.num_rows

    def _carried_schema(self, kinds: dict[str, pa.DataType]) -> pa.Schema:
        fields = []
        for each in self._schemas[0]:
            if each.name == LABEL:
                fields.append(pa.field(TRUE_LABEL, pa.int8()))
            else:
                fields.append(pa.field(each.name, kinds.get(each.name, each.type)))
        return pa.schema(fields)

    def _batches(self) -> Iterator[tuple[TableFile | pa.Table, ImageRoot, int, pa.RecordBatch]]:
        for file in self._files:
            row = 0
            stream = file.batches() if isinstance(file, TableFile) else iter(file.to_batches(65_536))
            for batch in stream:
                yield file, self._root(file), row, batch
                row += batch.num_rows

    def _root(self, file: TableFile | pa.Table) -> ImageRoot:
        if self._image_root is not None:
            return ImageRoot(Location.parse(self._image_root), fenced=True)
        return ImageRoot(file.location.parent if isinstance(file, TableFile) else Location.parse("."))

    def _paths(self, file: TableFile | pa.Table, batch: pa.RecordBatch, name: str) -> pa.Array:
        cells = batch.column(batch.schema.get_field_index(name))
        kind = cells.type.value_type if pa.types.is_dictionary(cells.type) else cells.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise ManifestError(f"{_name(file)}: column '{name}' must hold paths (strings), found {kind}")
        return cells.cast(pa.string())

    def _carried(
        self, file: TableFile | pa.Table, row: int, batch: pa.RecordBatch, schema: pa.Schema
    ) -> pa.RecordBatch:
        columns = []
        for source, target in zip(self._schemas[0].names, schema, strict=True):
            cells = batch.column(batch.schema.get_field_index(source))
            if source == LABEL:
                cells = read_labels(cells, _name(file), row)
            elif isinstance(file, TableFile) and not file.is_parquet:
                cells = convert(cells, target.type)
            else:
                cells = cells.cast(target.type)
            columns.append(cells)
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def _untyped_names(self) -> list[str]:
        """The CSV columns whose types are to be found; none for Parquet and tables."""
        if not all(isinstance(file, TableFile) and not file.is_parquet for file in self._files):
            return []
        known = {self.columns.a, self.columns.b, LABEL}
        return [name for name in self._schemas[0].names if name not in known]

    def _check_columns(self) -> None:
        for file, schema in zip(self._files, self._schemas, strict=True):
            _check_names(_name(file), schema.names, self.columns)
            if schema.names != self._schemas[0].names:
                raise ManifestError(
                    f"{_name(file)}: columns {', '.join(schema.names)} differ from those of "
                    f"{self.names[0]}: {', '.join(self._schemas[0].names)}"
                )


def find_files(source: str) -> list[Location]:
    """The manifest files that a path, folder, glob or URI names, sorted by path."""
    location = Location.parse(source)
    kind = _kind(location)
    if kind == "file":
        return [location]
    if kind == "folder":
        found = [each for each, _ in location.files() if is_manifest(each)]
        if not found:
            raise ManifestError(f"{source}: the folder holds no .csv, .tsv or .parquet file")
        return found
    if any(mark in source for mark in "*?["):
        found = _matching(location)
        if found:
            return found
        raise ManifestError(f"{source}: no file matches")
    raise ManifestError(f"{source}: no such file or folder")


def _kind(location: Location) -> str:
    try:
        return location.kind()
    except OSError as exc:
        raise ManifestError(f"{location}: cannot be read: {exc}") from exc


def _matching(pattern: Location) -> list[Location]:
    if pattern.is_local:
        found = [Location.parse(path) for path in sorted(glob.glob(pattern.path, recursive=True))]  # noqa: PTH207
        return [each for each in found if is_manifest(each) and each.kind() == "file"]
    fixed = pattern.path[: min(pattern.path.find(mark) for mark in "*?[" if mark in pattern.path)]
    folder = Location(fixed.rsplit("/", 1)[0], pattern.scheme, pattern.query)
    files = [each for each, _ in folder.files(recursive=True)]
    return [each for each in files if fnmatch.fnmatchcase(each.path, pattern.path)]


def read_labels(cells: pa.Array, file: str, row: int) -> pa.Array:
    """Labels as nullable int8: 0, 1, blank. `row` counts the file's rows before these, from 0."""
    distinct = pc.unique(cells).to_pylist()
    values = {value: _LABELS.get(str(value) if value is not None else "", "bad") for value in distinct}
    bad = [value for value, label in values.items() if label == "bad"]
    if bad:
        at = row + 1 + int(pc.index(cells, pa.scalar(bad[0], cells.type)).as_py())
        raise ManifestError(f"{file}: row {at}: label must be 0 or 1, got {bad[0]!r}")
    encoded = cells.dictionary_encode() if not pa.types.is_dictionary(cells.type) else cells
    table = pa.array([values[value] for value in encoded.dictionary.to_pylist()], pa.int8())
    return table.take(encoded.indices)


def _check_names(file: str, names: list[str], columns: Columns) -> None:
    for wanted, option in ((columns.a, "--column-a"), (columns.b, "--column-b")):
        if wanted not in names:
            raise ManifestError(
                f"{file}: no column '{wanted}' ({option}); the file has {', '.join(names) or 'no columns'}"
            )
    if columns.a == columns.b:
        raise ManifestError(f"{file}: column '{columns.a}' is named for both sides")
    for name in names:
        if names.count(name) > 1:
            raise ManifestError(f"{file}: column '{name}' stands there {names.count(name)} times")
        reserved = {TRUE_LABEL, *SCORE_COLUMNS} - {LABEL}
        if name in reserved:
            raise ManifestError(f"{file}: column '{name}' is a name of the output; rename it in the manifest")


def _schema(file: TableFile | pa.Table) -> pa.Schema:
    return file.schema() if isinstance(file, TableFile) else file.schema


def _name(file: TableFile | pa.Table) -> str:
    return str(file.location) if isinstance(file, TableFile) else "the table"
