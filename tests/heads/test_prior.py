"""Base rates: shifted probabilities, and the share of same pairs estimated from scores without labels."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from batchverify.errors import UsageError
from batchverify.heads.prior import (
    BaseRate,
    Units,
    estimate,
    fitted_share,
    log_odds,
    most_likely_share,
    shift,
)


def scores(pairs: int, share: float, rng: np.random.Generator, fitted: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities that are right where `fitted` of the pairs are same."""
    # Normal log-odds with a variance of twice the mean are their own log-odds.
    labels = (rng.random(pairs) >= share).astype(int)
    mean = 5.0
    odds = rng.normal((2 * labels - 1) * mean, np.sqrt(2 * mean)) + np.log((1 - fitted) / fitted)
    return labels, 1 / (1 + np.exp(-odds))


def test_bayes_rule_by_hand():
    # One in four: the odds of different people, 1 on balanced pairs, are 3.
    assert shift(np.array([0.5]), 0.25) == pytest.approx(0.75)
    assert shift(np.array([0.5]), 0.25, 0.25) == pytest.approx(0.5)
    assert shift(shift(np.array([0.3]), 0.01, 0.4), 0.4, 0.01) == pytest.approx(0.3)


@pytest.mark.parametrize("share", [1e-9, 0.01, 0.5, 1 - 1e-9])
def test_certain_scores_stay_certain(share):
    assert shift(np.array([0.0, 1.0], np.float32), share).tolist() == [0, 1]


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_no_share_of_none_or_all(share):
    with pytest.raises(UsageError, match="between 0 and 1"):
        shift(np.array([0.5]), share)


def test_shifted_probabilities_are_right():
    for share in (0.01, 0.2, 0.8):
        labels, probability = scores(200_000, share, np.random.default_rng(1), fitted=0.3)
        shifted = shift(probability, share, 0.3)
        for low in np.arange(0, 1, 0.1):
            inside = (shifted >= low) & (shifted < low + 0.1)
            if inside.sum() > 500:
                assert labels[inside].mean() == pytest.approx(shifted[inside].mean(), abs=0.06)


@pytest.mark.parametrize("share", [1e-7, 0.01, 0.99, 1 - 1e-7])
@pytest.mark.parametrize("threshold", [0.0, 1e-40, 1e-6, 0.37, 0.9999999, 1.0])
def test_no_verdict_changes_at_a_threshold_of_the_head(share, threshold):
    near = np.float32(threshold)
    probability = np.concatenate([np.random.default_rng(0).random(1000), [0, 1e-45, 1e-9, 1 - 1e-7, 1, near]]).astype(
        np.float32
    )
    probability = np.append(probability, [np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(1))])
    probability = np.clip(probability, 0, 1).astype(np.float32)
    rate = BaseRate(share, 0.5, (threshold,))
    shifted = rate(probability)
    assert shifted.dtype == np.float32
    assert ((shifted >= 0) & (shifted <= 1)).all()
    assert ((shifted >= np.float32(rate.threshold(threshold))) == (probability >= near)).all()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.8, 1.0])
def test_em_finds_the_most_likely_share(share):
    _, probability = scores(5000, share, np.random.default_rng(2), fitted=0.3)
    weights = np.random.default_rng(3).integers(0, 3, len(probability)).astype(float)

    def unlikely(candidate):
        return -weights @ np.log(candidate * (1 - probability) / 0.3 + (1 - candidate) * probability / 0.7)

    direct = minimize_scalar(unlikely, bounds=(0, 1), method="bounded", options={"xatol": 1e-9}).x
    assert most_likely_share(probability, weights, 0.3) == pytest.approx(direct, abs=1e-4)


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = 0
    for seed in range(100):
        _, probability = scores(1000, 0.1, np.random.default_rng(seed))
        found = estimate(probability, draws=60, seed=seed)
        held += found.interval[0] <= 0.1 <= found.interval[1]
        assert found.share == pytest.approx(0.1, abs=0.05)
    assert held >= 86


def test_people_in_many_pairs_widen_the_interval():
    rng = np.random.default_rng(4)
    people = np.sort(rng.integers(0, 30, (2, 3000)))
    # The pairs of the same people are alike.
    probability = np.sort(scores(3000, 0.3, rng)[1])
    alone = estimate(probability)
    shared = estimate(probability, units=Units.of("identities", *people))
    assert shared.interval[1] - shared.interval[0] > 2 * (alone.interval[1] - alone.interval[0])
    assert (shared.unit, shared.units, shared.pairs) == ("identities", 30, 3000)
    assert shared == estimate(probability, units=Units.of("identities", *people))


def test_none_same_is_not_said_to_be_certain():
    found = estimate(np.ones(1000, np.float32))
    assert (found.share, found.interval[0]) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))
    assert found.interval[1] == pytest.approx(1 - 0.025 ** (1 / 1000))
    with pytest.raises(UsageError, match="no pair"):
        estimate(np.zeros(0, np.float32))


def test_log_odds_are_finite():
    assert np.isfinite(log_odds(np.array([0, 1e-45, 0.5, 1], np.float32))).all()


def test_a_head_says_for_which_share_it_was_calibrated():
    assert fitted_share({}) == 0.5
    assert fitted_share({"calibration": {"same_share": 0.2}}) == 0.2
    with pytest.raises(ValueError, match="share"):
        fitted_share({"calibration": {"same_share": 1}})


def test_a_share_that_puts_two_thresholds_of_a_head_together_is_refused():
    assert BaseRate(1e-7, 0.5, (0.3, 0.6)).threshold(0.3) < 1
    with pytest.raises(UsageError, match="--prior 1e-08: too near to 0 or 1"):
        BaseRate(1e-8, 0.5, (0.3, 0.45, 0.6))


def test_a_threshold_that_no_probability_reaches_stays_so():
    beyond = float(np.nextafter(np.float32(1), np.float32(2)))
    rate = BaseRate(0.9999999, 0.5, (0.5, beyond))
    assert rate.threshold(beyond) == beyond
    shifted = rate(np.array([0.2, 0.5, 1.0], np.float32))
    assert 0 < shifted[0] < shifted[1] < shifted[2] == 1


@pytest.mark.parametrize("calibration", [None, [], {"same_share": 0}, {"same_share": "half"}])
def test_a_calibration_that_is_none_is_no_traceback(calibration):
    with pytest.raises(ValueError, match=r"calibration|convert"):
        fitted_share({"calibration": calibration})
