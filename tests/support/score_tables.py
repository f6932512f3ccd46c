"""Score outputs drawn at random, as `score` writes them, for the tests of `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchverify.scoring.parquet import RECORD_KEY

THRESHOLD = 0.5


def draw_columns(
    pairs: int, seed: int = 0, *, people: int = 40, failed: float = 0.05, **changes: Any
) -> dict[str, Any]:
    """Columns of a score table of so many pairs; `changes` replace columns, None leaves one out."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, pairs).astype(np.int8)
    a = rng.integers(0, people, pairs)
    b = np.where(truth == 0, a, (a + rng.integers(1, people, pairs)) % people)
    similarity = np.clip(rng.normal(0.7 - 0.5 * truth, 0.2), -1, 1).astype(np.float32)
    probability = (1 / (1 + np.exp(12 * (similarity.astype(np.float64) - 0.45)))).astype(np.float32)
    lost = rng.random(pairs) < failed
    columns: dict[str, Any] = {
        "image_a": [f"{each}/{shot}.jpg" for each, shot in zip(a, rng.integers(0, 3, pairs), strict=True)],
        "image_b": [f"{each}/{shot}.jpg" for each, shot in zip(b, rng.integers(3, 6, pairs), strict=True)],
        "true_label": pa.array(truth),
        "person_a": [f"person {each}" for each in a],
        "person_b": [f"person {each}" for each in b],
        "camera": np.where(rng.random(pairs) < 0.5, "north", "south"),
        "probability": pa.array(probability, mask=lost),
        "label": pa.array((probability >= np.float32(THRESHOLD)).astype(np.int8), mask=lost),
        "similarity": pa.array(similarity, mask=lost),
        "status": np.where(lost, "no_face", "ok"),
        "error_a": pa.array(np.where(lost, "no_face", ""), mask=~lost),
        "error_b": pa.nulls(pairs, pa.string()),
    }
    return {name: each for name, each in (columns | changes).items() if each is not None}


def write_scores(path: Path, columns: dict[str, Any], **record: Any) -> str:
    """A score output with a run record."""
    table = pa.table(columns)
    about = {"threshold": THRESHOLD, "options": {}, "manifest": [str(path.with_suffix(".csv"))]} | record
    metadata = {RECORD_KEY: json.dumps({name: each for name, each in about.items() if each is not None})}
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=100)
    return str(path)
