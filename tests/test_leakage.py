"""The guard against leaks: shared people, the same picture under two names, dev pairs among the training pairs."""

import json
from dataclasses import replace

import numpy as np
import pytest
from people import draw_people

from batchverify.errors import UsageError
from batchverify.leakage import check_apart, find_leaks, shared_people


def share(train, dev, images: dict[int, int]):
    """dev with some of its pictures replaced by training pictures: place in dev to place in train."""
    vectors = dev.vectors.copy()
    for to, source in images.items():
        vectors[to] = train.vectors[source]
    return replace(dev, vectors=vectors)


@pytest.fixture
def train():
    return draw_people(10, 1)


@pytest.fixture
def dev():
    return draw_people(6, 2, name="dev")


def test_sets_that_share_nothing(train, dev):
    assert find_leaks([train, dev, draw_people(5, 3, name="test")]) == []
    assert find_leaks([replace(train, persons={}), replace(dev, persons={})]) == []


def test_shared_people_are_counted_and_listed_by_name(train, dev):
    persons = {**dev.persons, 0: "training 3", 1: "training 3", 9: "training 1"}
    (leak,) = find_leaks([train, replace(dev, persons=persons)])
    assert (leak.first, leak.second, leak.images) == ("training", "dev", ())
    assert leak.people == ("training 1", "training 3")
    assert str(leak) == "training and dev share 2 people (training 1, training 3)"


def test_people_are_compared_by_name_alone_before_there_are_pictures():
    leaks = shared_people({"training": {"P", "Q", "R"}, "dev": {"R", "P"}, "test": {"S"}})
    assert [str(each) for each in leaks] == ["training and dev share 2 people (P, R)"]
    assert shared_people({"training": set(), "dev": set()}) == []


def test_the_same_picture_under_two_names(train, dev):
    (leak,) = find_leaks([train, share(train, dev, {4: 7})])
    assert (leak.people, leak.images) == ((), (("training/7.jpg", "dev/4.jpg"),))
    assert str(leak) == "training and dev share 1 identical image (training/7.jpg)"


def test_people_and_pictures_that_no_pair_uses_are_no_leak(train, dev):
    used = (dev.a != 0) & (dev.b != 0)
    shared = replace(share(train, dev, {0: 7}), persons={**dev.persons, 0: "training 1"})
    assert len(find_leaks([train, shared])) == 1
    assert find_leaks([train, shared.subset(used)]) == []


def test_each_two_sets_are_compared_and_many_names_are_cut(train, dev):
    test = replace(share(train, replace(dev, name="test"), {0: 1}), persons=dict(train.persons))
    leaks = find_leaks([train, dev, test])
    assert [(each.first, each.second) for each in leaks] == [("training", "test"), ("dev", "test")]
    assert len(leaks[0].people) == 6 and len(leaks[1].images) == 23
    listed = ", ".join(f"training {number}" for number in range(5))
    assert str(leaks[0]) == (
        f"training and test share 6 people ({listed}, …) and 1 identical image (training/1.jpg)"
    )
    assert len(json.loads(json.dumps(leaks[1].to_json()))["images"]) == 23


def test_without_references_pictures_are_named_by_number(train, dev):
    (leak,) = find_leaks([replace(train, references=()), share(train, dev, {4: 7})])
    assert leak.images == (("image 7", "dev/4.jpg"),)


def exchanged(pairs):
    return replace(pairs, a=pairs.b, b=pairs.a)


def shuffled(pairs):
    return pairs.subset(np.random.default_rng(0).permutation(len(pairs)))


def renumbered(pairs):
    """The same pairs of the same pictures, from a manifest that names them in another order."""
    new = np.random.default_rng(1).permutation(len(pairs.vectors))
    place = np.argsort(new).astype(np.int32)
    return replace(pairs, vectors=pairs.vectors[new], a=place[pairs.a], b=place[pairs.b], persons={})


@pytest.mark.parametrize("change", [lambda pairs: pairs, exchanged, shuffled, renumbered])
def test_dev_equal_to_train_is_refused_whatever_its_order(train, change):
    with pytest.raises(UsageError, match="every dev pair is among the training pairs"):
        check_apart(train, replace(change(train), name="dev"))


def test_dev_among_the_training_pairs_is_refused_and_one_new_pair_passes(train):
    with pytest.raises(UsageError, match="every dev pair"):
        check_apart(train, train.subset(np.arange(30)))
    check_apart(train.subset(np.arange(1, len(train))), train)


def test_pairs_of_the_same_pictures_that_are_joined_otherwise_are_others(train):
    check_apart(train, replace(train, a=np.roll(train.a, 1)))
