"""The review band: its thresholds against counts, what happens without a band, and what cannot be promised."""

import numpy as np
import pytest

from batchverify.errors import UsageError
from batchverify.heads.bounds import Tail
from batchverify.heads.review_band import VERDICTS, ReviewBand

RNG = np.random.default_rng(0)


def stored(different, same, best_f1=0.5):
    """The thresholds of a head with these scores behind it."""
    tails = Tail.of(np.float32(different)), Tail.of(np.float32(same), highest=True)
    return {
        "best_f1": best_f1,
        "bounds": {"unit": "people", "different": tails[0].to_json(), "same": tails[1].to_json()},
    }


def test_errors_of_the_pairs_behind_it_are_as_many_as_the_rates_allow():
    different, same = RNG.beta(4, 2, 199).astype(np.float32), RNG.beta(2, 4, 199).astype(np.float32)
    band = ReviewBand.of(stored(different, same), 0.05, 0.1)
    assert band.same_below < band.different_from
    # One less than the rank: the score at the threshold is not beyond it.
    assert (band.verdicts(different) == VERDICTS.index("same")).sum() == 0.05 * 200 - 1
    assert (band.verdicts(same) == VERDICTS.index("different")).sum() == 0.1 * 200 - 1


def test_verdicts_are_compared_as_float32():
    band = ReviewBand(0.1, 0.1, float(np.float32(0.1)), float(np.float32(0.7)))
    scores = np.array(
        [0.0, np.nextafter(np.float32(0.1), 0), 0.1, 0.5, np.nextafter(np.float32(0.7), 0), 0.7, 1],
        np.float32,
    )
    found = [VERDICTS[code] for code in band.verdicts(scores)]
    assert found == ["same", "same", "review", "review", "review", "different", "different"]


@pytest.mark.parametrize(("best_f1", "threshold"), [(0.5, 0.5), (0.1, 0.3), (0.9, 0.6)])
def test_without_a_band_both_thresholds_meet_nearest_to_the_heads_own(best_f1, threshold):
    band = ReviewBand.of(stored(np.linspace(0.6, 1, 99), np.linspace(0, 0.3, 99), best_f1), 0.01, 0.01)
    assert band.same_below == band.different_from == pytest.approx(threshold, abs=1e-6)
    scores = RNG.random(1000).astype(np.float32)
    assert set(band.verdicts(scores)) == {0, 1}


def test_same_pairs_that_score_one_leave_nothing_to_call_different():
    band = ReviewBand.of(stored(np.linspace(0.1, 1, 99), np.ones(99)), 0.1, 0.1)
    assert band.different_from > 1
    assert not (band.verdicts(np.array([0, 0.5, 1], np.float32)) == VERDICTS.index("different")).any()


def test_rates_that_too_few_people_stand_behind_are_refused():
    thresholds = stored(np.linspace(0, 1, 99), np.linspace(0, 1, 49))
    with pytest.raises(
        UsageError, match=r"false accept rate of 0.001 takes 999 different pairs of people .* were 99"
    ):
        ReviewBand.of(thresholds, 0.001, 0.1)
    with pytest.raises(UsageError, match=r"false reject rate of 0.01 takes 99 same pairs of people .* were 49"):
        ReviewBand.of(thresholds, 0.01, 0.01)
    with pytest.raises(UsageError, match=r"holds no bounds.*calibrate"):
        ReviewBand.of({"best_f1": 0.5}, 0.01, 0.01)
