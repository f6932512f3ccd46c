"""Run records of finished outputs, read by pyarrow alone."""

import json
from typing import Any

import pyarrow.parquet as pq


def read_record(path: str) -> dict[str, Any]:
    """The run record of an output file."""
    return json.loads(pq.read_metadata(path).metadata[b"batchverify"])
