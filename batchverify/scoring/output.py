"""An output: whether it is finished, how it is resumed, and the parts that a job publishes one by one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchverify.errors import BatchverifyError, UsageError
from batchverify.heads.review_band import DIFFERENT, REVIEW, SAME, VERDICT, ReviewBand
from batchverify.manifest.manifest import Block
from batchverify.scoring.job_folder import JobFolder, JobState, shown_differences
from batchverify.scoring.parquet import (
    PART,
    SUCCESS,
    FileSink,
    parse_record,
    part_files,
    record_text,
    run_record,
    writing,
)
from batchverify.storage.background import prefetch
from batchverify.storage.location import Location
from batchverify.storage.object_store import is_denied, is_transient, retry
from batchverify.storage.temporary import sweep

# A kill costs at most the scoring of one part. In a folder a part is a file for readers: a million rows, some ten
# seconds of work. The parts of a single file are written twice, so they are smaller: a second of work and one row
# group of the finished file each.
FOLDER_ROWS = 1_000_000
FILE_ROWS = 50_000
# Names with these suffixes are refused: they would become folders, which nobody expects.
OTHER_FORMATS = {".csv", ".tsv", ".json", ".jsonl", ".txt", ".xlsx", ".pq", ".gz", ".zst", ".bz2", ".zip"}
# Counts of a part that only `--review` gives.
VERDICT_COUNTS = ("same_verdicts", "different_verdicts")
_FOREIGN = "not written by batchverify; give another output with -o"


class Output:
    """Where the rows of a job go. Raises `UsageError` if nothing may or can be written there.

    A finished output holds the job's document in its run record. An unfinished one has a job folder beside it.
    Part files are in the output folder, those of a single file in the job folder. part_rows: rows of a new job's
    parts; a resumed job keeps its own.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        manifest: Sequence[Location] = (),
        *,
        part_rows: int | None = None,
    ) -> None:
        self.target = Location.parse(name)
        self.single = self.target.suffix == ".parquet"
        if self.target.suffix in OTHER_FORMATS:
            raise UsageError(
                f"{name}: results are Parquet; give a name that ends in .parquet for one file, or a folder"
            )
        self._part_rows = part_rows or (FILE_ROWS if self.single else FOLDER_ROWS)
        self.folder = JobFolder(self.target)
        _spare_manifest(self.target, manifest)
        try:
            kind = self.target.kind()
        except OSError as exc:
            raise UsageError(f"{name}: cannot be written: {exc}") from exc
        if special := self.target.special():
            raise UsageError(f"{name}: {special}; results go into a file or a folder")
        if self.single and kind == "folder":
            raise UsageError(f"{name}: is a folder, but a name that ends in .parquet means one file")
        if not self.single and kind == "file":
            raise UsageError(f"{name}: is a file; give a name that ends in .parquet, or a folder")
        if not self.single and self.target.parent == self.target:
            raise UsageError(f"{name}: give a folder below this one: the job folder goes beside the output")

    def finished(self, document: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
        """The run record if this job has finished the output; None if there is work to do.

        Raises `UsageError` for files of others and, without `overwrite`, for another job's rows. `BatchverifyError`
        if a file cannot be read.
        """
        try:
            return self._finished(document, overwrite)
        except OSError as exc:
            raise BatchverifyError(f"{self.target}: cannot be read: {exc}") from exc

    def _finished(self, document: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
        record, state = self._record(), self.folder.state()
        if overwrite:
            return None
        if record is not None and record.get("job") == document:
            return record if self._is_whole(record) else None
        if state is not None and state["job"] == document:
            return None
        for what, other in (("finished output", record), ("unfinished job", state)):
            if other is not None:
                why = shown_differences(other["job"], document) if "job" in other else "of an older version"
                raise UsageError(
                    f"{self.target}: holds the {what} of another job ({why}); give another output, or start anew "
                    "with --overwrite"
                )
        if not self.single and part_files(self.target):
            raise UsageError(
                f"{self.target}: holds part files of a run that did not finish, and its job folder "
                f"{self.folder.location} is gone; start anew with --overwrite"
            )
        return None

    @contextmanager
    def claimed(
        self, document: Mapping[str, Any], rows: int, *, overwrite: bool, retry_failed: bool
    ) -> Iterator[tuple[Parts, JobState]]:
        """Lock the output; yields its parts, with those done already, and the job folder's state.

        The job folder stays if the body raises. retry_failed: parts with failed rows count as not done.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(self.folder.claimed())
                state = self._begin(document, overwrite, retry_failed)
                parts = self._parts(state)
                parts.find_done(rows)
            except OSError as exc:
                raise UsageError(f"{self.target}: cannot be written: {exc}") from exc
            had_parts = bool(parts.done)
            if retry_failed:
                parts.done = {n: part for n, part in parts.done.items() if part.scored == part.rows}
            try:
                yield parts, state
            except BaseException:
                # An attempt without any work leaves no trace. Parts that were to be retried count as work: they are
                # of use without a retry.
                if not (had_parts or parts.done or state.get("compute_path")):
                    # An error here would hide that of the run. The next run removes what is left.
                    with suppress(OSError, BatchverifyError):
                        self._forget()
                raise

    def publish(self, parts: Parts, record: Mapping[str, Any], rows: int) -> None:
        """Finish the output from its parts, which are all done, and remove the job folder."""
        with writing(self.target):
            if self.single:
                self._join(parts, record, rows)
            else:
                self.clear_success()
                for file in part_files(self.target):
                    if number_of(file) not in parts.numbers(rows):
                        file.filesystem.delete_file(file.path)
                self.folder.check()
                self.target.join(SUCCESS).write_bytes(record_text(record).encode())
            self.folder.remove()

    def clear_success(self) -> None:
        """What comes before a part is published: this run still holds the output, and `_SUCCESS` is removed."""
        success = self.target.join(SUCCESS)
        with writing(self.target):
            self.folder.check()
        with writing(success):
            if not self.single and success.kind() == "file":
                success.filesystem.delete_file(success.path)

    def forget_leftovers(self, document: Mapping[str, Any]) -> None:
        """Remove the job folder of a run that ended between publishing and cleaning up."""
        self._sweep_staged()
        # If another run holds the lock, the folder is in use. If it cannot be removed, the output is whole anyway.
        with suppress(BatchverifyError, OSError):
            state = self.folder.state()
            if state is None and not self.folder.location.files():
                self.folder.remove_empty()
            elif state is None or state["job"] == document:
                # Of a run that was killed while it removed the folder, or could not give it up. One that is alive
                # refuses.
                with self.folder.claimed():
                    self.folder.remove()

    def _forget(self) -> None:
        # An error here would hide that of the run.
        with suppress(OSError):
            self.folder.remove()
        if self.target.is_local and not self.single:
            with suppress(OSError):
                Path(self.target.path).rmdir()

    def _parts(self, state: Mapping[str, Any]) -> Parts:
        """The parts of an attempt, given its state or run record. A resumed job keeps its part size."""
        folder = self.folder.location if self.single else self.target
        size = int(state.get("part_rows") or self._part_rows)
        return Parts(folder, str(state.get("token", "")), size, short_lived=self.single)

    def _begin(self, document: Mapping[str, Any], overwrite: bool, retry_failed: bool) -> JobState:
        """The state of the attempt to resume, or of a new one."""
        # Checked once more, now that no other run can interfere.
        record, state = self._record(), self.folder.state()
        self.finished(document, overwrite=overwrite)
        if overwrite:
            record = state = None
        if state is None or state["job"] != document:
            state = {"job": dict(document), "token": uuid.uuid4().hex, "part_rows": self._part_rows}
            self.folder.sweep()
            if record is not None and record.get("job") == document:
                state["compute_path"] = record.get("compute_path", "")
                state["token"] = record.get("token", state["token"])
                state["part_rows"] = record.get("part_rows", state["part_rows"])
                if record.get("prior"):
                    state["prior"] = record["prior"]
                if self.single and retry_failed:
                    self._take_apart(self._parts(state))
            self.folder.write_state(state)
        if self.target.is_local and not self.single:
            Path(self.target.path).mkdir(exist_ok=True)
        self._sweep_folder()
        self._sweep_staged()
        return state

    def _take_apart(self, parts: Parts) -> None:
        """Restore from a finished file the parts without failed rows, as they were before they were joined."""
        with self.target.filesystem.open_input_file(self.target.path) as source:
            file = pq.ParquetFile(source)
            for number in range(file.num_row_groups):
                table = file.read_row_group(number)
                counts = RowCounts.of(table)
                if counts.scored == counts.rows:
                    sink = parts.sink(number, table.schema.remove_metadata())
                    try:
                        sink.write(table)
                        sink.finish(parts.record(number, counts))
                    finally:
                        sink.abandon()

    def _join(self, parts: Parts, record: Mapping[str, Any], rows: int) -> None:
        sink: FileSink | None = None
        try:
            for table in prefetch(parts.tables(rows)):
                # The types are those that Parquet gave back when the parts were read.
                schema = table.schema.remove_metadata()
                sink = sink or FileSink(self.target, schema, staging=self.folder.location)
                sink.write(table)
            if sink is not None:
                self.folder.check()
                sink.finish(record)
        finally:
            if sink is not None:
                sink.abandon()

    def _record(self) -> dict[str, Any] | None:
        """The run record of a finished output; None if it is not finished. `UsageError` for files of others."""
        success = self.target.join(SUCCESS)
        if self.single:
            if self.target.kind() == "absent":
                return None
            file, record = self.target, dict(footer_and_rows(self.target)[0])
        elif success.kind() == "file":
            file, record = success, parse_record(success.read_bytes())
        else:
            for part in part_files(self.target):
                if "part" not in footer_and_rows(part)[0]:
                    raise UsageError(f"{part}: {_FOREIGN}")
            return None
        if not {"version", "run_id"} <= record.keys():
            raise UsageError(f"{file}: {_FOREIGN}")
        return record

    def _is_whole(self, record: Mapping[str, Any]) -> bool:
        """Whether a finished folder still has all its parts."""
        if self.single:
            return True
        parts, rows = self._parts(record), int(record["rows"])
        parts.find_done(rows)
        return parts.done.keys() == set(parts.numbers(rows))

    def _sweep_folder(self) -> None:
        """Remove temporary files of a run that was killed while it wrote a part into the output folder."""
        if self.single:
            return
        for file, _ in self.target.files():
            name = file.name.removeprefix(".")
            if file.name.endswith(".tmp") and PART.match(name.rsplit(".", 2)[0]):
                file.filesystem.delete_file(file.path)

    def _sweep_staged(self) -> None:
        """Remove what killed runs with an output in an object store left on this machine."""
        if not self.target.is_local:
            sweep(Path(gettempdir()))


def _spare_manifest(target: Location, manifest: Sequence[Location]) -> None:
    """Refuse an output that is a manifest file, or a folder whose part files are the manifest."""
    for source in manifest:
        folder = [source.parent] if PART.match(source.name) else []
        if _real(target) in map(_real, (source, *folder)):
            raise UsageError(f"{target}: the output would overwrite the manifest {source}")


def _real(location: Location) -> str:
    return os.path.realpath(location.path) if location.is_local else str(location)


class RowCounts(NamedTuple):
    """Rows, those of them that were scored, those labelled 1, and those with the verdicts of `--review`."""

    rows: int
    scored: int
    different: int
    same_verdicts: int = 0
    different_verdicts: int = 0

    @classmethod
    def of(cls, table: pa.Table) -> RowCounts:
        """The counts of a table of result rows."""
        label, verdicts = table.column("label"), [0, 0]
        if VERDICT in table.column_names:
            cells = table.column(VERDICT)
            verdicts = [pc.sum(pc.equal(cells, name)).as_py() or 0 for name in (SAME, DIFFERENT)]
        return cls(len(label), len(label) - label.null_count, pc.sum(label).as_py() or 0, *verdicts)

    @classmethod
    def total(cls, parts: Collection[RowCounts]) -> RowCounts:
        """The counts of several parts together."""
        return cls(*(sum(getattr(part, name) for part in parts) for name in cls._fields))

    def review(self, band: ReviewBand) -> dict[str, Any]:
        """For a run's summary: the thresholds of `--review` and how many rows have which verdict."""
        undecided = self.scored - self.same_verdicts - self.different_verdicts
        return {
            **vars(band),
            SAME: self.same_verdicts,
            DIFFERENT: self.different_verdicts,
            REVIEW: undecided,
        }


@dataclass
class Parts:
    """The part files of one attempt at a job in `folder`: part n holds the rows from n * `size` on.

    Borders depend on row numbers alone, so every run of a job cuts in the same places. short_lived: the parts are
    soon joined and deleted. done: the counts of the complete parts, by number.
    """

    folder: Location
    token: str
    size: int
    short_lived: bool = False
    done: dict[int, RowCounts] = field(default_factory=dict)

    def file(self, number: int) -> Location:
        """The file of a part."""
        return self.folder.join(f"part-{number:05d}.parquet")

    def sink(self, number: int, schema: pa.Schema) -> FileSink:
        """A writer for a part."""
        return FileSink(self.file(number), schema, short_lived=self.short_lived)

    def record(self, number: int, counts: RowCounts) -> dict[str, Any]:
        """What the footer of a part states; counts of verdicts only if there are any."""
        known = {name: count for name, count in counts._asdict().items() if count or name not in VERDICT_COUNTS}
        return {"record": SUCCESS, "token": self.token, "part": number, **known}

    def find_done(self, rows: int) -> None:
        """Find the complete parts of this attempt: those with as many of all `rows` as their numbers demand."""
        for file in part_files(self.folder):
            metadata, count = footer_and_rows(file)
            if metadata.get("token") == self.token and self.file(int(metadata["part"])).name == file.name:
                number = int(metadata["part"])
                counts = RowCounts(**{name: metadata[name] for name in RowCounts._fields if name in metadata})
                if counts.rows == count == self._rows_in(number, rows):
                    self.done[number] = counts

    def split(self, blocks: Iterable[Block]) -> Iterator[tuple[int, Block]]:
        """Blocks cut at the borders of parts; yields the number of the part and the piece."""
        for block in blocks:
            start = 0
            while start < len(block.a):
                row = block.first + start
                piece = block.slice(start, self.size - row % self.size)
                yield row // self.size, piece
                start += len(piece.a)

    def missing(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The pieces of the blocks whose parts are not done now."""
        done = set(self.done)
        return (piece for number, piece in self.split(blocks) if number not in done)

    def numbers(self, rows: int) -> range:
        """The numbers of all parts of `rows` rows."""
        return range(-(-rows // self.size))

    def tables(self, rows: int) -> Iterator[pa.Table]:
        """The rows of every part, in order. `BatchverifyError` if a part is not complete."""
        for number in self.numbers(rows):
            table = read_table(self.file(number))
            if table.num_rows != self._rows_in(number, rows):
                raise BatchverifyError(f"{self.file(number)}: {table.num_rows:,} rows; the part was changed")
            yield table

    def reasons(self, number: int) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        """The columns `error_a` and `error_b` of a part."""
        table = read_table(self.file(number), ["error_a", "error_b"])
        return table.column("error_a"), table.column("error_b")

    def _rows_in(self, number: int, total: int) -> int:
        return min(self.size, total - number * self.size)


def footer_and_rows(file: Location) -> tuple[Mapping[str, Any], int]:
    """The record in a Parquet file's footer, of the run or the part, and the file's number of rows.

    An empty record and 0 for a file that is no Parquet or damaged. `BatchverifyError` if the operating system cannot
    read it or an object store does not answer.
    """
    try:
        footer = retry(lambda: _footer(file))
    except (OSError, pa.ArrowException, ValueError) as exc:
        if getattr(exc, "errno", None) is not None or is_transient(exc) or is_denied(exc):
            # What cannot be read now may be a finished part.
            raise BatchverifyError(f"{file}: cannot be read: {exc}") from exc
        return {}, 0
    return run_record(footer), footer.num_rows


def read_table(file: Location, columns: list[str] | None = None) -> pa.Table:
    """The rows of one Parquet file; `BatchverifyError` if it cannot be read."""
    try:
        return retry(lambda: _rows(file, columns))
    except (OSError, pa.ArrowException) as exc:
        raise BatchverifyError(f"{file}: cannot be read: {exc}") from exc


def _footer(file: Location) -> pq.FileMetaData:
    with file.filesystem.open_input_file(file.path) as source:
        return pq.ParquetFile(source).metadata


def _rows(file: Location, columns: list[str] | None) -> pa.Table:
    with file.filesystem.open_input_file(file.path) as source:
        return pq.ParquetFile(source).read(columns)


def number_of(file: Location) -> int:
    """The number in a part file's name."""
    match = PART.match(file.name)
    return int(match.group(1)) if match else -1
