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


class GroupRow(TypedDict):
    """Pairs of people of a group, or of several: numbers of scored pairs, wrong verdicts, rates.

    units: who is in these pairs, by rate: people or images. exact: rates of 0 or 1, whose interval is not the
    bootstrap's. too_small: by rate, why a group is too small for it.
    """

    group: str
    same: int
    different: int
    false_non_matches: int
    false_matches: int
    fnmr: float
    fmr: float
    units: dict[str, int]
    intervals: dict[str, Interval]
    exact: list[str]
    too_small: dict[str, str]


class GroupMatrix(TypedDict):
    """Different pairs by the groups of both people: symmetric lists of G lists, in the order of the groups."""

    pairs: list[list[int]]
    false_matches: list[list[int]]
    fmr: list[list[float]]
    low: list[list[float | None]]
    high: list[list[float | None]]


class Differential(TypedDict):
    """A measure of how far groups are apart. interval: its high end is None if it is infinite."""

    value: float | None
    at_least: float | None
    interval: Interval | None
    by_chance: float | None


class Differentials(TypedDict):
    """The measures of some groups; none if `reason` says why."""

    groups: list[str]
    reason: str | None
    worst: str | None
    best: str | None
    measures: dict[str, Differential]


class GroupsDocument(TypedDict):
    """Error rates of groups of people. differentials: by rate, of `all` groups and of those `large_enough`."""

    source: str
    unit: str
    missing: int
    missing_examples: list[str]
    in_several: int
    limits: dict[str, int]
    groups: list[GroupRow]
    within: GroupRow
    across: GroupRow
    not_stated: GroupRow
    matrix: GroupMatrix
    differentials: dict[str, dict[str, Differentials]]


class Wanted(TypedDict):
    """The share of pairs to discard for a false non-match rate; None with a reason. cut: the quality there."""

    fnmr: float
    share: float | None
    interval: Interval | None
    cut: float | None
    reason: str | None


class AtRate(TypedDict):
    """The false non-match rate at a false match rate, with a new threshold at every share."""

    fmr: float
    fnmr: list[float]
    threshold: list[float]


class Discards(TypedDict):
    """Error rates after discarding the pairs of worst quality, at each of `shares`."""

    column: str
    values: list[str]
    bad: str
    pairs: int
    without: int
    shares: list[float]
    cuts: list[float]
    same: list[float]
    different: list[float]
    fnmr: list[float]
    fmr: list[float]
    intervals: Mapping[str, Sequence[Interval | None]]
    at_fmr: AtRate | None
    area: float
    area_over_random: float
    area_interval: Interval | None
    wanted: list[Wanted]


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


class SuspectImage(TypedDict):
    """An image whose labels the scores are mostly against."""

    image: str
    disputed: int
    pairs: int


class SuspectsDocument(TypedDict):
    """Labels that are probably wrong, in numbers; `--suspects` writes the labels themselves.

    vectors: how many images' vectors were compared; None if the scores alone were, `without_vectors` says why.
    second_opinion: whether the reference run judged, too.
    """

    labels: int
    vectors: int | None
    without_vectors: str | None
    second_opinion: bool
    not_scored: int
    found: int
    listed: int
    contradictions: int
    against_names: int
    thresholds: dict[str, float | None]
    off_diagonal: dict[str, int]
    images: list[SuspectImage]


class ReviewDocument(TypedDict):
    """The verdicts of `--review`: wanted rates, thresholds, counts by verdict, also by truth, and figures."""

    far: float
    frr: float
    same_below: float
    different_from: float
    verdicts: dict[str, int]
    share: float
    truth: dict[str, dict[str, int]]
    figures: dict[str, float]
    intervals: dict[str, Interval]
    exact: list[str]


class ExtremeRate(TypedDict):
    """An extrapolated threshold for a false accept rate, as a probability."""

    far: float
    threshold: float
    interval: Interval | None


class Extremes(TypedDict):
    """What the tail of the different pairs' scores says beyond what was counted; `reason` if it says nothing.

    unseen: how large a share of people may be unlike all of these, with 95 % confidence; None without units.
    """

    reason: str | None
    pairs: int
    units: int | None
    unseen: float | None
    tail: dict[str, float] | None
    rates: list[ExtremeRate]
    at_threshold: dict[str, Any] | None


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
    extremes: Extremes
    score: dict[str, Any]
    comparison: ComparisonDocument
    suspects: SuspectsDocument
    seconds: float


class Document(RunSummary, Measurements, _Added):
    """The whole file. slices: by column; a row mixes fixed keys with figures, which no TypedDict can express."""

    folds: Folds | None
    review: ReviewDocument | None
    base_rate: BaseRateDocument | None
    slices: dict[str, list[dict[str, Any]]]
    groups: GroupsDocument | None
    quality: list[Discards]
    record: dict[str, Any]
