"""Drift: scores that no mixture of a head's same and different pairs explains are told from those that one does."""

import numpy as np
import pytest

from batchverify.heads.drift import (
    BINS,
    DRIFT,
    FITS,
    UNCHECKED,
    Reference,
    checked,
    histograms,
    independent_pairs,
)


def drawn(count: int, share: float, seed: int, closer: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities whose log-odds lie around ±6. closer: the factor of all log-odds."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) >= share).astype(int)
    return labels, 1 / (1 + np.exp(-closer * rng.normal(12 * labels - 6, 2.5)))


def reference(count: int = 2000, seed: int = 0) -> Reference:
    found = Reference.of({"log_odds": histograms(*drawn(count, 0.5, seed))})
    assert found is not None
    return found


def test_counts_by_label():
    counts = histograms(np.array([0, 0, 1]), np.array([0.0, 0.5, 1.0]))
    assert (len(counts["same"]), len(counts["different"])) == (BINS, BINS)
    assert (sum(counts["same"]), counts["same"][0], counts["different"][-1]) == (2, 1, 1)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_any_share_fits(share):
    for seed in range(3):
        found = reference(seed=seed).check(drawn(2000, share, 10 + seed)[1])
        assert found.verdict == FITS


def test_false_alarms_are_as_rare_as_they_should_be():
    chances = np.array(
        [reference(400, seed).check(drawn(400, 0.2, 1000 + seed)[1], seed=seed).chance for seed in range(25)]
    )
    assert (chances <= 0.05).sum() <= 4


def test_scores_nearer_to_each_other_have_drifted():
    found = reference().check(drawn(2000, 0.5, 1, closer=0.6)[1])
    assert (found.verdict, vars(found)["verdict"]) == (DRIFT, "drift")
    assert "unlike" in found.reason
    assert found.chance <= 0.01
    assert found.distance > 0.1


def test_pairs_of_few_people_prove_less():
    probability = drawn(5000, 0.5, 1, closer=0.8)[1]
    assert reference().check(probability).verdict == DRIFT
    assert reference().check(probability, 40).chance > 0.01


def test_pairs_that_share_people_are_not_independent():
    first, second = np.triu_indices(20, 1)
    assert independent_pairs(first, second) == pytest.approx(10)
    # Two people by themselves, a pair of one person, and a person in two pairs.
    assert independent_pairs(np.array([0, 2, 3, 3]), np.array([1, 2, 4, 5])) == pytest.approx(3)


def test_what_cannot_be_checked_is_said():
    assert checked({}, np.zeros(1000)).verdict == UNCHECKED
    assert "does not say" in checked({}, np.zeros(1000)).reason
    assert reference().check(np.zeros(10)).verdict == UNCHECKED


@pytest.mark.parametrize(
    "counts",
    [[1] * (BINS - 1), [-1] + [1] * (BINS - 1), [0] * BINS, [0.5] * BINS, ["a"] * BINS, "", [[1]] * BINS],
)
def test_damaged_histograms_are_refused(counts):
    good = [1] * BINS
    for stored in ({"same": counts, "different": good}, {"same": good, "different": counts}):
        with pytest.raises(ValueError, match="histograms"):
            Reference.of({"log_odds": stored})
