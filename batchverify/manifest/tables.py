"""Manifest files: found by path, folder, glob or URI; CSV, TSV and Parquet as streams of Arrow batches."""

from __future__ import annotations

import fnmatch
import glob
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from batchverify.errors import ManifestError, UsageError, first_line
from batchverify.storage.location import Location

PARQUET = (".parquet", ".pq")
TABS = (".tsv", ".tab")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
BLOCK_BYTES = 4 << 20
BATCH_ROWS = 65_536
BUNDLE_ROWS = 8 * BATCH_ROWS
# How files begin that people take for text.
_SIGNATURES = {
    b"PAR1": "a Parquet file; give it a name that ends in .parquet",
    b"PK\x03\x04": "a zip or Excel file; save it as CSV",
    b"\x1f\x8b": "compressed; give it a name that ends in .csv.gz",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}


def find_files(source: str) -> list[Location]:
    """The manifest files that a path, folder, glob or URI names, sorted by path.

    Raises `ManifestError` when there is none, or it cannot be looked up.
    """
    location = Location.parse(source)
    try:
        return _found(source, location)
    except (OSError, pa.ArrowException) as exc:
        raise ManifestError(f"{source}: cannot be read: {first_line(exc)}") from exc


def _found(source: str, location: Location) -> list[Location]:
    kind = location.kind()
    if kind == "file":
        return [location]
    if kind == "folder":
        found = [each for each, _ in location.files() if is_manifest(each)]
        if not found:
            raise ManifestError(f"{source}: the folder holds no .csv, .tsv or .parquet file")
        return found
    if not any(mark in location.path for mark in "*?["):
        raise ManifestError(f"{source}: no such file or folder")
    found = [each for each in _matching(location) if is_manifest(each)]
    if not found:
        raise ManifestError(f"{source}: no .csv, .tsv or .parquet file matches")
    return found


def _matching(pattern: Location) -> list[Location]:
    if pattern.is_local:
        found = [Location.parse(path) for path in sorted(glob.glob(pattern.path, recursive=True))]  # noqa: PTH207
        return [each for each in found if each.kind() == "file"]
    wanted = pattern.path.split("/")
    fixed = next(at for at, part in enumerate(wanted) if any(mark in part for mark in "*?["))
    folder = Location("/".join(wanted[:fixed]), pattern.scheme, pattern.query)
    listed = [each for each, _ in folder.files(recursive=True)]
    return [each for each in listed if _fits(each.path.split("/"), wanted)]


def _fits(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether a path fits a pattern, part by part as `glob` reads it; `**` stands for any number of parts."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_fits(parts[at:], wanted[1:]) for at in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


def would_find(source: str, location: Location) -> bool:
    """Whether a file at `location`, once it is there, is one of those that a folder or glob names as a manifest."""
    place = Location.parse(source)
    kind, alike = place.kind(), (place.scheme, place.query) == (location.scheme, location.query)
    if kind == "file" or not alike or not is_manifest(location):
        return False
    return location.parent == place or _fits(location.path.split("/"), place.path.split("/"))


def is_manifest(location: Location) -> bool:
    """Whether a file's name ends like a manifest's; hidden files and `_SUCCESS` are none."""
    if location.name.startswith((".", "_")):
        return False
    return location.suffix in PARQUET or _plain_name(location).endswith((".csv", *TABS))


def _plain_name(location: Location) -> str:
    """The name in lower case without the ending of a compression."""
    name = location.name.lower()
    return name.removesuffix(location.suffix) if location.suffix in COMPRESSIONS else name


@dataclass(frozen=True)
class TableFile:
    """One manifest file: `batches` streams it; cells of a CSV come as the strings that stand there."""

    location: Location

    @property
    def is_parquet(self) -> bool:
        """Whether the file's name says Parquet; everything else is read as delimited text."""
        return self.location.suffix in PARQUET

    def schema(self) -> pa.Schema:
        """Column names and types; every column of a CSV is a string."""
        with self._seam():
            if self.is_parquet:
                with self._open() as source:
                    return pq.ParquetFile(source).schema_arrow.remove_metadata()
            self._check_signature()
            with self._open() as source:
                return pa.schema([(name, pa.string()) for name in self._reader(source, None).schema.names])

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The rows in order, in batches of bounded size. schema: what `schema` returned."""
        with self._seam(schema.names), self._open() as source:
            reader = pq.ParquetFile(source) if self.is_parquet else self._reader(source, schema)
            found = reader.schema_arrow if self.is_parquet else reader.schema
            if not found.equals(schema):
                raise ManifestError(f"{self.location}: the file changed while it was read: other columns")
            if not self.is_parquet:
                yield from self._text(reader)
                return
            for groups in _bundles(reader.metadata):
                yield from reader.iter_batches(BATCH_ROWS, row_groups=groups)

    def chunks(self) -> Iterator[bytes]:
        """The file's bytes as they are stored."""
        filesystem, path = self.location.filesystem, self.location.path
        with self._seam(), filesystem.open_input_stream(path, compression=None) as source:
            while chunk := source.read(1 << 20):
                yield chunk

    def _text(self, reader: Any) -> Iterator[pa.RecordBatch]:
        """The batches of a text file; a quote left open would otherwise swallow rows in silence."""
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
        breaks = last is not None and last.column(last.num_columns - 1)[-1].as_py().endswith(("\n", "\r"))
        if last is not None and breaks and not self._ends_with_quote():
            raise ManifestError(
                f"{self.location}: row {rows}: column '{last.schema.names[-1]}' runs to the end of the file; "
                "is a quote left open?"
            )

    def _ends_with_quote(self) -> bool:
        """Whether the last character but line breaks is a quote; reads everything, for the rare doubt."""
        end = b""
        with self._open() as source:
            while chunk := source.read(BLOCK_BYTES):
                end = chunk.rstrip(b"\r\n") or end
        return end.endswith(b'"')

    def _check_signature(self) -> None:
        if _plain_name(self.location).endswith(PARQUET):
            raise ManifestError(f"{self.location}: a compressed Parquet file; unpack it first")
        with self._open() as source:
            start = source.read(4)
        for signature, what in _SIGNATURES.items():
            if start.startswith(signature):
                raise ManifestError(f"{self.location}: {what}")

    def _reader(self, source: Any, column_types: pa.Schema | None) -> Any:
        return pacsv.open_csv(
            source,
            # One thread: only then does the parser know the number of a row that it cannot read.
            read_options=pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
            parse_options=pacsv.ParseOptions(
                delimiter="\t" if _plain_name(self.location).endswith(TABS) else ",", newlines_in_values=True
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=column_types, strings_can_be_null=False, check_utf8=True, null_values=[]
            ),
        )

    def _open(self) -> Any:
        filesystem, path = self.location.filesystem, self.location.path
        if self.is_parquet:
            return filesystem.open_input_file(path)
        return filesystem.open_input_stream(path, compression=COMPRESSIONS.get(self.location.suffix))

    @contextmanager
    def _seam(self, names: Sequence[str] = ()) -> Iterator[None]:
        """pyarrow's errors as ours. names: the columns, where they are known."""
        try:
            yield
        except FileNotFoundError as exc:
            raise ManifestError(f"{self.location}: no such file") from exc
        except UnicodeDecodeError as exc:
            raise ManifestError(f"{self.location}: the names of the columns are not UTF-8") from exc
        except pa.ArrowInvalid as exc:
            what = (
                f"not a readable Parquet file: {first_line(exc)}"
                if self.is_parquet
                else _explained(exc, names)
            )
            raise ManifestError(f"{self.location}: {what}") from exc
        except (OSError, pa.ArrowException) as exc:
            raise ManifestError(f"{self.location}: cannot be read: {first_line(exc)}") from exc


def _bundles(metadata: pq.FileMetaData) -> Iterator[list[int]]:
    """Row groups to be read together. One call for all keeps what it has read, measured: 29 bytes a row."""
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


def _explained(exc: pa.ArrowInvalid, names: Sequence[str]) -> str:
    """pyarrow's message about a text file in our words: rows are counted from 1 without the header."""
    message = first_line(exc)
    if "Empty CSV" in message:
        return "the file has no rows; a header with image_a and image_b, and rows below it, are needed"
    uneven = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+): (.*)", message)
    if uneven:
        row, expected, found, text = uneven.groups()
        return f"row {int(row) - 1}: {expected} columns expected, found {found}: {text[:80]!r}"
    invalid = re.search(r"column #(\d+): Row #(\d+): .*invalid UTF8", message)
    if invalid:
        column, row = int(invalid.group(1)), int(invalid.group(2)) - 1
        return f"row {row}: column {repr(names[column]) if names else column + 1}: not UTF-8"
    return f"not a table of text: {message}"


def table_of(source: Any) -> pa.Table:
    """A pandas DataFrame, pyarrow Table or anything with an Arrow stream as a Table."""
    if isinstance(source, pa.Table):
        return source
    try:
        if type(source).__module__.split(".")[0] == "pandas" and hasattr(source, "columns"):
            return pa.Table.from_pandas(source, preserve_index=False).replace_schema_metadata(None)
        if hasattr(source, "__arrow_c_stream__"):
            return pa.table(source)
    except (pa.ArrowException, ValueError, TypeError) as exc:
        raise ManifestError(f"the table: {' '.join(str(part) for part in exc.args)}") from exc
    raise UsageError(f"a manifest is a path, a DataFrame or an Arrow table, not {type(source).__name__}")


class _Tap(io.RawIOBase):
    """A file that hands on what is written to it."""

    def __init__(self, take: Callable[[Any], None]) -> None:
        self._take = take

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._take(data)
        return len(data)


def stream_table(table: pa.Table, take: Callable[[Any], None]) -> None:
    """Hand on the bytes of a table's Arrow stream: schema, rows, and the values that dictionaries hold."""
    with pa.ipc.new_stream(_Tap(take), table.schema) as writer:
        writer.write_table(table)
