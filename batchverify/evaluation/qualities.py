"""The quality of each pair: a column of the scores, or the worse of both sides' columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchverify.errors import ManifestError
from batchverify.evaluation.scores import ScoreFile
from batchverify.manifest.columns import read_numbers

# Before a column's name: high values are bad.
HIGH_IS_BAD = "-"


@dataclass(frozen=True)
class Quality:
    """The quality of N pairs by a column.

    name: as the option has it, without the sign. columns: the one or two that it is read from. high_is_bad: whether
    the highest values are discarded first. values: (N,) float64, of both sides the worse one; NaN if either lacks.
    """

    name: str
    columns: tuple[str, ...]
    high_is_bad: bool
    values: np.ndarray

    @property
    def badness(self) -> np.ndarray:
        """(N,) float64: the highest are discarded first."""
        return self.values if self.high_is_bad else -self.values


def read_quality(file: ScoreFile, option: str) -> Quality:
    """The quality that `--quality` names: COLUMN, or COLUMN_a and COLUMN_b; with `-` before it, high is bad.

    The quality of a pair is that of its worse image. Source: Grother and Tabassi 2007, Performance of biometric
    quality measures, section 4.

    Raises `ManifestError` for absent columns, and for columns that hold no numbers.
    """
    names = set(file.schema.names)
    known = option in names or f"{option}_a" in names
    high_is_bad = option.startswith(HIGH_IS_BAD) and not known
    name = option.removeprefix(HIGH_IS_BAD) if high_is_bad else option
    columns = (name,) if name in names else (f"{name}_a", f"{name}_b")
    if name not in names and not names & set(columns):
        raise ManifestError(
            f"{file.name}: no column '{name}', nor '{name}_a' and '{name}_b' (--quality); the file has "
            f"{', '.join(file.schema.names)}"
        )
    sides = [read_numbers(file.column(each), f"--quality: {file.name}", each) for each in columns]
    worse = np.maximum if high_is_bad else np.minimum
    return Quality(name, columns, high_is_bad, worse.reduce(sides))
