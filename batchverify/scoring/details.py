"""The columns of `--details`: what is known of the face on each side of a pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.cache.segment import Entry
from batchverify.engine.embedding_table import EmbeddingTable
from batchverify.manifest.columns import DETAIL_SCHEMA
from batchverify.records import Reason

SIDES = ("a", "b")
# The columns of both sides, in order.
DETAIL_FIELDS = [field.with_name(f"{field.name}_{side}") for side in SIDES for field in DETAIL_SCHEMA]


def detail_columns(details: np.ndarray, reasons: pa.Array) -> list[pa.Array]:
    """The columns of one side, in the order of `DETAIL_SCHEMA`, for N images.

    details: (N,) of type `DETAILS`. reasons: (N,) why an image failed, null where it did not. What is not known is
    null. Boxes and landmarks are in pixels of the upright original.
    """
    embedded = reasons.is_null().to_numpy(zero_copy_only=False)
    found = embedded & ~np.isnan(details["confidence"])
    without = pc.equal(reasons, Reason.NO_FACE.value).fill_null(False).to_numpy(zero_copy_only=False)
    box = details["box"]
    size = np.sqrt(np.maximum((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]), 0))
    columns = [pa.array(values, pa.float32(), mask=~found) for values in (*box.T, size)]
    return [
        *columns,
        _lists(details["landmarks"], found),
        pa.array(details["confidence"], mask=~found),
        # Zero with `no_face`, and in the rows of the table that nothing was written to.
        pa.array(details["faces"].astype(np.int16), mask=~(found | without)),
        pa.array(details["rotation"].astype(np.int16), mask=~found),
        pa.array(details["sharpness"], mask=~embedded),
    ]


def details_of(entry: Entry) -> dict[str, Any]:
    """The same of one image, by name."""
    table = EmbeddingTable(1, details=True, dimension=0)
    if entry.skipped is not None:
        table.fail(0, entry.skipped)
    else:
        table.put(0, np.zeros(0))
        table.describe(0, entry)
    columns = detail_columns(np.asarray(table.details), table.reasons(np.zeros(1, np.int64)))
    return {name: column[0].as_py() for name, column in zip(DETAIL_SCHEMA.names, columns, strict=True)}


def _lists(points: np.ndarray, found: np.ndarray) -> pa.Array:
    """(N, 10) float32 as lists, null where nothing was found and for NaN."""
    # No lists of fixed size: old pyarrow releases cannot read back their nulls (arrow#35692).
    known = found & ~np.isnan(points).any(axis=1)
    ends = np.cumsum(known) * points.shape[1]
    starts = np.concatenate([[0], ends]).astype(np.int32)
    offsets = pa.array(starts, mask=np.append(~known, False))
    return pa.ListArray.from_arrays(offsets, pa.array(points[known].ravel(), pa.float32()))
