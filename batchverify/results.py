"""Results: the output's schema, its rows from scores and reasons, the run record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchverify.engine.gallery import Gallery
from batchverify.errors import BatchverifyError, ManifestError
from batchverify.manifest.manifest import Block
from batchverify.storage.location import Location

RECORD_KEY = "batchverify"
SCORE_FIELDS = (
    pa.field("probability", pa.float32()),
    pa.field("label", pa.int8()),
    pa.field("similarity", pa.float32()),
    pa.field("status", pa.string()),
    pa.field("error_a", pa.string()),
    pa.field("error_b", pa.string()),
)


def output_schema(carried: pa.Schema) -> pa.Schema:
    """The manifest's columns, then the scores; `ManifestError` where the two have a name in common."""
    for field in SCORE_FIELDS:
        if field.name in carried.names:
            raise ManifestError(
                f"the manifest's column '{field.name}' has the name of a column of the output; rename it"
            )
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


def read_record(path: str) -> dict[str, Any]:
    """The run record of an output file."""
    location = Location.parse(path)
    with location.filesystem.open_input_file(location.path) as file:
        metadata = pq.ParquetFile(file).metadata.metadata or {}
    if RECORD_KEY.encode() not in metadata:
        raise BatchverifyError(f"{path}: holds no run record of batchverify")
    return dict(json.loads(metadata[RECORD_KEY.encode()]))


def record_text(record: Mapping[str, Any]) -> str:
    """A run record as it stands in footers and in `_SUCCESS`."""
    return json.dumps(record, sort_keys=True)
