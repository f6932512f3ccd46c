"""Pairs worth looking at: the surest errors, and their export for review."""

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
from batchverify.storage.location import Location

# Examples of each reason.
FAILED = 4
CARRIED = ("person_a", "person_b", "error_a", "error_b")
FORMATS = (".csv", ".parquet")


@dataclass(frozen=True)
class Example:
    """One pair. cells: its image cells as the manifest has them. errors: the reason of each side, or None.

    before: the probability in the reference run, where there is one.
    """

    row: int
    cells: tuple[str | None, str | None]
    truth: int
    probability: float
    similarity: float
    errors: tuple[str | None, str | None] = (None, None)
    before: float | None = None


def false_accepts(scores: Scores, most: int) -> np.ndarray:
    """Rows of different pairs called same, the surest first."""
    return _first(scores, (scores.truth == 1) & scores.scored & ~scores.calls, 1, most)


def false_rejects(scores: Scores, most: int) -> np.ndarray:
    """Rows of same pairs called different, the surest first."""
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
    """Places of the smallest of (N,) numbers, ascending; of equal ones the first."""
    if 0 < most < len(values):
        # All that tie with the last one stay for the stable sort.
        kept = np.flatnonzero(values <= np.partition(values, most - 1)[most - 1])
        return kept[np.argsort(values[kept], kind="stable")][:most]
    return np.argsort(values, kind="stable")[:most]


def read_examples(scores: Scores, rows: np.ndarray, reference: Scores | None = None) -> list[Example]:
    """Some rows with their paths; none where the file has no columns of images."""
    names = scores.file.schema.names
    try:
        scores.file.require(*scores.file.sides)
    except ManifestError:
        return []
    columns = [*scores.file.sides, *(name for name in CARRIED if name in names)]
    found = scores.file.take(rows, columns)
    return [_example(scores, row, cells, reference) for row, cells in zip(rows.tolist(), found, strict=True)]


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
    """Rows for review: wrong verdicts, the surest first, then all others from the threshold outwards."""
    rows = np.flatnonzero(scores.scored)
    gaps = np.abs(scores.probability[rows] - np.float32(scores.threshold))
    wrong = (scores.truth[rows] >= 0) & (scores.calls[rows] != (scores.truth[rows] == 1))
    # Every wrong verdict comes before every other: gaps lie between 0 and 1.
    return rows[smallest(np.where(wrong, -gaps, 2 + gaps), most)]


def sides(examples: Sequence[Example]) -> list[str | None]:
    """The image cells of several pairs, each once, in order."""
    return list(dict.fromkeys(cell for each in examples for cell in each.cells))


def check_target(path: str, inputs: Sequence[str] = ()) -> Location:
    """Where the pairs go; `UsageError` for a name of another format and for one of the inputs."""
    target = Location.parse(path)
    if target.suffix not in FORMATS:
        raise UsageError(
            f"{path}: --export-worst writes {' or '.join(FORMATS)}; the name must end in one of them"
        )
    for each in map(Location.parse, inputs):
        if each in (target, target.parent):
            raise UsageError(
                f"{path}: --export-worst would write into {each}, which is read; name another file"
            )
    return target


def write_review(scores: Scores, most: int, target: Location, source: ImageSource) -> int:
    """Write the worst pairs, at most so many, and return how many: wrong verdicts first, then close calls.

    The columns are those of a manifest: `label` is the truth, blank where unknown, `predicted_label` and
    `probability` are the run's. Paths are made absolute unless the file lies where relative ones start.
    """
    table = review_table(scores, worst(scores, most), target, source)
    buffer = io.BytesIO()
    if target.suffix == ".csv":
        pacsv.write_csv(table, buffer)
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
    found = scores.file.take(rows, [*sides, *people])
    stays = any(root.root == target.parent for root in source.roots)
    columns: dict[str, pa.Array] = {}
    for name, side in zip(("image_a", "image_b"), sides, strict=True):
        columns[name] = pa.array([_path(each[side], source, stays) for each in found], pa.string())
    truth = scores.truth[rows]
    columns[LABEL] = pa.array(truth, mask=truth == UNKNOWN)
    columns[PREDICTED_LABEL] = pa.array(scores.calls[rows].astype(np.int8))
    columns["probability"] = pa.array(scores.probability[rows])
    return pa.table(columns | {name: pa.array([each[name] for each in found]) for name in people})


def _path(cell: str | None, source: ImageSource, stays: bool) -> str | None:
    found = source.resolve(cell)
    return found if isinstance(found, str) and not stays else cell
