"""One cache segment: a small Parquet file of vectors or of failures, its name, its schema, its checks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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

from batchverify.records import CACHED_REASONS, Reason, Skipped
from batchverify.storage.location import Location

METADATA_KEY = b"batchverify"
DIMENSION = 512
ROW_GROUP = 256
# What reading a damaged file raises; FileNotFoundError is not among them for callers that catch it first.
DAMAGE = (OSError, pa.ArrowException, ValueError, KeyError)
# Row groups that a process keeps decoded, 0.3 MB each: keys in another order than they were written in
# cost one read a group, not one a key.
GROUPS_KEPT = 256
FOOTERS_KEPT = 128
_NAME = re.compile(r"^(\d{20})-\w+-[0-9a-f]{8}-r(\d+)\.parquet$", re.ASCII)
_READ = ["key", "box", "confidence", "embedding", "faces"]


@dataclass(frozen=True)
class Entry:
    """One image's result. key: 32 bytes. vector: (512,) float16, or None beside a cacheable `skipped`."""

    key: bytes
    vector: np.ndarray | None
    box: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
    confidence: float = float("nan")
    faces: int = 0
    skipped: Skipped | None = None


@dataclass(frozen=True)
class Provenance:
    """Who wrote a segment: the fingerprint's id, the run, and the device, dtype and batch shape."""

    fingerprint: str
    run_id: str = ""
    compute_path: str = ""


@dataclass(frozen=True)
class SegmentName:
    """What a segment's name states: when it was written (nanoseconds, UTC) and how many rows it has."""

    written: int
    rows: int

    @classmethod
    def parse(cls, name: str) -> SegmentName | None:
        """None for a name that no writer of ours gives."""
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
    # Never a null vector: old releases cannot read it back (arrow#35692).
    return pa.schema([pa.field(name, kind, nullable=name != "embedding") for name, kind in fields.items()])


def failure_schema() -> pa.Schema:
    """The columns of a `fail/` segment."""
    texts: dict[str, pa.DataType] = {name: pa.string() for name in ("reason", "message", "depends")}
    return pa.schema(
        {"key": pa.binary(32)} | texts | {"created_at": pa.timestamp("us"), "run_id": pa.string()}
    )


def vector_table(entries: Sequence[Entry], run_id: str) -> pa.Table:
    """Entries that have vectors, as the table of a `data/` segment."""
    vectors = np.stack([entry.vector for entry in entries if entry.vector is not None]).astype(np.float16)
    boxes = np.array([entry.box for entry in entries], np.float32)
    columns = {
        "key": [entry.key for entry in entries],
        "box": pa.FixedSizeListArray.from_arrays(boxes.ravel(), 4),
        "confidence": [entry.confidence for entry in entries],
        "embedding": pa.FixedShapeTensorArray.from_numpy_ndarray(vectors),
        "faces": [min(entry.faces, np.iinfo(np.int16).max) for entry in entries],
    }
    return _table(columns, vector_schema(vectors.shape[1]), run_id)


def failure_table(entries: Sequence[Entry], run_id: str) -> pa.Table:
    """Entries without vectors, as the table of a `fail/` segment."""
    skipped = [entry.skipped for entry in entries if entry.skipped is not None]
    columns = {
        "key": [entry.key for entry in entries],
        "reason": [each.reason.value for each in skipped],
        "message": [each.message for each in skipped],
        "depends": [each.depends for each in skipped],
    }
    return _table(columns, failure_schema(), run_id)


def _table(columns: Mapping[str, object], schema: pa.Schema, run_id: str) -> pa.Table:
    rows = len(columns["key"])  # type: ignore[arg-type]
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    return pa.table({**columns, "created_at": [now] * rows, "run_id": [run_id] * rows}, schema=schema)


def write_segment(folder: Location, table: pa.Table, provenance: Provenance, staging: Location) -> Location:
    """Write a segment below `folder`, complete or absent; returns where it lies."""
    footer = {"fingerprint": provenance.fingerprint, "compute_path": provenance.compute_path}
    # Built in memory: a writer that streams into S3 publishes half a file when it fails (arrow#40502).
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
    target = folder.join(f"{time_ns():020d}-{writer}-{uuid4().hex[:8]}-r{table.num_rows}.parquet")
    target.write_bytes(stream.getvalue(), staging=staging)
    return target


def read_footer(location: Location, fingerprint: str, schema: pa.Schema) -> pq.FileMetaData:
    """A segment's footer: it states this fingerprint, the rows of the name, and columns of these types.

    Raises FileNotFoundError for a segment that is gone and one of `DAMAGE` for one that cannot be trusted.
    """
    with location.filesystem.open_input_file(location.path) as source:
        footer = pq.read_metadata(source)
    found = footer.schema.to_arrow_schema()
    ours = (found.metadata or {}).get(METADATA_KEY)
    stated = json.loads(ours) if ours is not None else None
    if not isinstance(stated, dict):
        raise ValueError("not a segment of this cache: its footer names no fingerprint")
    if stated.get("fingerprint") != fingerprint:
        raise ValueError(f"its footer states fingerprint {stated.get('fingerprint')}")
    name = SegmentName.parse(location.name)
    counts = {footer.num_rows, sum(_lengths(footer))}
    if name is None or counts != {name.rows}:
        raise ValueError(f"holds {min(counts)} rows, not what its name states")
    for field in schema:
        at = found.get_field_index(field.name)
        if at < 0:
            raise ValueError(f"column {field.name} is missing")
        # Old releases read a column of the other nullability as other values.
        other = found.field(at)
        if (other.type, other.nullable) != (field.type, field.nullable):
            kinds = [f"{each.type}{'' if each.nullable else ' not null'}" for each in (other, field)]
            raise ValueError(f"column {field.name} is {kinds[0]}, not {kinds[1]}")
    return footer


def _lengths(footer: pq.FileMetaData) -> list[int]:
    return [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]


def read_segment(
    location: Location, fingerprint: str, schema: pa.Schema, *, columns: list[str] | None = None
) -> pa.Table:
    """Read a whole segment, all columns by default, with the checks of `read_footer` and page checksums."""
    footer = read_footer(location, fingerprint, schema)
    return _read(location, footer, range(footer.num_row_groups), columns or schema.names)


def _read(location: Location, footer: pq.FileMetaData, groups: Sequence[int], columns: list[str]) -> pa.Table:
    with location.filesystem.open_input_file(location.path) as source:
        # Over a network the columns of a group come in one request; a local file is faster without.
        file = pq.ParquetFile(
            source, metadata=footer, page_checksum_verification=True, pre_buffer=not location.is_local
        )
        table = file.read_row_groups(list(groups), columns=columns, use_threads=False)
    empty = [name for name in table.column_names if table.column(name).null_count]
    if empty:
        raise ValueError(f"column {empty[0]} has nulls")
    return table


def read_rows(location: Location, fingerprint: str, dimension: int, rows: np.ndarray) -> list[Entry]:
    """The entries at `rows` (N,) of a `data/` segment; raises as `read_footer` does.

    A segment never changes once it has its name, so footers and row groups read before are not read again.
    """
    starts = _known_footer(location, fingerprint, dimension).starts
    owners = (np.searchsorted(starts, rows, side="right") - 1).tolist()
    groups = {owner: _group(location, fingerprint, dimension, owner) for owner in set(owners)}
    offsets = (rows - starts[owners]).tolist() if owners else []
    return [groups[owner].entry(offset) for owner, offset in zip(owners, offsets, strict=True)]


@dataclass(frozen=True)
class _Footer:
    metadata: pq.FileMetaData
    starts: np.ndarray


@lru_cache(maxsize=FOOTERS_KEPT)
def _known_footer(location: Location, fingerprint: str, dimension: int) -> _Footer:
    footer = read_footer(location, fingerprint, vector_schema(dimension))
    return _Footer(footer, np.cumsum([0, *_lengths(footer)])[:-1])


@lru_cache(maxsize=GROUPS_KEPT)
def _group(location: Location, fingerprint: str, dimension: int, group: int) -> _Rows:
    footer = _known_footer(location, fingerprint, dimension).metadata
    return _Rows.of(_read(location, footer, [group], _READ))


@dataclass(frozen=True)
class _Rows:
    """A decoded row group. keys: 32 N bytes. vectors: (N, D) float16. boxes: N times four numbers."""

    keys: bytes
    vectors: np.ndarray
    boxes: list[list[float]]
    confidence: list[float]
    faces: list[int]

    @classmethod
    def of(cls, table: pa.Table) -> _Rows:
        boxes = table.column("box").combine_chunks().flatten().to_numpy().reshape(-1, 4).tolist()
        confidence, faces = (table.column(name).to_numpy().tolist() for name in ("confidence", "faces"))
        return cls(key_bytes(table), vector_column(table), boxes, confidence, faces)

    def entry(self, row: int) -> Entry:
        """One row, its vector copied: an entry keeps no row group in memory."""
        return Entry(
            self.keys[32 * row : 32 * row + 32],
            self.vectors[row].copy(),
            self.boxes[row],
            self.confidence[row],
            self.faces[row],
        )


def table_failures(table: pa.Table) -> dict[bytes, Skipped]:
    """The rows of a `fail/` table by key, a later row before an earlier one.

    Reasons that this version does not keep in a cache are left out.
    """
    names = ("key", "reason", "message", "depends")
    rows = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    kept = {reason.value for reason in CACHED_REASONS}
    return {
        key: Skipped(Reason(reason), text, depends) for key, reason, text, depends in rows if reason in kept
    }


def key_bytes(table: pa.Table) -> bytes:
    """The keys of a table without nulls, one after the other: 32 N bytes."""
    chunks = [chunk for chunk in table.column("key").chunks if len(chunk)]
    return b"".join(
        memoryview(chunk.buffers()[1])[chunk.offset * 32 : (chunk.offset + len(chunk)) * 32]
        for chunk in chunks
    )


def short_keys(table: pa.Table) -> np.ndarray:
    """The first 16 bytes of each key: (N,) S16."""
    return np.frombuffer(key_bytes(table), "S16")[::2].copy()


def vector_column(table: pa.Table) -> np.ndarray:
    """The vectors of a `data/` table: (N, D) float16."""
    return np.asarray(table.column("embedding").combine_chunks().to_numpy_ndarray())
