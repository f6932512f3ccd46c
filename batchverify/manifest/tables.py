"""Manifest files: CSV, TSV and Parquet, found by path, folder, glob or URI and read as Arrow batches."""

from __future__ import annotations

import fnmatch
import glob
import io
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from batchverify.errors import ManifestError, UsageError, first_line
from batchverify.manifest.columns import quoted
from batchverify.storage.location import Location
from batchverify.storage.object_store import retry

PARQUET = (".parquet", ".pq")
TABS = (".tsv", ".tab")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
BLOCK_BYTES = 4 << 20
BATCH_ROWS = 65_536
BUNDLE_ROWS = 8 * BATCH_ROWS
# What pyarrow and pandas raise for cells that Arrow cannot hold.
_NOT_ARROW = (pa.ArrowException, ValueError, TypeError, OverflowError)
# Characters of another library's message, and types of cells, that a message shows.
_LONGEST, _KINDS = 300, 4
# Bytes at a file's start that are looked at to see what it is.
START_BYTES = 1 << 16
_MARK = b"\xef\xbb\xbf"
# Excel's own first line, which says what separates the columns.
_EXCEL_LINE = re.compile(rb'"?sep=.?"?[,;\t]*', re.IGNORECASE)
_SEPARATORS = {b",": "commas", b";": "semicolons", b"\t": "tabs", b"|": "'|'"}
# First bytes of files that are mistaken for text.
_SIGNATURES = {
    b"PAR1": "a Parquet file; give it a name that ends in .parquet",
    b"PK\x03\x04": "a zip or Excel file; save it as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel file; save it as CSV",
    b"\x1f\x8b": "compressed; give it a name that ends in .csv.gz",
    b"\x28\xb5\x2f\xfd": "compressed; give it a name that ends in .csv.zst",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}


def find_files(source: str) -> list[Location]:
    """The manifest files that a path, folder, glob or URI names, sorted by path.

    Raises `ManifestError` if there is none or the file system cannot be asked.
    """
    location = Location.parse(source)
    try:
        kind = location.kind()
        if kind == "file":
            return [location]
        if kind == "folder":
            candidates, problem = [file for file, _ in location.files()], "the folder holds no {} file"
        elif _is_glob(location.path):
            candidates, problem = _matches(location), "no {} file matches"
        elif special := location.special():
            raise ManifestError(f"{source}: {special}; a manifest is read more than once: save it to a file")
        else:
            raise ManifestError(f"{source}: no such file or folder")
    except (OSError, pa.ArrowException) as exc:
        raise ManifestError(f"{source}: cannot be read: {first_line(exc)}") from exc
    manifests = [file for file in candidates if _is_manifest(file)]
    if not manifests:
        raise ManifestError(f"{source}: {problem.format('.csv, .tsv or .parquet')}")
    return manifests


def _is_glob(text: str) -> bool:
    return any(mark in text for mark in "*?[")


def _matches(pattern: Location) -> list[Location]:
    if pattern.is_local:
        paths = sorted(glob.glob(pattern.path, recursive=True))  # noqa: PTH207
        return [file for file in map(Location.parse, paths) if file.kind() == "file"]
    parts = pattern.path.split("/")
    fixed = next(index for index, part in enumerate(parts) if _is_glob(part))
    folder = Location("/".join(parts[:fixed]), pattern.scheme, pattern.query)
    return [file for file, _ in folder.files(recursive=True) if _fits(file.path.split("/"), parts)]


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a pattern, part by part as in `glob`; `**` stands for any number of parts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def would_find(source: str, file: Location) -> bool:
    """Whether a folder or glob `source` would name `file` as a manifest if the file existed.

    Raises `ManifestError` if the file system cannot be asked.
    """
    location = Location.parse(source)
    same_store = (location.scheme, location.query) == (file.scheme, file.query)
    try:
        is_file = location.kind() == "file"
    except OSError as exc:
        raise ManifestError(f"{source}: cannot be read: {first_line(exc)}") from exc
    if is_file or not same_store or not _is_manifest(file):
        return False
    return file.parent == location or _fits(file.path.split("/"), location.path.split("/"))


def _is_manifest(location: Location) -> bool:
    """Whether a file is a manifest by its name; hidden files and `_SUCCESS` are not."""
    if location.name.startswith((".", "_")):
        return False
    return location.suffix in PARQUET or _plain_name(location).endswith((".csv", *TABS))


def _plain_name(location: Location) -> str:
    """The name in lower case, without the suffix of a compression."""
    name = location.name.lower()
    return name.removesuffix(location.suffix) if location.suffix in COMPRESSIONS else name


@dataclass(frozen=True)
class TableFile:
    """One manifest file, streamed by `batches`; the cells of a CSV stay strings."""

    location: Location

    @property
    def is_parquet(self) -> bool:
        """Whether the file is Parquet by its name; other files are read as delimited text."""
        return self.location.suffix in PARQUET

    def schema(self) -> pa.Schema:
        """Column names and types; every column of a CSV is a string."""
        with self._seam():
            if self.is_parquet:
                with self._open() as source:
                    return pq.ParquetFile(source).schema_arrow.remove_metadata()
            self._check_start()
            with self._open() as source:
                return pa.schema([(name, pa.string()) for name in self._reader(source, None).schema.names])

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The rows in order, in batches of bounded size. schema: what `schema` returned."""
        with self._seam(schema.names), self._open() as source:
            reader = pq.ParquetFile(source) if self.is_parquet else self._reader(source, schema)
            current = reader.schema_arrow if self.is_parquet else reader.schema
            if not current.equals(schema):
                raise ManifestError(f"{self.location}: the file changed while it was read: other columns")
            if not self.is_parquet:
                yield from self._text(reader)
                return
            rows = 0
            for groups in _bundles(reader.metadata):
                for batch in reader.iter_batches(BATCH_ROWS, row_groups=groups):
                    rows += batch.num_rows
                    yield batch
            if rows != reader.metadata.num_rows:
                raise ManifestError(
                    f"{self.location}: damaged: {reader.metadata.num_rows} rows by its footer, {rows} were found"
                )

    def chunks(self) -> Iterator[bytes]:
        """The file's bytes, not decompressed."""
        filesystem, path = self.location.filesystem, self.location.path
        with self._seam(), filesystem.open_input_stream(path, compression=None) as source:
            while chunk := source.read(1 << 20):
                yield chunk

    def _text(self, reader: Any) -> Iterator[pa.RecordBatch]:
        """The batches of a text file. Refuses an open quote, which would swallow rows unnoticed."""
        rows, last = 0, None
        try:
            for batch in reader:
                rows, last = rows + batch.num_rows, batch if batch.num_rows else last
                yield batch
        except pa.ArrowInvalid as exc:
            if "straddling" not in str(exc):
                raise
            raise ManifestError(
                f"{self.location}: row {rows + 1}: longer than {BLOCK_BYTES >> 20} MB; is a quote left open?"
            ) from exc
        end = last.column(last.num_columns - 1)[-1].as_py() if last is not None else ""
        if last is not None and ("\n" in end or "\r" in end) and self._has_open_quote(last.schema):
            raise ManifestError(
                f"{self.location}: row {rows}: column {quoted(last.schema.names[-1])} runs to the end of the file; "
                "is a quote left open?"
            )

    def _has_open_quote(self, schema: pa.Schema) -> bool:
        """Whether a quoted cell runs to the end of the file: a row appended to it then becomes part of the cell.

        Reads the whole file, which is rarely needed.
        """
        first, token = "", uuid.uuid4().hex
        row = f"\n{token}{self._delimiter * (len(schema) - 1)}\n"
        with self._open() as source:
            for batch in self._reader(_Appended(source, row.encode()), schema):
                first = batch.column(0)[-1].as_py() if batch.num_rows else first
        return first != token

    def _check_start(self) -> None:
        """Refuse a file that cannot be a table of text, by its first bytes."""
        if _plain_name(self.location).endswith(PARQUET):
            raise ManifestError(f"{self.location}: a compressed Parquet file; unpack it first")
        with self._open() as source:
            start = bytes(source.read(START_BYTES))
        for signature, kind in _SIGNATURES.items():
            if start.startswith(signature):
                raise ManifestError(f"{self.location}: {kind}")
        lines = start.removeprefix(_MARK).lstrip(b"\r\n").splitlines(keepends=True)
        if lines and lines[0].endswith((b"\n", b"\r")):
            self._check_header(lines[0].rstrip(b"\r\n"))

    def _check_header(self, line: bytes) -> None:
        """Refuse a first line of which no separator is that of the format. Quotes may hold more lines of a header."""
        if _EXCEL_LINE.fullmatch(line):
            text = line.decode("utf-8", "replace")
            raise ManifestError(f"{self.location}: the first line is {text!r}, which only Excel reads; remove it")
        mine = self._delimiter.encode()
        others = [separator for separator in _SEPARATORS if separator in line and separator != mine]
        if mine not in line and others and line.count(b'"') % 2 == 0:
            hint = " or give it a name that ends in .tsv" if b"\t" in others else ""
            raise ManifestError(
                f"{self.location}: the columns are separated by {_SEPARATORS[others[0]]}; save the file with "
                f"{_SEPARATORS[mine]}{hint}"
            )

    @property
    def _delimiter(self) -> str:
        return "\t" if _plain_name(self.location).endswith(TABS) else ","

    def _reader(self, source: Any, column_types: pa.Schema | None) -> Any:
        return pacsv.open_csv(
            source,
            # With one thread the parser knows the number of a row that it cannot read.
            read_options=pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
            parse_options=pacsv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                column_types=column_types, strings_can_be_null=False, check_utf8=True, null_values=[]
            ),
        )

    def _open(self) -> Any:
        filesystem, path = self.location.filesystem, self.location.path
        if self.is_parquet:
            return retry(lambda: filesystem.open_input_file(path))
        compression = COMPRESSIONS.get(self.location.suffix)
        return retry(lambda: filesystem.open_input_stream(path, compression=compression))

    @contextmanager
    def _seam(self, names: Sequence[str] = ()) -> Iterator[None]:
        """Raise pyarrow's errors as `ManifestError`. names: of the columns, if known."""
        try:
            yield
        except FileNotFoundError as exc:
            raise ManifestError(f"{self.location}: no such file") from exc
        except UnicodeDecodeError as exc:
            raise ManifestError(f"{self.location}: the column names are not UTF-8") from exc
        except pa.ArrowInvalid as exc:
            problem = f"not a readable Parquet file: {first_line(exc)}" if self.is_parquet else _explain(exc, names)
            raise ManifestError(f"{self.location}: {problem}") from exc
        except (OSError, pa.ArrowException) as exc:
            raise ManifestError(f"{self.location}: cannot be read: {first_line(exc)}") from exc


def _bundles(metadata: pq.FileMetaData) -> Iterator[list[int]]:
    """Row groups to read together. Reading all in one call keeps memory: 29 bytes a row, measured."""
    bundle: list[int] = []
    rows = 0
    for group in range(metadata.num_row_groups):
        bundle.append(group)
        rows += metadata.row_group(group).num_rows
        if rows >= BUNDLE_ROWS:
            yield bundle
            bundle, rows = [], 0
    if bundle:
        yield bundle


def _explain(exc: pa.ArrowInvalid, names: Sequence[str]) -> str:
    """pyarrow's message about a text file, reworded. Rows count from 1, without the header."""
    message = first_line(exc)
    if "Empty CSV" in message:
        return "the file has no rows; it needs a header with image_a and image_b, and rows below it"
    uneven = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+): (.*)", message)
    if uneven:
        row, expected, count, text = uneven.groups()
        return f"row {int(row) - 1}: expected {expected} columns, found {count}: {text[:80]!r}"
    invalid = re.search(r"column #(\d+): Row #(\d+): .*invalid UTF8", message)
    if invalid:
        column, row = int(invalid.group(1)), int(invalid.group(2)) - 1
        return f"row {row}: column {quoted(names[column]) if names else column + 1}: not UTF-8"
    return f"not a table of text: {message}"


def table_of(source: Any) -> pa.Table:
    """A pandas DataFrame, a pyarrow Table or anything with an Arrow stream, as a Table."""
    if isinstance(source, pa.Table):
        return source
    try:
        if type(source).__module__.split(".")[0] == "pandas" and hasattr(source, "columns"):
            return _of_frame(source)
        if hasattr(source, "__arrow_c_stream__"):
            return pa.table(source)
    except _NOT_ARROW as exc:
        text = " ".join(str(part) for part in exc.args)
        raise ManifestError(f"the table: {text[:_LONGEST]}") from exc
    raise UsageError(f"a manifest is a path, a DataFrame or an Arrow table, not {type(source).__name__}")


def _of_frame(frame: Any) -> pa.Table:
    """A DataFrame as a Table. `Path` objects become strings; other objects that Arrow does not know are refused."""
    try:
        return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    except _NOT_ARROW:
        if frame.columns.has_duplicates:
            raise
        columns = [_of_series(str(name), cells) for name, cells in frame.items()]
        return pa.Table.from_arrays(columns, [str(name) for name in frame.columns])


def _of_series(name: str, cells: Any) -> pa.Array:
    """A column of a DataFrame, `Path` objects as strings."""
    if cells.dtype == object:
        cells = [os.fspath(cell) if isinstance(cell, os.PathLike) else cell for cell in cells]
    try:
        return pa.array(cells, from_pandas=True)
    except _NOT_ARROW as exc:
        kinds = ", ".join(sorted({type(cell).__name__ for cell in cells})[:_KINDS])
        raise ManifestError(
            f"the table: column {quoted(name)} holds {kinds}: Arrow cannot hold these in one column; image columns "
            "hold paths (strings)"
        ) from exc


class _Appended(io.RawIOBase):
    """A file with some bytes after its end."""

    def __init__(self, source: Any, end: bytes) -> None:
        self._source, self._end = source, end

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if data := bytes(self._source.read(size)):
            return data
        data, self._end = self._end[:size], self._end[size:]
        return data


class _Tap(io.RawIOBase):
    """A file that passes what is written to it to a function."""

    def __init__(self, take: Callable[[Any], None]) -> None:
        self._take = take

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._take(data)
        return len(data)


def stream_table(table: pa.Table, take: Callable[[Any], None]) -> None:
    """Pass the bytes of a table's Arrow stream (schema, rows and dictionary values) to `take`."""
    with pa.ipc.new_stream(_Tap(take), table.schema) as writer:
        writer.write_table(table)
