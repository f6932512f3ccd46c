"""Manifest files as streams of Arrow batches: CSV, TSV and Parquet, errors that name file and row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from batchverify.errors import ManifestError
from batchverify.locations import Location

PARQUET = (".parquet", ".pq")
TABS = (".tsv", ".tab")
TEXTS = (".csv", ".txt", *TABS)
BLOCK_BYTES = 4 << 20
BATCH_ROWS = 65_536
# Canonical numbers only: a cell such as 007, 1.50 or +3 would not survive the way there and back.
_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"
_DECIMAL = r"^-?(0|[1-9][0-9]{0,8})\.(0|[0-9]{0,5}[1-9])$"


def is_manifest(location: Location) -> bool:
    """Whether a file's name ends like a manifest's, compressed or not."""
    return not location.name.startswith((".", "_")) and _plain_name(location).endswith((*PARQUET, *TEXTS))


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
        with self._seam(), self._open() as source:
            if self.is_parquet:
                return pq.ParquetFile(source).schema_arrow.remove_metadata()
            return pa.schema([(name, pa.string()) for name in self._reader(source, None).schema.names])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in order, in batches of bounded size."""
        schema = self.schema()
        with self._seam(), self._open() as source:
            if self.is_parquet:
                yield from pq.ParquetFile(source).iter_batches(BATCH_ROWS)
            else:
                yield from self._reader(source, schema)

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
        return filesystem.open_input_file(path) if self.is_parquet else filesystem.open_input_stream(path)

    @contextmanager
    def _seam(self) -> Iterator[None]:
        """pyarrow's errors as ours."""
        try:
            yield
        except FileNotFoundError as exc:
            raise ManifestError(f"{self.location}: no such file") from exc
        except pa.ArrowInvalid as exc:
            what = f"not a Parquet file: {_first_line(exc)}" if self.is_parquet else _explained(exc)
            raise ManifestError(f"{self.location}: {what}") from exc
        except (OSError, pa.ArrowException) as exc:
            raise ManifestError(f"{self.location}: cannot be read: {_first_line(exc)}") from exc


def _plain_name(location: Location) -> str:
    """The name in lower case without the ending of a compression."""
    return location.name.lower().removesuffix(".gz").removesuffix(".zst")


def _explained(exc: pa.ArrowInvalid) -> str:
    """pyarrow's message about a text file in our words: rows are counted from 1 without the header."""
    message = _first_line(exc)
    if "Empty CSV" in message:
        return "the file is empty; a header with image_a and image_b is needed"
    uneven = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+): (.*)", message)
    if uneven:
        row, expected, found, text = uneven.groups()
        return f"row {int(row) - 1}: {expected} columns expected, found {found}: {text[:80]!r}"
    invalid = re.search(r"column #(\d+): Row #(\d+): .*invalid UTF8", message)
    if invalid:
        return f"row {int(invalid.group(2)) - 1}: column {int(invalid.group(1)) + 1}: not UTF-8"
    return f"not a table of text: {message}"


def _first_line(exc: Exception) -> str:
    return str(exc).splitlines()[0] if str(exc) else type(exc).__name__


class LosslessTypes:
    """Finds, batch by batch, which string columns of a CSV are numbers that survive the way back.

    A column becomes int64 or float64 when every non-empty cell is a canonical number; `007` and `1.50`
    stay strings.
    """

    def __init__(self, names: list[str]) -> None:
        self._candidates = {name: [pa.int64(), pa.float64()] for name in names}
        self._filled: set[str] = set()

    def see(self, batch: pa.RecordBatch) -> None:
        """Narrow the candidates down by one more batch of string columns."""
        for name, kinds in self._candidates.items():
            if kinds:
                cells = batch.column(name)
                cells = cells.filter(pc.not_equal(cells, ""))
                if len(cells):
                    self._filled.add(name)
                    kinds[:] = [kind for kind in kinds if _all_match(cells, kind)]

    def types(self) -> dict[str, pa.DataType]:
        """The type of each column seen."""
        return {
            name: kinds[0] if kinds and name in self._filled else pa.string()
            for name, kinds in self._candidates.items()
        }


def _all_match(cells: pa.Array, kind: pa.DataType) -> bool:
    pattern = _INTEGER if pa.types.is_integer(kind) else _DECIMAL
    return bool(pc.all(pc.match_substring_regex(cells, pattern)).as_py())


def convert(cells: pa.Array, kind: pa.DataType) -> pa.Array:
    """String cells to the type that `LosslessTypes` found; empty cells of numbers become null."""
    if pa.types.is_string(kind):
        return cells
    return pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells).cast(kind)
