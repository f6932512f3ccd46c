"""One cache segment: a small Parquet file of vectors or failures; its name, schema and checks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from os import getpid
from socket import gethostname
from time import time_ns
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchverify.documents import read_document
from batchverify.fingerprint import DIMENSION
from batchverify.records import CACHED_REASONS, Reason, Skipped
from batchverify.storage.location import Location
from batchverify.storage.object_store import is_absent, retry

METADATA_KEY = b"batchverify"
ROW_GROUP = 256
# The most rows that a row group of a segment may have, sixteen times as many as ours: it is read as a whole.
MOST_GROUP = 4096
# float16 changes a norm by less than 0.001.
NORM_TOLERANCE = 0.01
# Characters of a failure's message that are kept.
MOST_MESSAGE = 1000
# What reading a damaged file raises. FileNotFoundError, an OSError, is no damage: callers catch it first.
DAMAGE = (OSError, pa.ArrowException, ValueError, KeyError)
# Row groups that a process keeps decoded, 0.3 MB each with 512 numbers a vector: keys in an order other than that of
# writing cost one read per group, not one per key.
CACHED_GROUPS = 256
CACHED_FOOTERS = 128
_NAME = re.compile(r"^(\d{20})-\w+-[0-9a-f]{8}-r(\d+)\.parquet$", re.ASCII)
_ENTRY_COLUMNS = ["key", "box", "confidence", "embedding", "faces"]
# Numbers of five landmarks.
_POINTS = 10
# Columns of `data/` segments that older versions did not write and do not read. NaN stands for what is not known.
# Whoever knows the sharpness of an image knows all of its details.
DETAIL_SCHEMA = pa.schema(
    {"landmarks": pa.list_(pa.float32(), _POINTS), "rotation": pa.float32(), "sharpness": pa.float32()}
)
_TURNS = (0, 90, 180, 270)


@dataclass(frozen=True)
class Entry:
    """One image's result. key: 32 bytes. vector: (D,) float16, or None with a cacheable `skipped`.

    box, confidence, faces, landmarks (x y of five points, NaN without any), rotation: see `Face`. sharpness: see
    `faces/quality.py`; NaN in an entry of an older version, whose landmarks and rotation are not known either.
    """

    key: bytes
    vector: np.ndarray | None
    box: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
    confidence: float = float("nan")
    faces: int = 0
    skipped: Skipped | None = None
    landmarks: Sequence[float] = (float("nan"),) * _POINTS
    rotation: int = 0
    sharpness: float = float("nan")


@dataclass(frozen=True)
class SegmentName:
    """What a segment's name states: the time of writing (nanoseconds, UTC) and the number of rows."""

    written: int
    rows: int

    @classmethod
    def parse(cls, name: str) -> SegmentName | None:
        """None if the name is not a segment's."""
        match = _NAME.match(name)
        return cls(int(match.group(1)), int(match.group(2))) if match else None


def vector_schema(dimension: int = DIMENSION) -> pa.Schema:
    """The columns of a `data/` segment."""
    fields = {
        "key": pa.binary(32),
        "box": pa.list_(pa.float32(), 4),
        "confidence": pa.float32(),
        "embedding": pa.fixed_shape_tensor(pa.float16(), [dimension]),
        "faces": pa.int16(),
        "created_at": pa.timestamp("us"),
        "run_id": pa.string(),
    }
    # No null vectors: old pyarrow releases cannot read them back (arrow#35692).
    return pa.schema([pa.field(name, kind, nullable=name != "embedding") for name, kind in fields.items()])


def failure_schema() -> pa.Schema:
    """The columns of a `fail/` segment."""
    texts: dict[str, pa.DataType] = {name: pa.string() for name in ("reason", "message", "depends")}
    return pa.schema({"key": pa.binary(32)} | texts | {"created_at": pa.timestamp("us"), "run_id": pa.string()})


def vector_table(entries: Sequence[Entry], run_id: str) -> pa.Table:
    """The table of a `data/` segment, from entries with vectors."""
    vectors = np.stack([entry.vector for entry in entries if entry.vector is not None]).astype(np.float16)
    boxes = np.array([entry.box for entry in entries], np.float32)
    points = np.array([entry.landmarks for entry in entries], np.float32)
    columns = {
        "key": [entry.key for entry in entries],
        "box": pa.FixedSizeListArray.from_arrays(boxes.ravel(), 4),
        "confidence": [entry.confidence for entry in entries],
        "embedding": pa.FixedShapeTensorArray.from_numpy_ndarray(vectors),
        "faces": [min(entry.faces, np.iinfo(np.int16).max) for entry in entries],
        "landmarks": pa.FixedSizeListArray.from_arrays(points.ravel(), _POINTS),
        "rotation": [entry.rotation for entry in entries],
        "sharpness": [entry.sharpness for entry in entries],
    }
    return _table(columns, pa.schema([*vector_schema(vectors.shape[1]), *DETAIL_SCHEMA]), run_id)


def with_details(table: pa.Table) -> pa.Table:
    """A `data/` table with the columns of details, whose values are not known if it has none."""
    if DETAIL_SCHEMA.names[-1] in table.column_names:
        return table
    unknown = pa.array(np.full(table.num_rows, np.nan, np.float32))
    points = pa.array(np.full(table.num_rows * _POINTS, np.nan, np.float32))
    columns = (pa.FixedSizeListArray.from_arrays(points, _POINTS), unknown, unknown)
    for name, column in zip(DETAIL_SCHEMA.names, columns, strict=True):
        table = table.append_column(name, column)
    return table


def has_details(table: pa.Table) -> np.ndarray:
    """For which rows of a `data/` table, read with the column `sharpness`, the details are known: (N,) bool."""
    if "sharpness" not in table.column_names:
        return np.zeros(table.num_rows, np.bool_)
    return ~np.isnan(table.column("sharpness").to_numpy())


def failure_table(entries: Sequence[Entry], run_id: str) -> pa.Table:
    """The table of a `fail/` segment, from entries without vectors."""
    skipped = [entry.skipped for entry in entries if entry.skipped is not None]
    columns = {
        "key": [entry.key for entry in entries],
        "reason": [failure.reason.value for failure in skipped],
        "message": [failure.message for failure in skipped],
        "depends": [failure.depends for failure in skipped],
    }
    return _table(columns, failure_schema(), run_id)


def _table(columns: Mapping[str, object], schema: pa.Schema, run_id: str) -> pa.Table:
    rows = len(columns["key"])  # type: ignore[arg-type]
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    return pa.table({**columns, "created_at": [now] * rows, "run_id": [run_id] * rows}, schema=schema)


def write_segment(
    folder: Location,
    table: pa.Table,
    staging: Location,
    *,
    fingerprint: str,
    compute_path: str = "",
    written: int | None = None,
) -> Location:
    """Write a segment into `folder`, atomically; returns its location.

    fingerprint: its id. compute_path: what computed the vectors. written: the time that the name states, in
    nanoseconds; now by default. It decides which row of a key counts.
    """
    footer = {"fingerprint": fingerprint, "compute_path": compute_path}
    # Built in memory: a writer that fails while streaming to S3 publishes half a file (arrow#40502).
    stream = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({METADATA_KEY: json.dumps(footer)}),
        stream,
        compression="none",
        use_dictionary=False,
        row_group_size=ROW_GROUP,
        data_page_size=64 << 20,
        write_statistics=["key"],
        write_page_checksum=True,
    )
    writer = re.sub(r"[^A-Za-z0-9]+", "_", f"{gethostname()[:64]}_{getpid()}")
    target = folder.join(f"{written or time_ns():020d}-{writer}-{uuid4().hex[:8]}-r{table.num_rows}.parquet")
    target.write_bytes(stream.getvalue(), staging=staging)
    return target


def read_footer(location: Location, fingerprint: str, schema: pa.Schema) -> pq.FileMetaData:
    """Read a segment's footer and check its fingerprint, row count (against the name) and column types.

    Raises FileNotFoundError for an absent segment and one of `DAMAGE` for one that cannot be trusted.
    """
    footer = retry(lambda: _metadata(location))
    file_schema = footer.schema.to_arrow_schema()
    metadata = read_document((file_schema.metadata or {}).get(METADATA_KEY, b"null"))
    if not isinstance(metadata, dict):
        raise ValueError("not a segment of this cache: its footer states no fingerprint")
    if metadata.get("fingerprint") != fingerprint:
        raise ValueError(f"its footer states fingerprint {metadata.get('fingerprint')}")
    name = SegmentName.parse(location.name)
    counts = {footer.num_rows, sum(_group_sizes(footer))}
    if name is None or counts != {name.rows}:
        raise ValueError(f"has {min(counts)} rows, which its name does not state")
    # Metadata of columns would tell more, but pyarrow ends the process where they are damaged.
    if max(_group_sizes(footer), default=0) > MOST_GROUP:
        raise ValueError(f"has a row group of more than {MOST_GROUP:,} rows")
    for field in (*schema, *(DETAIL_SCHEMA.field(name) for name in _details_in(footer))):
        index = file_schema.get_field_index(field.name)
        if index < 0:
            raise ValueError(f"column {field.name} is missing")
        # Old pyarrow releases misread a column of the other nullability.
        column = file_schema.field(index)
        if (column.type, column.nullable) != (field.type, field.nullable):
            types = [f"{each.type}{'' if each.nullable else ' not null'}" for each in (column, field)]
            raise ValueError(f"column {field.name} is {types[0]}, not {types[1]}")
    return footer


def _details_in(footer: pq.FileMetaData) -> list[str]:
    """The columns of details that a segment has: all of them or none."""
    names = footer.schema.to_arrow_schema().names
    return DETAIL_SCHEMA.names if any(name in names for name in DETAIL_SCHEMA.names) else []


def _metadata(location: Location) -> pq.FileMetaData:
    with _opened(location) as source:
        return pq.read_metadata(source)


@contextmanager
def _opened(location: Location) -> Iterator[pa.NativeFile]:
    """An open segment. FileNotFoundError also if an object store deletes it meanwhile: that is no damage."""
    try:
        with location.filesystem.open_input_file(location.path) as source:
            yield source
    except OSError as exc:
        if is_absent(exc):
            raise FileNotFoundError(str(location)) from exc
        raise


def _group_sizes(footer: pq.FileMetaData) -> list[int]:
    return [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]


def read_segment(
    location: Location, fingerprint: str, schema: pa.Schema, *, columns: list[str] | None = None
) -> pa.Table:
    """Read a segment, all columns by default; checks what `read_footer` checks, and page checksums.

    columns: those of details are left out if the segment has none.
    """
    footer = read_footer(location, fingerprint, schema)
    details = _details_in(footer)
    wanted = [*schema.names, *details] if columns is None else columns
    present = [name for name in wanted if name in details or name not in DETAIL_SCHEMA.names]
    return _read(location, footer, range(footer.num_row_groups), present)


def _read(location: Location, footer: pq.FileMetaData, groups: Sequence[int], columns: list[str]) -> pa.Table:
    table = retry(lambda: _read_groups(location, footer, groups, columns))
    for name in table.column_names:
        if table.column(name).null_count:
            raise ValueError(f"column {name} has nulls")
    return table


def _read_groups(location: Location, footer: pq.FileMetaData, groups: Sequence[int], columns: list[str]) -> pa.Table:
    with _opened(location) as source:
        # Over a network, one request for all columns of a group; local files are faster without.
        file = pq.ParquetFile(
            source, metadata=footer, page_checksum_verification=True, pre_buffer=not location.is_local
        )
        return file.read_row_groups(list(groups), columns=columns, use_threads=False)


def compute_path_of(table: pa.Table) -> str:
    """The compute path that the footer of a segment states, given the segment's table."""
    return str(json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}")).get("compute_path", ""))


def read_rows(
    location: Location, fingerprint: str, dimension: int, rows: np.ndarray, *, details: bool = False
) -> list[Entry]:
    """The entries at `rows` (N,) of a `data/` segment; raises what `read_footer` raises.

    details: also read landmarks, rotation and sharpness. A published segment never changes, so footers and row
    groups stay cached.
    """
    _, starts = _footer_and_starts(location, fingerprint, dimension)
    groups = np.searchsorted(starts, rows, side="right") - 1
    decoded = {group: _group(location, fingerprint, dimension, group, details) for group in set(groups.tolist())}
    offsets = rows - starts[groups]
    return [decoded[group].entry(row) for group, row in zip(groups.tolist(), offsets.tolist(), strict=True)]


@lru_cache(maxsize=CACHED_FOOTERS)
def _footer_and_starts(location: Location, fingerprint: str, dimension: int) -> tuple[pq.FileMetaData, np.ndarray]:
    """The footer of a `data/` segment, and the first row of each of its G row groups: (G,) int64."""
    footer = read_footer(location, fingerprint, vector_schema(dimension))
    return footer, np.cumsum([0, *_group_sizes(footer)])[:-1]


@lru_cache(maxsize=CACHED_GROUPS)
def _group(location: Location, fingerprint: str, dimension: int, group: int, details: bool) -> _Rows:
    footer, _ = _footer_and_starts(location, fingerprint, dimension)
    more = _details_in(footer) if details else []
    return _Rows.of(_read(location, footer, [group], [*_ENTRY_COLUMNS, *more]))


@dataclass(frozen=True)
class _Rows:
    """A decoded row group. keys: 32 N bytes. vectors: (N, D) float16. boxes: four values per row.

    details: landmarks, rotation and sharpness of each row; none if they are not known or were not read.
    """

    keys: bytes
    vectors: np.ndarray
    boxes: list[list[float]]
    confidence: list[float]
    faces: list[int]
    details: list[tuple[list[float], int, float]]

    @classmethod
    def of(cls, table: pa.Table) -> _Rows:
        boxes = table.column("box").combine_chunks().flatten().to_numpy().reshape(-1, 4).tolist()
        confidence, faces = (table.column(name).to_numpy().tolist() for name in ("confidence", "faces"))
        return cls(key_bytes(table), vector_column(table), boxes, confidence, faces, _details(table))

    def entry(self, row: int) -> Entry:
        """One row; its vector is copied so that it keeps no row group in memory."""
        return Entry(
            self.keys[32 * row : 32 * row + 32],
            self.vectors[row].copy(),
            self.boxes[row],
            self.confidence[row],
            self.faces[row],
            None,
            *(self.details[row] if self.details else ()),
        )


def _details(table: pa.Table) -> list[tuple[list[float], int, float]]:
    """Landmarks, rotation and sharpness of each row; `ValueError` for numbers that no version writes."""
    if "sharpness" not in table.column_names:
        return []
    points = table.column("landmarks").combine_chunks().flatten().to_numpy().reshape(-1, _POINTS)
    rotation, sharpness = (table.column(name).to_numpy() for name in ("rotation", "sharpness"))
    known = has_details(table)
    if np.isinf(points).any() or np.isinf(sharpness).any() or not np.isin(rotation[known], _TURNS).all():
        raise ValueError("the details of a face hold numbers that are not possible")
    turns = np.where(known, rotation, 0).astype(np.int64)
    return list(zip(points.tolist(), turns.tolist(), sharpness.tolist(), strict=True))


def check_entries(entries: Sequence[Entry]) -> None:
    """Raise `ValueError` for entries with vectors or boxes that no embedder made."""
    vectors = [entry.vector for entry in entries if entry.vector is not None]
    problem = bad_norm(np.stack(vectors)) if vectors else None
    if problem or not np.isfinite([entry.box for entry in entries]).all():
        raise ValueError(problem or "a box holds values that are not finite")


def bad_norm(vectors: np.ndarray) -> str | None:
    """What is wrong with (N, D) vectors that should have length 1; NaN and infinities are wrong too."""
    norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) < NORM_TOLERANCE))
    if not len(bad):
        return None
    return f"row {bad[0]}: the vector's norm is {norms[bad[0]]:.4g}, not 1 ({len(bad)} such rows)"


def table_failures(table: pa.Table) -> dict[bytes, Skipped]:
    """The rows of a `fail/` table by key; of equal keys the last row counts.

    Rows with a reason that this version does not cache are ignored.
    """
    names = ("key", "reason", "message", "depends")
    rows = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    known = {reason.value for reason in CACHED_REASONS}
    return {
        key: Skipped(Reason(reason), message[:MOST_MESSAGE], depends[:MOST_MESSAGE])
        for key, reason, message, depends in rows
        if reason in known
    }


def key_bytes(table: pa.Table) -> bytes:
    """The keys of a table without nulls, concatenated: 32 N bytes."""
    chunks = [chunk for chunk in table.column("key").chunks if len(chunk)]
    return b"".join(
        memoryview(chunk.buffers()[1])[chunk.offset * 32 : (chunk.offset + len(chunk)) * 32] for chunk in chunks
    )


def short_keys(table: pa.Table) -> np.ndarray:
    """The first 16 bytes of each key: (N,) S16."""
    return np.frombuffer(key_bytes(table), "S16")[::2].copy()


def vector_column(table: pa.Table) -> np.ndarray:
    """The vectors of a `data/` table: (N, D) float16."""
    return np.asarray(table.column("embedding").combine_chunks().to_numpy_ndarray())
