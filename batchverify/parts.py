"""Parts: the rows of a job in contiguous pieces, a file each, and which of them are done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchverify.errors import BatchverifyError
from batchverify.manifest.manifest import Block
from batchverify.results import RECORD_KEY
from batchverify.sinks import PART, SUCCESS, FileSink, part_files
from batchverify.storage.location import Location
from batchverify.storage.object_store import is_denied, is_passing


@dataclass(frozen=True)
class PartRecord:
    """What the footer of a part says. token: of the attempt at the job that wrote it."""

    token: str
    part: int
    rows: int
    scored: int
    different: int

    def to_json(self) -> dict[str, Any]:
        """As it stands in the footer."""
        return {**vars(self), "record": SUCCESS}

    @classmethod
    def of(cls, table: pa.Table, token: str, part: int) -> PartRecord:
        """The record of result rows."""
        label = table.column("label")
        return cls(token, part, len(label), len(label) - label.null_count, pc.sum(label).as_py() or 0)


@dataclass
class Parts:
    """The part files of one attempt at a job in `folder`: part n holds the rows from n * `size` on.

    Borders depend on row numbers alone, so that every run of a job cuts alike. passing: they are soon read and
    written once more. done: the records of the parts that are whole, by number.
    """

    folder: Location
    token: str
    size: int
    passing: bool = False
    done: dict[int, PartRecord] = field(default_factory=dict)

    def place(self, number: int) -> Location:
        """The file of a part."""
        return self.folder.join(f"part-{number:05d}.parquet")

    def sink(self, number: int, schema: pa.Schema) -> FileSink:
        """A part in the making."""
        return FileSink(self.place(number), schema, passing=self.passing)

    def look(self, rows: int) -> None:
        """Find what is done: the parts of this attempt with as many of all `rows` as their numbers demand."""
        for place in part_files(self.folder):
            about, there = footer_and_rows(place)
            if about.get("token") == self.token and self.place(int(about["part"])).name == place.name:
                names = PartRecord.__dataclass_fields__
                record = PartRecord(**{name: about[name] for name in names})
                if record.rows == there == min(self.size, rows - record.part * self.size):
                    self.done[record.part] = record

    def split(self, blocks: Iterable[Block]) -> Iterator[tuple[int, Block]]:
        """Blocks cut at the borders, each with the number of its part."""
        for block in blocks:
            start = 0
            while start < len(block.a):
                row = block.first + start
                piece = block.slice(start, self.size - row % self.size)
                yield row // self.size, piece
                start += len(piece.a)

    def missing(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The pieces of the parts that are not done."""
        done = set(self.done)
        return (piece for number, piece in self.split(blocks) if number not in done)

    def numbers(self, rows: int) -> range:
        """The numbers of all parts of so many rows."""
        return range(-(-rows // self.size))

    def tables(self, rows: int) -> Iterator[pa.Table]:
        """Every part's rows, in order. `BatchverifyError` where one is not whole."""
        for number in self.numbers(rows):
            place = self.place(number)
            table = read_table(place)
            if table.num_rows != min(self.size, rows - number * self.size):
                raise BatchverifyError(f"{place}: {table.num_rows:,} rows; the part was changed")
            yield table


class PartWriter:
    """Takes result rows in order, in any one thread, and publishes each part once its last row is there.

    before: called before each part is published.
    """

    def __init__(self, parts: Parts, schema: pa.Schema, total: int, before: Callable[[], None]) -> None:
        self._parts, self._schema, self._total, self._before = parts, schema, total, before
        self._sink: FileSink | None = None
        self._tables: list[PartRecord] = []
        # A file that is closed while it is written to ends the process.
        self._busy, self._abandoned = Lock(), False

    def write(self, first: int, table: pa.Table) -> None:
        """Take rows of one part; `first`: the number of their first row in the whole manifest."""
        with self._busy:
            if self._abandoned:
                raise BatchverifyError(f"{self._parts.folder}: rows came after the run was given up")
            self._write(first, table)

    def _write(self, first: int, table: pa.Table) -> None:
        number = first // self._parts.size
        if self._sink is None:
            self._sink = self._parts.sink(number, self._schema)
        self._sink.write(table)
        self._tables.append(PartRecord.of(table, self._parts.token, number))
        if first + table.num_rows == min((number + 1) * self._parts.size, self._total):
            self._close(number)

    def _close(self, number: int) -> None:
        rows, scored, different = (
            sum(getattr(each, name) for each in self._tables) for name in ("rows", "scored", "different")
        )
        record = PartRecord(self._parts.token, number, rows, scored, different)
        if self._sink is not None:
            self._before()
            self._sink.finish(record.to_json())
        self._parts.done[number] = record
        self._sink, self._tables = None, []

    def abandon(self) -> None:
        """Remove the part in the making; no rows are taken any more."""
        with self._busy:
            self._abandoned = True
            if self._sink is not None:
                self._sink.abandon()
                self._sink = None


def footer(place: Location) -> Mapping[str, Any]:
    """The run record, or the part's, in a Parquet file's footer; empty where there is none.

    `BatchverifyError` where an object store does not say.
    """
    return footer_and_rows(place)[0]


def footer_and_rows(place: Location) -> tuple[Mapping[str, Any], int]:
    """`footer`, and how many rows the file itself counts."""
    try:
        with place.filesystem.open_input_file(place.path) as file:
            found = pq.ParquetFile(file).metadata
        record = json.loads((found.metadata or {}).get(RECORD_KEY.encode(), b"{}"))
    except (OSError, pa.ArrowException, ValueError) as exc:
        if is_passing(exc) or is_denied(exc):
            # What cannot be read now may be a finished part.
            raise BatchverifyError(f"{place}: cannot be read: {exc}") from exc
        return {}, 0
    return (record if isinstance(record, dict) else {}), found.num_rows


def read_table(place: Location, columns: list[str] | None = None) -> pa.Table:
    """The rows of one Parquet file; `BatchverifyError` where it cannot be read."""
    try:
        with place.filesystem.open_input_file(place.path) as file:
            return pq.ParquetFile(file).read(columns)
    except (OSError, pa.ArrowException) as exc:
        raise BatchverifyError(f"{place}: cannot be read: {exc}") from exc


def number_of(place: Location) -> int:
    """The number in a part file's name."""
    match = PART.match(place.name)
    return int(match.group(1)) if match else -1
