"""Finished score outputs, one Parquet file or a folder of parts: their record, their columns, some of their rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchverify.errors import ManifestError
from batchverify.manifest.columns import is_text
from batchverify.scoring.parquet import RECORD_KEY, SUCCESS, part_files
from batchverify.storage.location import Location


@dataclass(frozen=True)
class ScoreFile:
    """An output of `score`. record: the run's, empty in a table that another program wrote.

    parts: its Parquet files in order; part_rows: the rows of each.
    """

    name: str
    parts: tuple[Location, ...]
    part_rows: tuple[int, ...]
    schema: pa.Schema
    record: Mapping[str, Any]

    @classmethod
    def open(cls, source: str) -> ScoreFile:
        """Find and check a file, a folder or a URI.

        Raises `ManifestError` for what is absent, unfinished, empty or no output of `score`.
        """
        location = Location.parse(source)
        with _seam(source):
            kind = location.kind()
            if kind == "absent":
                raise ManifestError(f"{source}: no such file or folder")
            parts = part_files(location) if kind == "folder" else [location]
            if not parts:
                raise ManifestError(f"{source}: the folder holds no part files of `batchverify score`")
            footers = [_footer(part) for part in parts]
            record = _folder_record(location) if kind == "folder" else _record(footers[0])
        schema = footers[0].schema.to_arrow_schema().remove_metadata()
        rows = tuple(footer.num_rows for footer in footers)
        opened = cls(source, tuple(parts), rows, schema, record)
        opened._check()
        return opened

    @property
    def rows(self) -> int:
        """How many pairs."""
        return sum(self.part_rows)

    def written(self) -> str | None:
        """When the newest of its files was written, in UTC to the second; None where the store does not say."""
        with _seam(self.name):
            infos = [part.filesystem.get_file_info(part.path) for part in self.parts]
        times = [info.mtime for info in infos if info.mtime is not None]
        return max(times).strftime("%Y-%m-%d %H:%M:%S UTC") if times else None

    @property
    def sides(self) -> tuple[str, str]:
        """The names of the two columns that hold the pictures' paths."""
        options = self.record.get("options", {})
        return options.get("column_a", "image_a"), options.get("column_b", "image_b")

    def column(self, name: str, *, dictionary: bool = False) -> pa.ChunkedArray:
        """One column, whole. dictionary: texts as a dictionary and indices, for columns of few values."""
        cells = self.table([name], dictionary=dictionary).column(0)
        # Texts of other types, as pandas and polars write them, are read as they stand.
        return cells.cast(pa.string()).dictionary_encode() if dictionary and not _coded(cells.type) else cells

    def groups(self, name: str) -> pa.ChunkedArray:
        """A column whose values name groups of pairs; `ManifestError` for one of lists or structs."""
        self.require(name)
        kind = self.schema.field(name).type
        if pa.types.is_nested(kind):
            raise ManifestError(f"{self.name}: column '{name}' must hold single values, found {kind}")
        return self.column(name)

    def table(self, names: Sequence[str], *, dictionary: bool = False) -> pa.Table:
        """Some columns, whole."""
        self.require(*names)
        tables = []
        for part in self.parts:
            with _seam(str(part)), part.filesystem.open_input_file(part.path) as file:
                as_codes = list(names) if dictionary else []
                tables.append(pq.read_table(file, columns=list(names), read_dictionary=as_codes))
        return pa.concat_tables(tables)

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns, a few thousand rows at a time."""
        self.require(*names)
        for part in self.parts:
            with _seam(str(part)), part.filesystem.open_input_file(part.path) as file:
                yield from pq.ParquetFile(file).iter_batches(columns=list(names))

    def take(self, rows: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
        """Some rows by their numbers, in the order asked for; only the row groups that hold them are read."""
        self.require(*names)
        found: dict[int, dict[str, Any]] = {}
        wanted = np.unique(rows)
        start = 0
        for part in self.parts:
            with _seam(str(part)), part.filesystem.open_input_file(part.path) as file:
                parquet = pq.ParquetFile(file)
                for group in range(parquet.num_row_groups):
                    count = parquet.metadata.row_group(group).num_rows
                    here = wanted[(wanted >= start) & (wanted < start + count)]
                    if len(here):
                        table = parquet.read_row_group(group, columns=list(names)).take(
                            pa.array(here - start)
                        )
                        found |= dict(zip(here.tolist(), table.to_pylist(), strict=True))
                    start += count
        return [found[row] for row in rows.tolist()]

    def require(self, *names: str) -> None:
        """Raise `ManifestError` for a column that is not there."""
        for name in names:
            if name not in self.schema.names:
                listed = ", ".join(self.schema.names)
                raise ManifestError(f"{self.name}: no column '{name}'; the file has {listed}")

    def _check(self) -> None:
        if "probability" not in self.schema.names:
            listed = ", ".join(self.schema.names) or "no columns"
            raise ManifestError(
                f"{self.name}: no column 'probability'; is it an output of `batchverify score`? "
                f"The file has {listed}"
            )
        for name in ("probability", "similarity"):
            if name in self.schema.names and not pa.types.is_floating(self.schema.field(name).type):
                kind = self.schema.field(name).type
                raise ManifestError(
                    f"{self.name}: column '{name}' must hold floating-point numbers, found {kind}"
                )
        if "status" in self.schema.names and not is_text(self.schema.field("status").type):
            kind = self.schema.field("status").type
            raise ManifestError(f"{self.name}: column 'status' must hold reasons (strings), found {kind}")
        if not self.rows:
            raise ManifestError(f"{self.name}: the file has no rows: there is nothing to evaluate")


def _coded(kind: pa.DataType) -> bool:
    return pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type)


def _footer(part: Location) -> pq.FileMetaData:
    with _seam(str(part)), part.filesystem.open_input_file(part.path) as file:
        return pq.ParquetFile(file).metadata


def _record(footer: pq.FileMetaData) -> dict[str, Any]:
    return _parsed((footer.metadata or {}).get(RECORD_KEY.encode(), b"{}"))


def _folder_record(folder: Location) -> dict[str, Any]:
    marker = folder.join(SUCCESS)
    if marker.kind() == "absent":
        raise ManifestError(f"{folder}: no {SUCCESS} in it: the run that writes it is not finished")
    with marker.filesystem.open_input_file(marker.path) as file:
        return _parsed(file.read())


def _parsed(text: bytes) -> dict[str, Any]:
    """A run record; whatever else stands there is none."""
    try:
        record = json.loads(text)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


@contextmanager
def _seam(name: str) -> Iterator[None]:
    """pyarrow's errors as ours."""
    try:
        yield
    except FileNotFoundError as exc:
        raise ManifestError(f"{name}: no such file or folder") from exc
    except pa.ArrowInvalid as exc:
        raise ManifestError(
            f"{name}: not a readable Parquet file ({_line(exc)}); `evaluate` takes what `score` wrote"
        ) from exc
    except (OSError, pa.ArrowException) as exc:
        raise ManifestError(f"{name}: cannot be read: {_line(exc)}") from exc


def _line(exc: Exception) -> str:
    return str(exc).splitlines()[0] if str(exc) else type(exc).__name__
