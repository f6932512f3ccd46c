"""Pairs worth looking at: the clearest errors, and their export for review."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from batchverify.errors import BatchverifyError, UsageError
from batchverify.evaluation.report.thumbnails import ImageSource
from batchverify.evaluation.scores import PERSONS, UNKNOWN, Scores
from batchverify.manifest.columns import LABEL, PREDICTED_LABEL
from batchverify.manifest.spreadsheet import safe_name, safe_path
from batchverify.storage.location import Location

# Examples of each reason for failure.
FAILED = 4
FORMATS = (".csv", ".parquet")


def false_accepts(scores: Scores) -> np.ndarray:
    """Rows of different pairs called same, the clearest errors first."""
    return _ranked((scores.truth == 1) & scores.scored & ~scores.calls, scores.probability)


def false_rejects(scores: Scores) -> np.ndarray:
    """Rows of same pairs called different, the clearest errors first."""
    return _ranked((scores.truth == 0) & scores.calls, -scores.probability)


def nearest(scores: Scores) -> np.ndarray:
    """Rows from the threshold outwards, whatever their truth."""
    return _ranked(scores.scored, np.abs(scores.probability - np.float32(scores.threshold)))


def worst(scores: Scores) -> np.ndarray:
    """Rows for review: wrong verdicts, the clearest first, then all others from the threshold outwards."""
    gaps = np.abs(scores.probability - np.float32(scores.threshold))
    wrong = (scores.truth != UNKNOWN) & (scores.calls != (scores.truth == 1))
    # Gaps lie between 0 and 1, so every wrong verdict comes before all others.
    return _ranked(scores.scored, np.where(wrong, -gaps, 2 + gaps))


def _ranked(chosen: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The chosen rows by ascending values, equal ones in their order. chosen, values: (N,)."""
    rows = np.flatnonzero(chosen)
    return rows[np.argsort(values[rows], kind="stable")]


def failed(scores: Scores, reason: str) -> np.ndarray:
    """The first rows that failed for a reason."""
    code = scores.reasons.index(reason)
    return np.flatnonzero(~scores.scored & (scores.reason == code))[:FAILED]


def check_target(path: str, inputs: Sequence[str] = (), option: str = "--export-worst") -> Location:
    """Where the pairs go. Raises `UsageError` for another format, and for a place among the inputs."""
    target = Location.parse(path)
    if target.suffix not in FORMATS:
        raise UsageError(f"{path}: {option} writes {' or '.join(FORMATS)} files")
    for source in map(Location.parse, inputs):
        if source in (target, target.parent):
            raise UsageError(f"{path}: {option} would write into the input {source}; name another file")
    return target


def write_table(table: pa.Table, target: Location) -> None:
    """Write a manifest for review as CSV, without formulas, or Parquet."""
    buffer = io.BytesIO()
    if target.suffix == ".csv":
        pacsv.write_csv(_without_formulas(table), buffer)
    else:
        pq.write_table(table, buffer)
    try:
        target.write_bytes(buffer.getbuffer())
    except OSError as exc:
        raise BatchverifyError(f"{target}: could not be written: {exc}") from exc


def review_table(scores: Scores, rows: np.ndarray, target: Location, source: ImageSource) -> pa.Table:
    """The chosen rows as a manifest.

    `label` is the truth, blank if unknown; `predicted_label` and `probability` are the run's. Paths are made absolute
    unless the file lies in the folder where relative paths start.
    """
    sides = scores.file.sides
    people = [name for name in PERSONS if name in scores.file.schema.names]
    read = scores.file.take(rows, [*sides, *people])
    stays = any(root.root == target.parent for root in source.roots)
    columns: dict[str, pa.Array] = {}
    for name, side in zip(("image_a", "image_b"), sides, strict=True):
        cells = [row[side] for row in read]
        found = cells if stays else map(source.resolve, cells)
        paths = [path if isinstance(path, str) else cell for path, cell in zip(found, cells, strict=True)]
        columns[name] = pa.array(paths, pa.string())
    truth = scores.truth[rows]
    columns[LABEL] = pa.array(truth, mask=truth == UNKNOWN)
    columns[PREDICTED_LABEL] = pa.array(scores.calls[rows].astype(np.int8))
    columns["probability"] = pa.array(scores.probability[rows])
    return pa.table(columns | {name: pa.array([row[name] for row in read]) for name in people})


def _without_formulas(table: pa.Table) -> pa.Table:
    """The table with no text that a spreadsheet would calculate; its paths name the same files."""
    for index, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            safe = safe_path if field.name in ("image_a", "image_b") else safe_name
            texts = [safe(text) if text is not None else None for text in table.column(index).to_pylist()]
            table = table.set_column(index, field, pa.array(texts, field.type))
    return table
