"""One cache segment: a small Parquet file of vectors or of failures, its name, its schema, its checks."""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchverify.locations import Location
from batchverify.records import Reason, Skipped

METADATA_KEY = b"batchverify"
ROW_GROUP = 256
# What reading a damaged file raises; FileNotFoundError is not among them for callers that catch it first.
DAMAGE = (OSError, pa.ArrowException, ValueError, KeyError)
_ROWS = re.compile(r"-r(\d+)\.parquet$")


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
    """Who wrote a segment: the fingerprint's id, the run, and the device, numbers and batch shape."""

    fingerprint: str
    run_id: str = ""
    compute_path: str = ""


def vector_table(entries: Sequence[Entry], run_id: str) -> pa.Table:
    """Entries that have vectors, as the table of a `data/` segment."""
    vectors = np.stack([entry.vector for entry in entries if entry.vector is not None])
    boxes = np.array([entry.box for entry in entries], np.float32)
    columns = {
        "key": pa.array([entry.key for entry in entries], pa.binary(32)),
        "box": pa.FixedSizeListArray.from_arrays(boxes.ravel(), 4),
        "confidence": pa.array([entry.confidence for entry in entries], pa.float32()),
        "embedding": pa.FixedShapeTensorArray.from_numpy_ndarray(vectors.astype(np.float16)),
        "faces": pa.array([entry.faces for entry in entries], pa.int16()),
    }
    return _table(columns, len(entries), run_id)


def failure_table(entries: Sequence[Entry], run_id: str) -> pa.Table:
    """Entries without vectors, as the table of a `fail/` segment."""
    skipped = [entry.skipped for entry in entries if entry.skipped is not None]
    columns = {
        "key": pa.array([entry.key for entry in entries], pa.binary(32)),
        "reason": pa.array([each.reason.value for each in skipped]),
        "message": pa.array([each.message for each in skipped]),
        "depends": pa.array([each.depends for each in skipped]),
    }
    return _table(columns, len(entries), run_id)


def _table(columns: dict[str, pa.Array], rows: int, run_id: str) -> pa.Table:
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    moments = pa.array([now] * rows, pa.timestamp("us"))
    table = pa.table(columns | {"created_at": moments, "run_id": pa.array([run_id] * rows)})
    # Never a null vector: old releases cannot read it back (arrow#35692).
    return table.cast(pa.schema([each.with_nullable(each.name != "embedding") for each in table.schema]))


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
    writer = re.sub(r"[^A-Za-z0-9]+", "_", f"{socket.gethostname()}_{os.getpid()}")
    name = f"{time.time_ns():020d}-{writer}-{uuid.uuid4().hex[:8]}-r{table.num_rows}.parquet"
    target = folder.join(name)
    target.write_bytes(stream.getvalue(), staging=staging)
    return target


def read_segment(
    location: Location, fingerprint: str, *, columns: list[str] | None = None, groups: list[int] | None = None
) -> pa.Table:
    """Read a segment's columns and row groups with its checksums checked.

    Raises FileNotFoundError for a segment that is gone and one of `DAMAGE` for one that cannot be trusted.
    """
    with location.filesystem.open_input_file(location.path) as source:
        file = pq.ParquetFile(source, page_checksum_verification=True)
        stated = json.loads((file.schema_arrow.metadata or {})[METADATA_KEY])["fingerprint"]
        if stated != fingerprint:
            raise ValueError(f"its footer states fingerprint {stated}")
        if stated_rows(location.name) != file.metadata.num_rows:
            raise ValueError(f"holds {file.metadata.num_rows} rows, not what its name states")
        chosen = range(file.num_row_groups) if groups is None else groups
        return file.read_row_groups(list(chosen), columns=columns)


def table_entries(table: pa.Table) -> list[Entry]:
    """The rows of a `data/` table."""
    columns = [table.column(name).to_pylist() for name in ("key", "box", "confidence", "faces")]
    rows = zip(vector_column(table), *columns, strict=True)
    return [Entry(key, vector, box, confidence, faces) for vector, key, box, confidence, faces in rows]


def table_failures(table: pa.Table) -> dict[bytes, Skipped]:
    """The rows of a `fail/` table by key."""
    names = ("key", "reason", "message", "depends")
    rows = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    return {key: Skipped(Reason(reason), message, depends) for key, reason, message, depends in rows}


def short_keys(table: pa.Table) -> np.ndarray:
    """The first 16 bytes of each key: (N,) S16."""
    column = table.column("key").combine_chunks()
    raw = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * 32 : (column.offset + len(column)) * 32]
    return np.ascontiguousarray(raw.reshape(-1, 32)[:, :16]).view("S16").ravel()


def vector_column(table: pa.Table) -> np.ndarray:
    """The vectors of a `data/` table: (N, D) float16."""
    return np.asarray(table.column("embedding").combine_chunks().to_numpy_ndarray())


def stated_rows(name: str) -> int | None:
    """The number of rows that a segment's name states."""
    match = _ROWS.search(name)
    return int(match.group(1)) if match else None
