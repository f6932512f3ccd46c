"""What a head's held-out pairs promise: which pairs are counted, what the head stores, and a small simulation."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from people import EMBEDDING, draw_people
from repository import REPOSITORY

from batchverify.errors import UsageError
from batchverify.heads.bounds import CONFIDENCES, Tail, upper_bound
from batchverify.heads.head import Head
from batchverify.options import TrainOptions
from batchverify.training.calibration import rate_thresholds
from batchverify.training.fit import fit_head, probabilities
from batchverify.training.guarantees import HeldOut, UnseenPairs


def row_numbers(pairs):
    """The labelled pairs with their row numbers for scores."""
    return HeldOut.first(pairs, np.arange(len(pairs), dtype=np.float32))


def test_of_labelled_pairs_each_person_is_in_one():
    pairs = draw_people(30, 1)
    unseen = UnseenPairs.of(row_numbers(pairs))
    for label, rows in ((1, unseen.different), (0, unseen.same)):
        chosen = rows.astype(int)
        assert (pairs.labels[chosen] == label).all()
        people = [{pairs.persons[pairs.a[row]], pairs.persons[pairs.b[row]]} for row in chosen]
        assert sum(map(len, people)) == len(set().union(*people))
    assert unseen.unit == "people"
    assert len(unseen.same) == len({pairs.persons[image] for image in pairs.a[pairs.labels == 0]})


def test_all_named_people_are_matched_if_other_pairs_can_be_scored():
    pairs, asked = draw_people(31, 1, pairs=20), []

    def score(a, b):
        asked.extend(zip(a.tolist(), b.tolist(), strict=True))
        return np.full(len(a), 0.5, np.float32)

    unseen = UnseenPairs.of(row_numbers(pairs), score=score)
    assert unseen.different.tolist() == [0.5] * 15
    assert len({pairs.persons[image] for pair in asked for image in pair}) == 30


def test_a_person_of_two_sets_is_one_and_unknown_people_are_images():
    pairs = draw_people(30, 1)
    twice = UnseenPairs.of(row_numbers(pairs), row_numbers(replace(pairs, name="again")))
    assert len(twice.same) == len(UnseenPairs.of(row_numbers(pairs)).same)
    others = draw_people(30, 2, name="others")
    assert len(UnseenPairs.of(row_numbers(pairs), row_numbers(others)).same) > len(twice.same)
    unknown = draw_people(30, 1, known=False)
    images = UnseenPairs.of(row_numbers(unknown))
    assert images.unit == "images"
    used = [unknown.a[images.same.astype(int)], unknown.b[images.same.astype(int)]]
    assert len(np.unique(used)) == 2 * len(images.same)


@pytest.fixture(scope="module")
def fitted():
    train, dev = draw_people(60, 1, noise=2.0), draw_people(40, 2, noise=2.0, name="dev")
    return fit_head(train, dev, EMBEDDING, TrainOptions()).head, dev


def test_the_head_stores_bounds_beside_its_thresholds(fitted):
    head, dev = Head.from_bytes(fitted[0].to_bytes(), "head"), fitted[1]
    thresholds = head.about["thresholds"]
    plain = [{name: each[name] for name in ("far", "threshold", "pairs")} for each in thresholds["far"]]
    assert plain == rate_thresholds(probabilities(head, dev.impostor_pairs()))
    bounds, tail = thresholds["bounds"], Tail.from_json(thresholds["bounds"]["different"])
    # Twenty couples of dev, and those of the training pairs, which a distance does not learn from.
    assert 20 < tail.pairs <= 20 + 30
    assert Tail.from_json(bounds["same"]).pairs > 60
    for entry in thresholds["far"]:
        assert list(entry["bounds"]) == ["0.9", "0.95", "0.99"]
        assert entry["bounds"]["0.9"] < entry["bounds"]["0.95"] < entry["bounds"]["0.99"]
        assert entry["bounds"]["0.9"] > entry["far"] / 2
    assert len(bounds["guaranteed"]) == 4 * len(CONFIDENCES)
    for each in bounds["guaranteed"]:
        promised = 2 * tail.pairs >= each["people_needed"]
        assert (each["threshold"] is not None) == promised
        if promised:
            assert head.threshold(at_far=each["far"], confidence=each["confidence"]) == each["threshold"]
            counted = int(np.searchsorted(tail.scores, each["threshold"]))
            assert upper_bound(counted, tail.pairs, each["confidence"]) <= each["far"]
        else:
            with pytest.raises(UsageError, match="cannot promise"):
                head.threshold(at_far=each["far"], confidence=each["confidence"])
    # Rates that are not stored can be promised, too.
    assert head.threshold(at_far=0.3, confidence=0.6) >= head.threshold(at_far=0.2, confidence=0.6)


def test_weights_of_their_own_are_bounded_by_dev_alone():
    train, dev = draw_people(60, 1, noise=2.0), draw_people(40, 2, noise=2.0, name="dev")
    head = fit_head(train, dev, EMBEDDING, TrainOptions(algorithms=("logistic",))).head
    assert head.about["thresholds"]["bounds"]["different"]["pairs"] == 20


@pytest.fixture
def guarantees(monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import guarantees

    yield guarantees
    sys.modules.pop("guarantees", None)


def test_promises_hold_at_least_as_often_as_they_say(guarantees):
    """120 draws; `benchmarks/guarantees.py` makes 2,000. Allowed below the promise: three standard errors."""
    draws, wolves = 120, guarantees.POPULATIONS[2]
    found = guarantees.simulate(wolves, draws, 400)
    for confidence in CONFIDENCES:
        least = confidence - 3 * (confidence * (1 - confidence) / draws) ** 0.5
        assert found.bounds[confidence] >= least
        assert found.thresholds[confidence] >= least
    assert found.far <= guarantees.FAR * 1.15
    assert found.frr <= guarantees.FRR * 1.15
    # Pairs of people who look like many others are no independent pairs.
    assert found.naive[0.95] < 0.9
