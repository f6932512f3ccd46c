"""Results: the output's schema, ordered and atomic writing, the run record in the footer."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchverify.errors import BatchverifyError, UsageError
from batchverify.gallery import Gallery
from batchverify.locations import Location, publish
from batchverify.manifest import Block

RECORD_KEY = "batchverify"
SUCCESS = "_SUCCESS"
PART_ROWS = 1_000_000
_PART = re.compile(r"^part-\d{5}\.parquet$")
SCORE_FIELDS = (
    pa.field("probability", pa.float32()),
    pa.field("label", pa.int8()),
    pa.field("similarity", pa.float32()),
    pa.field("status", pa.string()),
    pa.field("error_a", pa.string()),
    pa.field("error_b", pa.string()),
)


def output_schema(carried: pa.Schema) -> pa.Schema:
    """The manifest's columns, then the scores."""
    return pa.schema([*carried, *SCORE_FIELDS])


def result_table(
    block: Block, gallery: Gallery, scores: tuple[np.ndarray, np.ndarray], threshold: float
) -> pa.Table:
    """The output rows of a block. scores: (probability, similarity) of its usable pairs, in order."""
    unusable = ~gallery.usable(block.a, block.b)
    probability, similarity = np.zeros(len(unusable), np.float32), np.zeros(len(unusable), np.float32)
    probability[~unusable], similarity[~unusable] = scores
    # The comparison is made in the column's own precision, so that a reader who repeats it agrees.
    label = (probability >= np.float32(threshold)).astype(np.int8)
    error_a, error_b = gallery.reasons(block.a), gallery.reasons(block.b)
    columns = [
        pa.array(probability, mask=unusable),
        pa.array(label, mask=unusable),
        pa.array(similarity, mask=unusable),
        pc.coalesce(error_a, error_b, pa.scalar("ok")),
        error_a,
        error_b,
    ]
    return pa.Table.from_arrays(
        [*block.carried.columns, *columns], schema=output_schema(block.carried.schema)
    )


class Sink(Protocol):
    """Where result tables go, in order; nothing is visible before `finish`, nothing remains after `abandon`.

    `abandon` after `finish` changes nothing.
    """

    def write(self, table: pa.Table) -> None:
        """Take the next rows."""

    def finish(self, record: Mapping[str, Any]) -> None:
        """Publish everything with the run record."""

    def abandon(self) -> None:
        """Leave no trace."""


class MemorySink:
    """Keeps the rows; for the Python API without an output file."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._tables: list[pa.Table] = []
        self.table: pa.Table | None = None

    def write(self, table: pa.Table) -> None:
        """Take the next rows."""
        self._tables.append(table)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Put the table together, the run record in its metadata."""
        schema = self._schema.with_metadata({RECORD_KEY: _record(record)})
        self.table = pa.concat_tables([self._schema.empty_table(), *self._tables]).cast(schema)

    def abandon(self) -> None:
        """Forget the rows."""
        self._tables.clear()


class FileSink:
    """One Parquet file, local or in an object store, that appears whole."""

    def __init__(self, target: Location, schema: pa.Schema) -> None:
        self._target = target
        folder = Path(target.parent.path) if target.is_local else Path(gettempdir())
        self._temporary = folder / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        self._writer = pq.ParquetWriter(self._temporary, schema, compression="zstd")

    def write(self, table: pa.Table) -> None:
        """Take the next rows as a row group of their own."""
        self._writer.write_table(table)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Close, make durable and give the file its name."""
        self._writer.add_key_value_metadata({RECORD_KEY: _record(record)})
        self._writer.close()
        if self._target.is_local:
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            publish(self._temporary, Path(self._target.path))
            return
        with (
            self._temporary.open("rb") as file,
            self._target.filesystem.open_output_stream(self._target.path) as out,
        ):
            while chunk := file.read(16 << 20):
                out.write(chunk)
        self.abandon()

    def abandon(self) -> None:
        """Close and remove the temporary file."""
        self._writer.close()
        with suppress(FileNotFoundError):
            self._temporary.unlink()


class FolderSink:
    """A folder of `part-NNNNN.parquet` files with a million rows each, and `_SUCCESS` last."""

    def __init__(self, folder: Location, schema: pa.Schema, part_rows: int = PART_ROWS) -> None:
        self._folder, self._schema, self._part_rows = folder, schema, part_rows
        self._parts: list[Location] = []
        self._sink: FileSink | None = None
        self._rows = 0
        folder.make_folder()
        self._old = [each for each, _ in folder.files() if _PART.match(each.name)]
        _remove(folder.join(SUCCESS))

    def write(self, table: pa.Table) -> None:
        """Take the next rows, cut at the parts' borders."""
        while table.num_rows:
            if self._sink is None:
                self._open_part()
            rows = min(table.num_rows, self._part_rows - self._rows)
            if self._sink is not None:
                self._sink.write(table.slice(0, rows))
            self._rows += rows
            table = table.slice(rows)
            if self._rows == self._part_rows:
                self._close_part()

    def finish(self, record: Mapping[str, Any]) -> None:
        """Close the last part, remove parts of an earlier run, write `_SUCCESS` with the run record."""
        self._close_part()
        for each in self._old:
            if each not in self._parts:
                _remove(each)
        self._folder.join(SUCCESS).write_bytes(_record(record).encode())

    def abandon(self) -> None:
        """Remove the part in the making; finished parts stay, without `_SUCCESS`."""
        if self._sink is not None:
            self._sink.abandon()
            self._sink = None

    def _open_part(self) -> None:
        part = self._folder.join(f"part-{len(self._parts):05d}.parquet")
        self._parts.append(part)
        self._sink, self._rows = FileSink(part, self._schema), 0

    def _close_part(self) -> None:
        if self._sink is not None:
            self._sink.finish({"rows": self._rows, "part": len(self._parts) - 1, "record": SUCCESS})
        self._sink = None


def open_sink(output: str | None, schema: pa.Schema) -> FileSink | FolderSink | MemorySink:
    """The sink that an output's name asks for. Raises `UsageError` where it cannot be written."""
    if output is None:
        return MemorySink(schema)
    target = Location.parse(output)
    try:
        if target.suffix == ".parquet":
            if target.kind() == "folder":
                raise UsageError(f"{output}: is a folder; a name that ends in .parquet means one file")
            if target.is_local:
                Path(target.parent.path).mkdir(parents=True, exist_ok=True)
            return FileSink(target, schema)
        if target.kind() == "file":
            raise UsageError(f"{output}: is a file; give a name that ends in .parquet, or a folder")
        return FolderSink(target, schema)
    except OSError as exc:
        raise UsageError(f"{output}: cannot be written: {exc}") from exc


def read_record(path: str) -> dict[str, Any]:
    """The run record of an output file."""
    location = Location.parse(path)
    with location.filesystem.open_input_file(location.path) as file:
        metadata = pq.ParquetFile(file).metadata.metadata or {}
    if RECORD_KEY.encode() not in metadata:
        raise BatchverifyError(f"{path}: holds no run record of batchverify")
    return dict(json.loads(metadata[RECORD_KEY.encode()]))


def _record(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def _remove(location: Location) -> None:
    with suppress(FileNotFoundError):
        location.filesystem.delete_file(location.path)
