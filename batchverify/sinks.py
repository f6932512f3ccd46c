"""Sinks: where result rows go, in order, whole or not at all."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from batchverify.errors import BatchverifyError, UsageError
from batchverify.locations import Location, publish
from batchverify.results import RECORD_KEY, record_text

SUCCESS = "_SUCCESS"
PART_ROWS = 1_000_000
_PART = re.compile(r"^part-\d{5}\.parquet$")


class Sink(Protocol):
    """Takes result tables in order. What `finish` has not published, `abandon` takes away; after `finish` it
    changes nothing."""

    def write(self, table: pa.Table) -> None:
        """Take the next rows."""

    def finish(self, record: Mapping[str, Any]) -> None:
        """Publish everything with the run record."""

    def abandon(self) -> None:
        """Leave nothing half written."""


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
        schema = self._schema.with_metadata({RECORD_KEY: record_text(record)})
        self.table = pa.concat_tables([self._schema.empty_table(), *self._tables]).cast(schema)

    def abandon(self) -> None:
        """Forget the rows."""
        self._tables.clear()


class FileSink:
    """One Parquet file that appears whole, in a folder or, through a local temporary file, in an object store.

    Raises `UsageError` at once where nothing can be written, `BatchverifyError` when that fails later.
    """

    def __init__(self, target: Location, schema: pa.Schema) -> None:
        self._target = target
        name = f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        self._temporary = Path(target.parent.path if target.is_local else gettempdir()) / name
        self._upload = None if target.is_local else target.parent.join(name)
        self._writer: pq.ParquetWriter | None = None
        try:
            if self._upload is not None:
                # Whether the store takes what is written is found out now and not after the work.
                self._upload.write_bytes(b"")
            self._writer = pq.ParquetWriter(self._temporary, schema, compression="zstd")
        except OSError as exc:
            self.abandon()
            raise UsageError(f"{target}: cannot be written: {exc}") from exc

    def write(self, table: pa.Table) -> None:
        """Take the next rows as a row group of their own."""
        with _writing(self._target):
            self._open_writer().write_table(table)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Close, make durable and give the file its name."""
        with _writing(self._target):
            writer = self._open_writer()
            writer.add_key_value_metadata({RECORD_KEY: record_text(record)})
            writer.close()
            self._publish()
        self.abandon()

    def _publish(self) -> None:
        if self._upload is None:
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            publish(self._temporary, Path(self._target.path))
            return
        try:
            self._send(self._upload)
        except OSError as exc:
            # The work is not lost with the upload (a store may refuse to move more than 5 GB, say).
            kept = self._temporary.rename(
                self._temporary.with_name(f"{uuid.uuid4().hex[:8]}-{self._target.name}")
            )
            raise OSError(f"{exc}; the finished file is kept at {kept}") from exc

    def abandon(self) -> None:
        """Close and remove the temporary files."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        self._writer = None
        with suppress(OSError):
            self._temporary.unlink()
        if self._upload is not None:
            with suppress(OSError):
                self._upload.filesystem.delete_file(self._upload.path)
            self._upload = None

    def _open_writer(self) -> pq.ParquetWriter:
        if self._writer is None:
            raise BatchverifyError(f"{self._target}: written after it was finished or given up")
        return self._writer

    def _send(self, upload: Location) -> None:
        """Upload under a temporary key and move: an upload that breaks off may leave a cut object (arrow#40502)."""
        with self._temporary.open("rb") as file, upload.filesystem.open_output_stream(upload.path) as out:
            while chunk := file.read(16 << 20):
                out.write(chunk)
        sent = upload.filesystem.get_file_info(upload.path).size
        if sent != self._temporary.stat().st_size:
            raise OSError(f"{sent:,} bytes arrived of {self._temporary.stat().st_size:,}")
        upload.filesystem.move(upload.path, self._target.path)


class FolderSink:
    """A folder of `part-NNNNN.parquet` files with a million rows each; `_SUCCESS`, last, says that all are there.

    Parts appear as they are done. A folder with part files of another program is refused (`UsageError`).
    """

    def __init__(self, folder: Location, schema: pa.Schema, part_rows: int = PART_ROWS) -> None:
        self._folder, self._schema, self._part_rows = folder, schema, part_rows
        self._parts: list[Location] = []
        self._sink: FileSink | None = None
        self._rows = 0
        if folder.is_local:
            Path(folder.path).mkdir(parents=True, exist_ok=True)
        self._old = part_files(folder)
        for part in self._old:
            if not _is_ours(part):
                raise UsageError(f"{part}: not written by batchverify; give a folder of its own with -o")
        self._open_part()

    def write(self, table: pa.Table) -> None:
        """Take the next rows, cut at the parts' borders."""
        while table.num_rows:
            with _writing(self._folder):
                sink = self._sink or self._open_part()
            rows = min(table.num_rows, self._part_rows - self._rows)
            sink.write(table.slice(0, rows))
            self._rows += rows
            table = table.slice(rows)
            if self._rows == self._part_rows:
                self._close_part()

    def finish(self, record: Mapping[str, Any]) -> None:
        """Close the last part, remove parts of an earlier run, write `_SUCCESS` with the run record."""
        self._close_part()
        with _writing(self._folder):
            for each in self._old:
                if each not in self._parts:
                    _remove(each)
            self._folder.join(SUCCESS).write_bytes(record_text(record).encode())

    def abandon(self) -> None:
        """Remove the part in the making; finished parts stay, without `_SUCCESS`."""
        if self._sink is not None:
            self._sink.abandon()
            self._sink = None

    def _open_part(self) -> FileSink:
        part = self._folder.join(f"part-{len(self._parts):05d}.parquet")
        self._parts.append(part)
        self._sink, self._rows = FileSink(part, self._schema), 0
        return self._sink

    def _close_part(self) -> None:
        if self._sink is not None:
            if len(self._parts) == 1:
                # Only now: until then the folder of an earlier run is whole.
                with _writing(self._folder):
                    _remove(self._folder.join(SUCCESS))
            self._sink.finish({"rows": self._rows, "part": len(self._parts) - 1, "record": SUCCESS})
        self._sink = None


def open_sink(
    output: str | os.PathLike[str] | None, schema: pa.Schema, manifest: Sequence[Location] = ()
) -> FileSink | FolderSink | MemorySink:
    """The sink that an output's name asks for; `manifest`: files that it must not touch.

    Raises `UsageError` where it cannot be written, or would overwrite the manifest.
    """
    if output is None:
        return MemorySink(schema)
    target = Location.parse(output)
    _spare_manifest(target, manifest)
    single = target.suffix == ".parquet"
    try:
        kind = target.kind()
        if single and kind == "folder":
            raise UsageError(f"{output}: is a folder; a name that ends in .parquet means one file")
        if not single and kind == "file":
            raise UsageError(f"{output}: is a file; give a name that ends in .parquet, or a folder")
        if not single:
            return FolderSink(target, schema)
        if target.is_local:
            Path(target.parent.path).mkdir(parents=True, exist_ok=True)
        return FileSink(target, schema)
    except OSError as exc:
        raise UsageError(f"{output}: cannot be written: {exc}") from exc


def part_files(folder: Location) -> list[Location]:
    """The part files of an output folder, in order; none when it is absent."""
    return [each for each, _ in folder.files() if _PART.match(each.name)]


def _spare_manifest(target: Location, manifest: Sequence[Location]) -> None:
    """Refuse an output that is a manifest file, or a folder whose part files are the manifest."""
    for source in manifest:
        parts = [source.parent] if _PART.match(source.name) else []
        if _real(target) in [_real(each) for each in (source, *parts)]:
            raise UsageError(f"{target}: the output would overwrite the manifest {source}")


def _real(location: Location) -> str:
    return os.path.realpath(location.path) if location.is_local else str(location)


@contextmanager
def _writing(target: Location) -> Iterator[None]:
    """Errors of writing as ours; before any work `open_sink` turns them into `UsageError`."""
    try:
        yield
    except (OSError, UsageError) as exc:
        raise BatchverifyError(f"{target}: could not be written: {exc}") from exc


def _is_ours(part: Location) -> bool:
    try:
        with part.filesystem.open_input_file(part.path) as file:
            metadata = pq.ParquetFile(file).metadata.metadata or {}
        return "part" in json.loads(metadata.get(RECORD_KEY.encode(), b"{}"))
    except (OSError, pa.ArrowException, ValueError):
        return False


def _remove(location: Location) -> None:
    with suppress(FileNotFoundError):
        location.filesystem.delete_file(location.path)
