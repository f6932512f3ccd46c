"""The scores of a run as arrays: probabilities, similarities, reasons, the truth, who is on each side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchverify.bootstrap import Units
from batchverify.errors import ManifestError, UsageError
from batchverify.manifest.columns import TRUE_LABEL, cell_names, check_label_type, read_labels
from batchverify.score_files import ScoreFile

UNKNOWN = -1
OK = "ok"
PERSONS = ("person_a", "person_b")
NOT_STATED = "not stated"


@dataclass(frozen=True)
class Scores:
    """N pairs of a run.

    probability, similarity: (N,) float32, NaN where not scored. truth: (N,) int8: 0 same, 1 different, -1
    unknown. reason: (N,) int16 into `reasons`, whose first is `ok`. threshold: of the run, or the one given.
    """

    file: ScoreFile
    probability: np.ndarray
    similarity: np.ndarray | None
    truth: np.ndarray
    reason: np.ndarray
    reasons: tuple[str, ...]
    threshold: float

    def __len__(self) -> int:
        return len(self.probability)

    @property
    def scored(self) -> np.ndarray:
        """(N,) bool."""
        return ~np.isnan(self.probability)

    @cached_property
    def calls(self) -> np.ndarray:
        """(N,) bool: called different, at or above the threshold as float32; false where not scored."""
        return self.probability >= np.float32(self.threshold)

    @property
    def labelled(self) -> np.ndarray:
        """The places of the pairs whose truth is known."""
        return np.flatnonzero(self.truth != UNKNOWN)

    def failures(self) -> dict[str, int]:
        """How many pairs were not scored, by the first side's reason, the most frequent first."""
        counts = np.bincount(self.reason[~self.scored], minlength=len(self.reasons))
        named = [(name, int(count)) for name, count in zip(self.reasons, counts, strict=True) if count]
        return dict(sorted(named, key=lambda each: -each[1]))


def read_scores(
    file: ScoreFile, *, threshold: float | None = None, truth: np.ndarray | None = None
) -> Scores:
    """Read what every evaluation needs. truth: (N,) int8 from elsewhere; by default the column `true_label`.

    Raises `ManifestError` for columns that hold something else, `UsageError` where no threshold is known.
    """
    probability = _numbers(file, "probability")
    if np.nanmin(probability, initial=0) < 0 or np.nanmax(probability, initial=0) > 1:
        row = int(np.flatnonzero((probability < 0) | (probability > 1))[0])
        raise ManifestError(
            f"{file.name}: row {row + 1}: probability must lie between 0 and 1, got {probability[row]:g}"
        )
    similarity = _numbers(file, "similarity") if "similarity" in file.schema.names else None
    if similarity is not None and np.isinf(similarity).any():
        row = int(np.flatnonzero(np.isinf(similarity))[0])
        raise ManifestError(f"{file.name}: row {row + 1}: similarity must be a number, got {similarity[row]}")
    reason, reasons = _reasons(file, np.isnan(probability))
    known = truth if truth is not None else _truth(file)
    return Scores(file, probability, similarity, known, reason, reasons, _threshold(file, threshold))


def _numbers(file: ScoreFile, name: str) -> np.ndarray:
    """(N,) float32, null as NaN."""
    parts = [each.to_numpy(zero_copy_only=False) for each in file.column(name).chunks]
    return np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32, copy=False)


def _reasons(file: ScoreFile, failed: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int16 and the names that it counts; a failure whose reason is `ok` or blank has none stated."""
    names = {OK: 0, NOT_STATED: 1}
    codes = np.zeros(len(failed), np.int16)
    if "status" in file.schema.names:
        start = 0
        for chunk in file.column("status", dictionary=True).chunks:
            table = np.array(
                [names.setdefault(each, len(names)) for each in chunk.dictionary.to_pylist()] + [1]
            )
            places = chunk.indices.fill_null(len(table) - 1).to_numpy()
            codes[start : start + len(chunk)] = table[places]
            start += len(chunk)
    codes[failed & (codes == 0)] = 1
    return codes, tuple(names)


def _truth(file: ScoreFile) -> np.ndarray:
    if TRUE_LABEL not in file.schema.names:
        return np.full(file.rows, UNKNOWN, np.int8)
    check_label_type(file.name, file.schema.field(TRUE_LABEL).type, TRUE_LABEL)
    parts, row = [np.zeros(0, np.int8)], 0
    for batch in file.batches([TRUE_LABEL]):
        parts.append(read_labels(batch.column(0), file.name, row).fill_null(UNKNOWN).to_numpy())
        row += batch.num_rows
    return np.concatenate(parts)


def _threshold(file: ScoreFile, given: float | None) -> float:
    stated = given if given is not None else file.record.get("threshold")
    if stated is None:
        raise UsageError(
            f"{file.name}: holds no run record that states a threshold; give one with --threshold"
        )
    if not isinstance(stated, int | float) or not 0 <= stated <= 1:
        raise UsageError(f"{file.name}: a threshold lies between 0 and 1, got {stated!r}")
    return float(stated)


def read_units(file: ScoreFile) -> Units:
    """Whom the pairs share: the people of `person_a` and `person_b`, images where these are blank or absent.

    In a table with neither each pair stands for itself.
    """
    if not set(file.sides) <= set(file.schema.names):
        places = np.arange(file.rows, dtype=np.int32)
        return Units("pairs", places, places, file.rows)
    images = file.table(file.sides)
    named = [name for name in PERSONS if name in file.schema.names]
    sides = [images.column(0), images.column(1)]
    kind = "images"
    if len(named) == len(PERSONS):
        people = file.table(PERSONS)
        texts = [cell_names(people.column(side)) for side in (0, 1)]
        if any(each.null_count < len(each) for each in texts):
            kind = "identities"
            # A person and a picture of one name are not the same.
            sides = [
                pc.coalesce(text, pc.binary_join_element_wise("\0", side.cast(pa.string()), ""))
                for text, side in zip(texts, sides, strict=True)
            ]
    codes, count = encode([*sides])
    return Units(kind, codes[0], codes[1], count)


def encode(sides: list[pa.ChunkedArray]) -> tuple[list[np.ndarray], int]:
    """Columns of texts as numbers from one dictionary: (N,) int32 each, and how many there are."""
    chunks = [chunk.cast(pa.large_string()) for side in sides for chunk in side.chunks]
    joined = pa.chunked_array(chunks, pa.large_string()).combine_chunks().dictionary_encode("encode")
    codes = joined.indices.to_numpy().astype(np.int32)
    return np.split(codes, np.cumsum([len(side) for side in sides])[:-1]), len(joined.dictionary)


def describe_truth(scores: Scores, source: str | None) -> Mapping[str, Any]:
    """Where the truth comes from and how many pairs have which."""
    counts = np.bincount(scores.truth + 1, minlength=3)
    names = ("unknown", "same", "different")
    found = {name: int(count) for name, count in zip(names, counts, strict=True)}
    return {"source": source or (TRUE_LABEL if len(scores.labelled) else None), **found}
