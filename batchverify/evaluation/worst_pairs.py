"""Pairs worth looking at: the clearest errors, and their export for review."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from batchverify.errors import BatchverifyError, ManifestError, UsageError
from batchverify.evaluation.report.thumbnails import ImageSource
from batchverify.evaluation.scores import PERSONS, UNKNOWN, Scores
from batchverify.manifest.columns import LABEL, PREDICTED_LABEL
from batchverify.manifest.spreadsheet import safe_name, safe_path
from batchverify.storage.location import Location

# Examples of each reason for failure.
FAILED = 4
CARRIED = ("person_a", "person_b", "error_a", "error_b")
FORMATS = (".csv", ".parquet")


@dataclass(frozen=True)
class Example:
    """One pair. cells: its image cells as in the manifest. errors: the reason of each side, or None.

    before: the probability in the reference run, if there is one.
    """

    row: int
    cells: tuple[str | None, str | None]
    truth: int
    probability: float
    similarity: float
    errors: tuple[str | None, str | None] = (None, None)
    before: float | None = None


def false_accepts(scores: Scores, most: int) -> np.ndarray:
    """Rows of different pairs called same, the clearest errors first."""
    return _first(scores, (scores.truth == 1) & scores.scored & ~scores.calls, 1, most)


def false_rejects(scores: Scores, most: int) -> np.ndarray:
    """Rows of same pairs called different, the clearest errors first."""
    return _first(scores, (scores.truth == 0) & scores.calls, -1, most)


def _first(scores: Scores, chosen: np.ndarray, sign: int, most: int) -> np.ndarray:
    rows = np.flatnonzero(chosen)
    return rows[smallest(sign * scores.probability[rows], most)]


def nearest(scores: Scores, most: int) -> np.ndarray:
    """Rows nearest the threshold, whatever their truth."""
    rows = np.flatnonzero(scores.scored)
    return rows[smallest(np.abs(scores.probability[rows] - np.float32(scores.threshold)), most)]


def failed(scores: Scores, reason: str) -> np.ndarray:
    """The first rows that failed for a reason."""
    code = scores.reasons.index(reason)
    return np.flatnonzero(~scores.scored & (scores.reason == code))[:FAILED]


def smallest(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of the smallest of (N,) values, ascending; of equal values the first."""
    if 0 < most < len(values):
        # All values that tie with the last one, for the stable sort.
        candidates = np.flatnonzero(values <= np.partition(values, most - 1)[most - 1])
        return candidates[np.argsort(values[candidates], kind="stable")][:most]
    return np.argsort(values, kind="stable")[:most]


def read_examples(scores: Scores, rows: np.ndarray, reference: Scores | None = None) -> list[Example]:
    """Some rows with their paths; empty if the file has no image columns."""
    names = scores.file.schema.names
    try:
        scores.file.require(*scores.file.sides)
    except ManifestError:
        return []
    columns = [*scores.file.sides, *(name for name in CARRIED if name in names)]
    read = scores.file.take(rows, columns)
    return [_example(scores, row, cells, reference) for row, cells in zip(rows.tolist(), read, strict=True)]


def _example(scores: Scores, row: int, cells: dict[str, Any], reference: Scores | None) -> Example:
    a, b = scores.file.sides
    return Example(
        row=row,
        cells=(cells[a], cells[b]),
        truth=int(scores.truth[row]),
        probability=float(scores.probability[row]),
        similarity=float(scores.similarity[row]) if scores.similarity is not None else float("nan"),
        errors=(cells.get("error_a"), cells.get("error_b")),
        before=float(reference.probability[row]) if reference is not None else None,
    )


def worst(scores: Scores, most: int) -> np.ndarray:
    """Rows for review: wrong verdicts, the clearest first, then all others from the threshold outwards."""
    rows = np.flatnonzero(scores.scored)
    gaps = np.abs(scores.probability[rows] - np.float32(scores.threshold))
    wrong = (scores.truth[rows] >= 0) & (scores.calls[rows] != (scores.truth[rows] == 1))
    # Gaps lie between 0 and 1, so every wrong verdict comes before all others.
    return rows[smallest(np.where(wrong, -gaps, 2 + gaps), most)]


def sides(examples: Sequence[Example]) -> list[str | None]:
    """The distinct image cells of several pairs, in order."""
    return list(dict.fromkeys(cell for each in examples for cell in each.cells))


def check_target(path: str, inputs: Sequence[str] = ()) -> Location:
    """Where the pairs go. Raises `UsageError` for another format, and for a place among the inputs."""
    target = Location.parse(path)
    if target.suffix not in FORMATS:
        raise UsageError(f"{path}: --export-worst writes {' or '.join(FORMATS)} files")
    for source in map(Location.parse, inputs):
        if source in (target, target.parent):
            raise UsageError(f"{path}: --export-worst would write into the input {source}; name another file")
    return target


def write_review(scores: Scores, most: int, target: Location, source: ImageSource) -> int:
    """Write at most `most` pairs, wrong verdicts first, then close calls, and return their number.

    The file is a manifest: `label` is the truth, blank if unknown; `predicted_label` and `probability` are the
    run's. Paths are made absolute unless the file lies in the folder where relative paths start. A CSV file holds no
    formulas.
    """
    table = review_table(scores, worst(scores, most), target, source)
    buffer = io.BytesIO()
    if target.suffix == ".csv":
        pacsv.write_csv(_without_formulas(table), buffer)
    else:
        pq.write_table(table, buffer)
    try:
        target.write_bytes(buffer.getbuffer())
    except OSError as exc:
        raise BatchverifyError(f"{target}: could not be written: {exc}") from exc
    return table.num_rows


def review_table(scores: Scores, rows: np.ndarray, target: Location, source: ImageSource) -> pa.Table:
    """The chosen rows as a manifest."""
    sides = scores.file.sides
    people = [name for name in PERSONS if name in scores.file.schema.names]
    read = scores.file.take(rows, [*sides, *people])
    stays = any(root.root == target.parent for root in source.roots)
    columns: dict[str, pa.Array] = {}
    for name, side in zip(("image_a", "image_b"), sides, strict=True):
        columns[name] = pa.array([_path(row[side], source, stays) for row in read], pa.string())
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


def _path(cell: str | None, source: ImageSource, stays: bool) -> str | None:
    path = cell if stays else source.resolve(cell)
    return path if isinstance(path, str) else cell
