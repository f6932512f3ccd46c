"""Pairs for a person to judge: a manifest of the worst ones, to fill in and to train on."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from batchverify.errors import BatchverifyError, UsageError
from batchverify.examples import worst
from batchverify.manifest.columns import LABEL, PREDICTED_LABEL
from batchverify.scores import PERSONS, UNKNOWN, Scores
from batchverify.storage.location import Location
from batchverify.thumbnails import Source

FORMATS = (".csv", ".parquet")


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


def write_review(scores: Scores, most: int, target: Location, source: Source) -> int:
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


def review_table(scores: Scores, rows: np.ndarray, target: Location, source: Source) -> pa.Table:
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


def _path(cell: str | None, source: Source, stays: bool) -> str | None:
    found = source.resolve(cell)
    return found if isinstance(found, str) and not stays else cell
