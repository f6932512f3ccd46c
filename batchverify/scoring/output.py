"""An output: finished, resumed or begun, and the parts that a job commits one by one."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchverify.errors import BatchverifyError, UsageError
from batchverify.manifest.manifest import Block
from batchverify.scoring.job_folder import JobFolder, differences
from batchverify.scoring.parquet import PART, SUCCESS, FileSink, part_files, record_text, run_record, writing
from batchverify.storage.background import prefetch
from batchverify.storage.location import Location
from batchverify.storage.object_store import is_denied, is_transient

# A part is what a kill costs at most of the scoring, and what is published at once. In a folder it is the
# file that readers get: a million rows, some ten seconds of work. The parts of a single file are only
# passed through, and written twice: a second's work each, one row group of the finished file.
FOLDER_ROWS = 1_000_000
FILE_ROWS = 50_000


# Names that people give who expect another format; as a folder they would only surprise.
OTHER_FORMATS = {".csv", ".tsv", ".json", ".jsonl", ".txt", ".xlsx", ".pq", ".gz", ".zst", ".bz2", ".zip"}


class Output:
    """Where the rows of a job go. Raises `UsageError` where nothing may or can be written.

    A finished output holds the job's document in its run record; an unfinished one has a job folder
    beside it. Part files lie in the output folder itself, or, of a single file, in the job folder.
    """

    def __init__(self, name: str | os.PathLike[str], manifest: Sequence[Location] = ()) -> None:
        self.target = Location.parse(name)
        self.single = self.target.suffix == ".parquet"
        if self.target.suffix in OTHER_FORMATS:
            raise UsageError(
                f"{name}: results are Parquet; give a name that ends in .parquet for one file, or a folder's"
            )
        self.folder = JobFolder(self.target)
        _spare_manifest(self.target, manifest)
        try:
            kind = self.target.kind()
        except OSError as exc:
            raise UsageError(f"{name}: cannot be written: {exc}") from exc
        if self.single and kind == "folder":
            raise UsageError(f"{name}: is a folder; a name that ends in .parquet means one file")
        if not self.single and kind == "file":
            raise UsageError(f"{name}: is a file; give a name that ends in .parquet, or a folder")
        if not self.single and self.target.parent == self.target:
            raise UsageError(f"{name}: give a folder below it: the job folder goes beside the output")

    def finished(self, document: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
        """The run record of an output that this job has finished; None where there is work to do.

        Raises `UsageError` for what is not ours and, without `overwrite`, for another job's rows.
        """
        record, state = self._record(), self.folder.state()
        if overwrite:
            return None
        if record is not None and record.get("job") == document:
            return record if self._is_whole(record) else None
        if state is not None and state["job"] == document:
            return None
        for what, there in (("finished output", record), ("unfinished job", state)):
            if there is not None:
                said = (
                    differences(there.get("job", {}), document) if "job" in there else "of an older version"
                )
                raise UsageError(
                    f"{self.target}: holds the {what} of another job ({said}); give another output, or "
                    "--overwrite starts anew"
                )
        if not self.single and part_files(self.target):
            raise UsageError(
                f"{self.target}: holds part files of a run that did not finish, and its job folder "
                f"{self.folder.location} is gone; --overwrite starts anew"
            )
        return None

    @contextmanager
    def claimed(
        self, document: Mapping[str, Any], rows: int, *, overwrite: bool, retry_failed: bool
    ) -> Iterator[tuple[Parts, dict[str, Any]]]:
        """Hold the output alone: its parts, those done found, and the job folder's state.

        The job folder stays where the body raises. retry_failed: parts with failed rows are not done.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(self.folder.claimed())
                state = self._begin(document, overwrite, retry_failed)
                parts = self._parts(state)
                parts.look(rows)
            except OSError as exc:
                raise UsageError(f"{self.target}: cannot be written: {exc}") from exc
            found = bool(parts.done)
            if retry_failed:
                parts.done = {n: each for n, each in parts.done.items() if each.scored == each.rows}
            try:
                yield parts, state
            except BaseException:
                # What was found counts, done or to be done again: the parts are of use without a retry.
                if not (found or parts.done or state.get("compute_path")):
                    # Nothing is lost with it: a wrong option leaves no trace.
                    self._forget()
                raise

    def publish(self, parts: Parts, record: Mapping[str, Any], rows: int) -> None:
        """Finish the output from its parts, all done, and take the job folder away."""
        with writing(self.target):
            if self.single:
                self._join(parts, record, rows)
            else:
                self.clear_success()
                for each in part_files(self.target):
                    if number_of(each) not in parts.numbers(rows):
                        each.filesystem.delete_file(each.path)
                self.target.join(SUCCESS).write_bytes(record_text(record).encode())
            self.folder.remove()

    def clear_success(self) -> None:
        """Before a part of a finished folder is replaced: until then it is whole."""
        success = self.target.join(SUCCESS)
        if not self.single and success.kind() == "file":
            success.filesystem.delete_file(success.path)

    def forget_leftovers(self, document: Mapping[str, Any]) -> None:
        """Take away the job folder of a run that was killed between publishing and cleaning up."""
        state = self.folder.state()
        if state is not None and state["job"] == document:
            # Where another run holds it, it is no leftover.
            with suppress(UsageError), self.folder.claimed():
                self.folder.remove()

    def _forget(self) -> None:
        self.folder.remove()
        if self.target.is_local and not self.single:
            with suppress(OSError):
                Path(self.target.path).rmdir()

    def _parts(self, kept: Mapping[str, Any]) -> Parts:
        """The parts of an attempt. kept: its state or run record; a resumed job cuts as it was begun."""
        folder = self.folder.location if self.single else self.target
        size = int(kept.get("part_rows") or self._part_rows)
        return Parts(folder, str(kept.get("token", "")), size, short_lived=self.single)

    @property
    def _part_rows(self) -> int:
        return FILE_ROWS if self.single else FOLDER_ROWS

    def _begin(self, document: Mapping[str, Any], overwrite: bool, retry_failed: bool) -> dict[str, Any]:
        """The state of the attempt that goes on, or of a new one."""
        # Again, now that no other run can come in between.
        record, state = self._record(), self.folder.state()
        self.finished(document, overwrite=overwrite)
        if overwrite:
            record = state = None
        if state is None or state["job"] != document:
            state = {"job": document, "token": uuid.uuid4().hex, "part_rows": self._part_rows}
            self.folder.sweep()
            if record is not None and record.get("job") == document:
                state["compute_path"] = record.get("compute_path", "")
                for name in ("token", "part_rows"):
                    state[name] = record.get(name, state[name])
                if self.single and retry_failed:
                    self._take_apart(self._parts(state))
            self.folder.keep(state)
        if self.target.is_local and not self.single:
            Path(self.target.path).mkdir(exist_ok=True)
        self._sweep_folder()
        return state

    def _take_apart(self, parts: Parts) -> None:
        """The parts of a finished file that have no failed row, as they were before they were joined."""
        with self.target.filesystem.open_input_file(self.target.path) as source:
            file = pq.ParquetFile(source)
            for number in range(file.num_row_groups):
                table = file.read_row_group(number)
                record = PartRecord.of(table, parts.token, number)
                if record.scored == record.rows:
                    sink = parts.sink(number, table.schema.remove_metadata())
                    sink.write(table)
                    sink.finish(record.to_json())

    def _join(self, parts: Parts, record: Mapping[str, Any], rows: int) -> None:
        sink: FileSink | None = None
        try:
            for table in prefetch(parts.tables(rows)):
                # What Parquet made of the types when the parts were written is what comes back anyway.
                schema = table.schema.remove_metadata()
                sink = sink or FileSink(self.target, schema, staging=self.folder.location)
                sink.write(table)
            if sink is not None:
                sink.finish(record)
        finally:
            if sink is not None:
                sink.abandon()

    def _record(self) -> dict[str, Any] | None:
        """The run record of a finished output; None where there is none. `UsageError` for files of others."""
        foreign = "not written by batchverify; give another output with -o"
        if self.single:
            if self.target.kind() == "absent":
                return None
            record = dict(footer(self.target))
            if not {"version", "run_id"} <= record.keys():
                raise UsageError(f"{self.target}: {foreign}")
            return record
        success = self.target.join(SUCCESS)
        if success.kind() == "file":
            return self._parsed(success, success.read_bytes())
        for part in part_files(self.target):
            if "part" not in footer(part):
                raise UsageError(f"{part}: {foreign}")
        return None

    def _parsed(self, success: Location, text: bytes) -> dict[str, Any]:
        try:
            record = json.loads(text)
            if {"version", "run_id"} <= record.keys():
                return dict(record)
        except (ValueError, AttributeError):
            pass
        raise UsageError(f"{success}: not written by batchverify; give another output with -o")

    def _is_whole(self, record: Mapping[str, Any]) -> bool:
        """Whether a finished folder still has all its parts."""
        if self.single:
            return True
        parts, rows = self._parts(record), int(record["rows"])
        parts.look(rows)
        return parts.done.keys() == set(parts.numbers(rows))

    def _sweep_folder(self) -> None:
        """Temporary files of a run that was killed while it wrote a part into the output folder."""
        if self.single:
            return
        for each, _ in self.target.files():
            name = each.name.removeprefix(".")
            if each.name.endswith(".tmp") and PART.match(name.rsplit(".", 2)[0]):
                each.filesystem.delete_file(each.path)


def reasons_of(place: Location) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """The columns `error_a` and `error_b` of a part."""
    table = read_table(place, ["error_a", "error_b"])
    return table.column("error_a"), table.column("error_b")


def _spare_manifest(target: Location, manifest: Sequence[Location]) -> None:
    """Refuse an output that is a manifest file, or a folder whose part files are the manifest."""
    for source in manifest:
        parts = [source.parent] if PART.match(source.name) else []
        if _real(target) in [_real(each) for each in (source, *parts)]:
            raise UsageError(f"{target}: the output would overwrite the manifest {source}")


def _real(location: Location) -> str:
    return os.path.realpath(location.path) if location.is_local else str(location)


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

    Borders depend on row numbers alone, so that every run of a job cuts alike. short_lived: they are soon joined and
    deleted. done: the records of the parts that are whole, by number.
    """

    folder: Location
    token: str
    size: int
    short_lived: bool = False
    done: dict[int, PartRecord] = field(default_factory=dict)

    def place(self, number: int) -> Location:
        """The file of a part."""
        return self.folder.join(f"part-{number:05d}.parquet")

    def sink(self, number: int, schema: pa.Schema) -> FileSink:
        """A part in the making."""
        return FileSink(self.place(number), schema, short_lived=self.short_lived)

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
    except (OSError, pa.ArrowException, ValueError) as exc:
        if is_transient(exc) or is_denied(exc):
            # What cannot be read now may be a finished part.
            raise BatchverifyError(f"{place}: cannot be read: {exc}") from exc
        return {}, 0
    return run_record(found), found.num_rows


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
