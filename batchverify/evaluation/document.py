"""The types of `metrics.json`; docs/metrics.md says what every key means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

Interval = Sequence[float]
Distribution = Literal["probability", "similarity"]
Share = Literal["called_different", "failure_rate"]


class Truth(TypedDict):
    """Where the truth comes from, and how many pairs have which."""

    source: str | None
    unknown: int
    same: int
    different: int


# Labelled pairs, by the names of `figures.Tally`.
Counts = Mapping[str, int]


class Rate(TypedDict):
    """The true accept rate at a false accept rate; None if the pairs do not support it."""

    far: float
    supported: bool
    reason: str | None
    pairs: int
    needed: int
    tar: float | None
    threshold: float | None
    interval: Interval | None


class Bootstrap(TypedDict):
    """How the intervals were made."""

    draws: int
    unit: str | None
    units: int | None
    exact: list[str]


class Fold(TypedDict):
    """One fold: its scored pairs, the threshold from the other folds, its figures at that threshold."""

    name: str
    pairs: int
    threshold: float
    figures: dict[str, float]


class Spread(TypedDict):
    """A figure over the folds: mean, standard deviation, standard error of the mean."""

    mean: float
    std: float
    error: float


class Folds(TypedDict):
    """The protocol of k folds."""

    folds: int
    threshold: str
    figures: dict[str, Spread]
    each: list[Fold]


class DistributionDrift(TypedDict):
    """How far the values of the new run are from the reference's; pairs of numbers have the new run's first."""

    stability_index: float
    expected_by_chance: float
    verdict: str
    mean: list[float]
    median: list[float]


class ShareDrift(TypedDict):
    """A share of the pairs in both runs, the new one first, and whether they differ beyond chance."""

    share: list[float | None]
    p_value: float | None
    verdict: str


class Drift(TypedDict, total=False):
    """How far the scores have drifted; distributions only if both runs have values."""

    called_different: ShareDrift
    failure_rate: ShareDrift
    probability: DistributionDrift
    similarity: DistributionDrift


class RecordDifference(TypedDict):
    """A key of the run records and its two values."""

    key: str
    new: Any
    reference: Any


class Agreement(TypedDict):
    """How many pairs of one truth got these two verdicts."""

    truth: str
    new: str
    reference: str
    pairs: int


class Difference(TypedDict):
    """A figure of both runs."""

    new: float
    reference: float
    difference: float
    interval: Interval | None


class _SamePairs(TypedDict, total=False):
    """What needs the same pairs in both runs. flipped: `pairs`; with any truth also `fixed` and `broken`."""

    agreement: list[Agreement]
    flipped: dict[str, int]
    differences: dict[str, Difference]


class ComparisonDocument(_SamePairs):
    """A run compared with its reference; lists of two have the new run first."""

    reference: str
    same_pairs: bool
    rows: list[int]
    threshold: list[float]
    record_differences: list[RecordDifference]
    reference_record: dict[str, Any]
    drift: Drift


class RunSummary(TypedDict):
    """The run, labelled or not."""

    version: str
    scores: str
    scores_written: str | None
    rows: int
    scored: int
    failed: int
    failures: dict[str, int]
    threshold: float
    called_different: int
    called_same: int
    truth: Truth


class Measurements(TypedDict):
    """Figures of the labelled pairs, by the names of `figures.NAMES`."""

    metrics: dict[str, float | None]
    intervals: dict[str, Interval]
    counts: Counts
    equal_error_threshold: float | None
    rates: list[Rate]
    bootstrap: Bootstrap


class BaseRateDocument(TypedDict):
    """Scores without labels. probabilities_for: the share of same pairs for which they are.

    estimates, intervals: `share` (of same pairs), `far` and `frr`, None if the scores have drifted. drift: `verdict`
    (`fits`, `drift` or `not checked`), `reason`, `chance` and `distance`.
    """

    probabilities_for: float
    estimates: dict[str, float | None]
    intervals: dict[str, Interval]
    pairs: int
    unit: str
    units: int
    drift: dict[str, Any]


class _Added(TypedDict, total=False):
    comparison: ComparisonDocument
    seconds: float


class Document(RunSummary, Measurements, _Added):
    """The whole file. slices: by column; a row mixes fixed keys with figures, which no TypedDict can express."""

    folds: Folds | None
    base_rate: BaseRateDocument | None
    slices: dict[str, list[dict[str, Any]]]
    record: dict[str, Any]
