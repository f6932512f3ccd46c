"""Scores of other systems: any numeric column of a CSV or Parquet file, a similarity or a distance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from batchverify.errors import ManifestError, first_line
from batchverify.evaluation.scores import ScoreFile, Scores, read_scores, require_columns
from batchverify.manifest.columns import LABEL, TRUE_LABEL, check_label_type, read_labels, read_numbers
from batchverify.manifest.tables import TableFile, find_files

PROBABILITY = "probability"
# With so many distinct scores left, rounding is no matter.
FEWEST_STEPS = 10_000
# The lowest threshold that no scaled score reaches.
BEYOND = float(np.nextafter(np.float32(1), np.float32(2)))


@dataclass(frozen=True)
class OtherScores(ScoreFile):
    """A table whose scores stand between 0 and 1 in its column `probability`, the most alike pair at 0.

    cells: the whole table. score: its column. higher_is: `same` or `different`. low, high: the scores that became 0
    and 1.
    """

    cells: pa.Table
    score: str
    higher_is: str
    low: float
    high: float

    def table(self, names: Sequence[str], *, dictionary: bool = False) -> pa.Table:  # noqa: ARG002
        """Some whole columns."""
        self.require(*names)
        return self.cells.select(list(names))

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns, a few thousand rows at a time."""
        yield from self.table(names).to_batches(max_chunksize=1 << 16)

    def take(self, rows: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
        """Some rows by index, in the order of `rows`."""
        return list(self.table(names).take(pa.array(rows)).to_pylist())

    def scaled(self, score: float) -> float:
        """A score of the column between 0 and 1, compared there as in the column."""
        return (score - self.low) / (self.high - self.low)

    def unscaled(self, value: float | None) -> float | None:
        """The score of the column that became `value`."""
        return None if value is None else self.low + value * (self.high - self.low)


def open_scores(name: str, score: str | None, higher_is: str) -> ScoreFile:
    """An output of `score`; with the name of a column, a table of another system that has it.

    A file with a run record is always an output of ours.
    """
    if score is None:
        return ScoreFile.open(name)
    try:
        ours = ScoreFile.open(name)
    except ManifestError:
        return _open_other(name, score, higher_is)
    return ours if ours.record else _open_other(name, score, higher_is)


def read_any(file: ScoreFile, threshold: float | None, truth: np.ndarray | None) -> Scores:
    """Scores of either kind. threshold: in the file's own units.

    Without one, scores of another system are judged where their two error rates are equal on these very pairs.
    """
    if not isinstance(file, OtherScores):
        return read_scores(file, threshold=threshold, truth=truth)
    scores = read_scores(file, threshold=0.5, truth=truth)
    scores = replace(scores, calibrated=False)
    if threshold is not None:
        return replace(scores, threshold=min(max(file.scaled(threshold), 0.0), BEYOND))
    curve = scores.labelled_pairs().curve
    if not curve.both:
        raise ManifestError(
            f"{file.name}: no scored pairs with label 0 and with label 1: give labels as --truth or --threshold"
        )
    return replace(scores, threshold=curve.equal_error()[1])


def _open_other(name: str, score: str, higher_is: str) -> OtherScores:
    tables = []
    for location in find_files(name):
        file = TableFile(location)
        schema = file.schema()
        require_columns(str(location), schema, [score])
        cells = pa.Table.from_batches(file.batches(schema), schema)
        values = read_numbers(cells.column(score), str(location), score)
        cells = cells.drop_columns([each for each in (PROBABILITY, "similarity") if each in cells.column_names])
        tables.append(_with_truth(str(location), cells).append_column(PROBABILITY, pa.array(values)))
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as exc:
        raise ManifestError(f"{name}: the files have columns of different types: {first_line(exc)}") from exc
    values = table.column(PROBABILITY).to_numpy()
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise ManifestError(f"{name}: column '{score}' has no number, so there is nothing to evaluate")
    low, high = float(finite.min()), float(finite.max())
    high = high if high > low else math.nextafter(low, math.inf)
    if not math.isfinite(high - low):
        raise ManifestError(f"{name}: column '{score}' spans from {low:g} to {high:g}, too far to be scaled")
    low, high = (low, high) if higher_is == "different" else (high, low)
    scaled = np.where(np.isfinite(values), (values - low) / (high - low), np.nan).astype(np.float32)
    _require_resolution(name, score, values, scaled)
    table = table.set_column(table.column_names.index(PROBABILITY), PROBABILITY, pa.array(scaled))
    # A column `status` of another system has another meaning.
    table = table.drop_columns(["status"]) if "status" in table.column_names else table
    parts = tuple(find_files(name))
    return OtherScores(name, parts, (table.num_rows,), table.schema, {}, table, score, higher_is, low, high)


def _require_resolution(name: str, score: str, values: np.ndarray, scaled: np.ndarray) -> None:
    """Refuse scores that become equal in float32 because one of them, which is none, lies far from the others."""
    left = np.unique(scaled[np.isfinite(scaled)]).size
    finite = values[np.isfinite(values)]
    if left >= FEWEST_STEPS or 2 * left >= np.unique(finite).size:
        return
    low, high = np.quantile(finite, [0.05, 0.95])
    row = int(np.nanargmax(np.where(np.isfinite(values), np.abs(values - np.median(finite)), np.nan)))
    raise ManifestError(
        f"{name}: row {row + 1}: column '{score}' holds {values[row]:g}, so far from the others (most lie from "
        f"{low:g} to {high:g}) that these become equal; if it stands for a pair without a score, leave it blank"
    )


def _with_truth(name: str, cells: pa.Table) -> pa.Table:
    """The labels as column `true_label`, from this column or from `label`."""
    source = next((each for each in (TRUE_LABEL, LABEL) if each in cells.column_names), None)
    if source is None:
        return cells
    check_label_type(name, cells.schema.field(source).type, source)
    labels = read_labels(cells.column(source).combine_chunks(), name, 0)
    kept = cells.drop_columns([each for each in (TRUE_LABEL, LABEL) if each in cells.column_names])
    return kept.append_column(TRUE_LABEL, labels)
