"""Thresholds at false accept rates against a count."""

import numpy as np
import pytest

from batchverify.calibration import rate_thresholds


@pytest.mark.parametrize("count", [1, 99, 100, 150, 999, 1_000, 10_000, 10_007, 100_000])
@pytest.mark.parametrize("levels", [50, 10**9])
def test_no_more_are_falsely_accepted_than_the_rate_says(count, levels):
    rng = np.random.default_rng(count)
    scores = (np.ceil(rng.random(count) * levels) / levels).astype(np.float32)
    found = rate_thresholds(scores)
    # A rate needs 10 expected false accepts.
    assert [each.far for each in found] == [
        r for r in (0.1, 0.01, 0.001, 0.0001) if round(count * r, 9) >= 10
    ]
    for each in found:
        accepted = sum(score < each.threshold for score in scores.tolist())
        assert accepted <= each.far * count + 1e-9
        assert each.pairs == count
        # The next score up would accept too many: the threshold is no smaller than it has to be.
        higher = scores[scores > each.threshold]
        assert not len(higher) or (scores < higher.min()).sum() > each.far * count


def test_without_different_pairs_nothing_is_stored():
    assert rate_thresholds(np.zeros(0, np.float32)) == []


def test_the_order_of_the_pairs_does_not_matter():
    scores = np.random.default_rng(0).random(1000).astype(np.float32)
    assert rate_thresholds(scores) == rate_thresholds(scores[::-1])


def test_json():
    scores = np.arange(100, dtype=np.float32) / 128
    assert rate_thresholds(scores)[0].to_json() == {"far": 0.1, "threshold": 10 / 128, "pairs": 100}
