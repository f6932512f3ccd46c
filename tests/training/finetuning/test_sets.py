"""Labelled images and their batches: order, views, people, and sets that are too small."""

from dataclasses import replace

import numpy as np
import pytest
from finetune_samples import people_set

from batchverify.errors import UsageError
from batchverify.training.finetuning.sets import LabelledImages, PairBatches, PeopleBatches

UNKNOWN = np.full(8, -1, np.int32)


def pairs_of(rows, people=UNKNOWN):
    """Labelled images of (a, b, label) rows."""
    a, b, labels = np.array(rows).T
    return LabelledImages(a.astype(np.int32), b.astype(np.int32), labels.astype(np.int8), people)


@pytest.fixture(scope="module")
def some():
    return people_set(10, 1, each=5)[1]


def same_batch(one, other):
    return all(np.array_equal(x, y) for x, y in zip(vars(one).values(), vars(other).values(), strict=True))


def test_pair_batches_hold_every_pair_once(some):
    batches = PairBatches(some, 16, 7)
    seen = []
    for batch in batches.epoch(1, 0):
        assert len(batch.labels) == 16 and not batch.views.any()
        assert len(set(batch.images.tolist())) == len(batch)
        assert np.array_equal(batch.people, some.people[batch.images])
        seen += zip(batch.images[batch.a], batch.images[batch.b], batch.labels, strict=True)
    assert len(batches) == len(some) // 16 and len(seen) == 16 * len(batches)
    known = list(zip(some.a, some.b, some.labels, strict=True))
    assert len(set(seen)) == len(seen) and set(seen) <= set(known)


def test_people_batches_hold_every_image_once(some):
    batches = PeopleBatches(some, some.classes, 5, 7)
    seen = []
    for batch in batches.epoch(1, 0):
        assert np.array_equal(batch.people, some.people[batch.images])
        assert np.array_equal(batch.labels == 0, batch.people[batch.a] == batch.people[batch.b])
        # Five images of each person are cut into three and two, never into four and one.
        assert len(batch) <= 15 and len(batch.labels) == len(batch) * (len(batch) - 1) // 2
        assert all((batch.people == person).sum() >= 2 for person in batch.people)
        seen += batch.images.tolist()
    assert len(batches) == 4 and sorted(seen) == list(range(50))


@pytest.mark.parametrize("kind", ["pairs", "people"])
def test_the_order_depends_on_seed_and_epoch_alone(some, kind):
    def drawn(seed, epoch, views=3):
        batches = PairBatches(some, 16, seed) if kind == "pairs" else PeopleBatches(some, some.classes, 5, seed)
        # Iterating one epoch does not disturb another.
        list(batches.epoch(9, views))
        return list(batches.epoch(epoch, views))

    for one, other in zip(drawn(0, 1), drawn(0, 1), strict=True):
        assert same_batch(one, other)
    assert not any(same_batch(one, other) for one, other in zip(drawn(0, 1), drawn(0, 2), strict=True))
    assert not any(same_batch(one, other) for one, other in zip(drawn(0, 1), drawn(1, 1), strict=True))
    views = np.concatenate([batch.views for batch in drawn(0, 1)])
    assert set(views.tolist()) == {0, 1, 2, 3}
    # The order does not depend on the views.
    assert [each.images.tolist() for each in drawn(0, 1)] == [each.images.tolist() for each in drawn(0, 1, 0)]


def test_people_are_numbered_without_gaps():
    people = np.array([7, 7, -1, 3, 9, 3, -1, 1], np.int32)
    pairs = pairs_of([(0, 1, 0), (3, 5, 0), (2, 4, 1), (0, 3, 1)], people)
    # Images 6 and 7 are in no pair.
    assert pairs.classes.tolist() == [1, 1, -1, 0, 2, 0, -1, -1]
    assert pairs.class_count == 3 and pairs.images.tolist() == [0, 1, 2, 3, 4, 5]


def test_same_pairs_join_images_without_a_person():
    chain = pairs_of([(0, 1, 0), (1, 2, 0), (3, 4, 0), (2, 3, 1), (5, 0, 1)])
    assert (chain.class_count, chain.classes.max()) == (0, -1)
    first = chain.identities
    assert first[0] == first[1] == first[2] and first[3] == first[4]
    assert len({first[0], first[3], first[5]}) == 3 and (first[6:] == -1).all()
    # Image 1 is of a named person, so are those that it is joined with; two names are not one.
    people = np.array([-1, 4, -1, 5, -1, -1, -1, -1], np.int32)
    named = pairs_of([(0, 1, 0), (1, 2, 0), (1, 3, 0), (3, 4, 0), (5, 0, 1)], people).identities
    assert named[0] == named[1] == named[2] != named[3] == named[4]


def test_a_digest_is_of_pairs_and_people(some):
    other = replace(some, labels=1 - some.labels)
    assert some.digest() == replace(some, name="other").digest() != other.digest()
    assert some.digest() != replace(some, people=some.people + 1).digest()


def test_few_pairs_of_each_label(some):
    few = some.few(6, 3)
    assert len(few) == 12 and few.labels.sum() == 6
    assert few.digest() == some.few(6, 3).digest() != some.few(6, 4).digest()


def test_batches_larger_than_the_set(some):
    with pytest.raises(UsageError, match=r"--batch-images 402 takes 201 pairs, .* only 200 training .* at most 400"):
        PairBatches(some, 201, 0)
    assert len(PairBatches(some, 200, 0)) == 1
    with pytest.raises(UsageError, match=r"--batch-images 84 takes up to 4 images of 21 people.* at most 80"):
        PeopleBatches(some, some.classes, 21, 0)
    assert len(PeopleBatches(some, some.classes, 20, 0)) == 1


def test_one_person_only(some):
    with pytest.raises(UsageError, match=r"training images show 1 known person: .* needs at least 2"):
        PeopleBatches(some, np.zeros(50, np.int64), 2, 0)
    with pytest.raises(UsageError, match="show 0 known persons"):
        PeopleBatches(some, np.full(50, -1), 2, 0)


def test_nobody_has_two_images(some):
    with pytest.raises(UsageError, match="no person of the training images has 2 images"):
        PeopleBatches(some, np.arange(50), 2, 0)
