"""Losses of fine-tuning against plain numpy, and against pytorch-metric-learning where it computes the same."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from finetune_samples import people_set
from pytorch_metric_learning import distances, miners
from pytorch_metric_learning import losses as reference

from batchverify.errors import UsageError
from batchverify.options import MARGINS
from batchverify.training.finetuning.losses import (
    ARCFACE_SCALE,
    TEMPERATURE,
    ArcFaceLoss,
    ContrastiveLoss,
    Distillation,
    PairLoss,
    SupConLoss,
    TripletLoss,
    WeightedSum,
    check_teacher,
    joined_teacher,
)
from batchverify.training.finetuning.sets import Batch, people_batch

PEOPLE = np.array([0, 1, 0, 2, 1, 1, 0, 3, 2])
COUNT, DIMENSION = len(PEOPLE), 6


@pytest.fixture
def vectors():
    rng = np.random.default_rng(3)
    people = rng.normal(size=(4, DIMENSION))
    return 3 * (people[PEOPLE] + 0.8 * rng.normal(size=(COUNT, DIMENSION)))


@pytest.fixture
def batch():
    """Some of the pairs, one of them twice; images 10 and on of a larger set."""
    whole = people_batch(np.arange(10, 10 + COUNT), np.concatenate([np.full(10, -1), PEOPLE]))
    rows = np.array([0, 3, 3, 9, 14, 20, 21, 30, 35, 2, 1])
    return Batch(whole.images, whole.views, whole.a[rows], whole.b[rows], whole.labels[rows], PEOPLE)


def units(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def value(loss):
    return float(loss.detach())


def tensor(vectors):
    return torch.tensor(vectors, dtype=torch.float64, requires_grad=True)


def check(loss, plain, vectors, batch):
    """The value is that of a plain version, and the gradient that of its finite differences."""
    loss = loss.double()
    given = tensor(vectors)
    found = loss(given, batch)
    assert value(found) == pytest.approx(plain(vectors), rel=1e-6)
    found.backward()
    rng = np.random.default_rng(0)
    for _ in range(3):
        way = rng.normal(size=vectors.shape)
        slope = (plain(vectors + 1e-6 * way) - plain(vectors - 1e-6 * way)) / 2e-6
        assert float((given.grad * torch.tensor(way)).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_pair(vectors, batch):
    def plain(vectors):
        total = 0.0
        for a, b, label in zip(batch.a, batch.b, batch.labels, strict=True):
            logit = 3.0 - 8.0 * units(vectors)[a] @ units(vectors)[b]
            p = 1 / (1 + math.exp(-logit))
            total -= math.log(p if label else 1 - p)
        return total / len(batch.labels)

    check(PairLoss(8.0, 3.0), plain, vectors, batch)


@pytest.mark.parametrize("margin", [0.3, 1.0, 1.5])
def test_contrastive(vectors, batch, margin):
    def plain(vectors):
        total = 0.0
        for a, b, label in zip(batch.a, batch.b, batch.labels, strict=True):
            distance = np.linalg.norm(units(vectors)[a] - units(vectors)[b])
            total += max(0, margin - distance) ** 2 if label else distance**2
        return total / len(batch.labels)

    check(ContrastiveLoss(margin), plain, vectors, batch)


def plain_triplets(vectors):
    """(anchor, positive, negative) of all that have one, by loops."""
    cosines, triplets = units(vectors) @ units(vectors).T, []
    squared = 2 - 2 * cosines
    for anchor in range(COUNT):
        for positive in range(COUNT):
            if anchor == positive or PEOPLE[anchor] != PEOPLE[positive]:
                continue
            others = [image for image in range(COUNT) if PEOPLE[image] != PEOPLE[anchor]]
            farther = [image for image in others if squared[anchor, image] > squared[anchor, positive]]
            if farther:
                negative = min(farther, key=lambda image: squared[anchor, image])
            else:
                negative = max(others, key=lambda image: squared[anchor, image])
            triplets.append((anchor, positive, negative))
    return squared, triplets


@pytest.mark.parametrize("margin", [0.05, 0.2, 3.0])
def test_triplet(vectors, batch, margin):
    def plain(vectors):
        squared, triplets = plain_triplets(vectors)
        losses = [
            max(0, squared[anchor, positive] - squared[anchor, negative] + margin)
            for anchor, positive, negative in triplets
        ]
        return sum(losses) / len(losses)

    check(TripletLoss(margin), plain, vectors, batch)


def test_triplets_without_a_farther_negative_take_the_farthest():
    # The positive of 0 is at the opposite side; both others are nearer.
    angles = np.radians([0, 180, 30, 60])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    people = np.array([0, 0, 1, 2])
    mined = TripletLoss.mine(torch.tensor(rows @ rows.T), people)
    assert [each.tolist() for each in mined] == [[0, 1], [1, 0], [3, 2]]


def test_mined_triplets_are_among_those_of_the_reference(vectors):
    given = torch.tensor(vectors)
    margin = 4.0  # no distance is larger
    miner = miners.TripletMarginMiner(
        margin=margin, type_of_triplets="semihard", distance=distances.LpDistance(power=2)
    )
    found = {tuple(row) for row in torch.stack(miner(given, torch.tensor(PEOPLE))).T.tolist()}
    squared, triplets = plain_triplets(vectors)
    farther = {each for each in triplets if squared[each[0], each[2]] > squared[each[0], each[1]]}
    assert farther and farther <= found


def plain_supcon(vectors, batch, margin):
    """By loops over images."""
    rows, found = units(vectors), []
    for image, person in enumerate(batch.people):
        others = [other for other in range(len(rows)) if other != image]
        positives = [other for other in others if batch.people[other] == person >= 0]
        if not positives:
            continue
        logits = {
            other: (rows[image] @ rows[other] - margin * (other in positives)) / TEMPERATURE for other in others
        }
        most = max(logits.values())
        total = most + math.log(sum(math.exp(each - most) for each in logits.values()))
        found.append(np.mean([total - logits[other] for other in positives]))
    return np.mean(found)


def test_supcon_is_that_of_a_loop_over_images(vectors, batch):
    unknown = replace(batch, people=np.where(np.arange(COUNT) == 4, -1, batch.people))
    for each in (batch, unknown):
        check(SupConLoss(0.2), lambda rows, each=each: plain_supcon(rows, each, 0.2), vectors, each)


def test_supcon_without_margin_is_that_of_the_library(vectors, batch):
    found = value(SupConLoss(1e-12)(tensor(vectors), batch))
    library = reference.SupConLoss(temperature=TEMPERATURE)
    people = torch.from_numpy(batch.people)
    # It, too, leaves out images without a positive.
    assert found == pytest.approx(value(library(tensor(vectors), people)), rel=1e-6)


def test_supcon_of_strangers_alone_is_zero(vectors, batch):
    strangers = replace(batch, people=np.arange(COUNT))
    given = tensor(vectors)
    loss = SupConLoss(MARGINS["supcon"])(given, strangers)
    loss.backward()
    assert value(loss) == 0 and torch.equal(given.grad, torch.zeros_like(given))


@pytest.mark.parametrize("margin", [0.2, 0.5, 2.5])
def test_arcface(vectors, batch, margin):
    centres = np.random.default_rng(4).normal(size=(5, DIMENSION))
    # One is nearly opposite to its person's: the margin leads beyond 180 degrees.
    centres[3] = -vectors[7] + 0.01

    def plain(vectors):
        total = 0.0
        for image, person in enumerate(PEOPLE):
            cosines = units(centres) @ units(vectors)[image]
            angle = math.acos(cosines[person])
            logits = ARCFACE_SCALE * cosines
            if angle + margin < math.pi:
                logits[person] = ARCFACE_SCALE * math.cos(angle + margin)
            else:
                logits[person] = ARCFACE_SCALE * (cosines[person] - margin * math.sin(margin))
            total += math.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[person]
        return total / COUNT

    check(ArcFaceLoss(torch.tensor(centres), margin), plain, vectors, batch)


def test_arcface_is_that_of_the_reference(vectors, batch):
    centres = torch.tensor(np.random.default_rng(4).normal(size=(4, DIMENSION)))
    theirs = reference.ArcFaceLoss(4, DIMENSION, margin=math.degrees(0.5), scale=ARCFACE_SCALE).double()
    theirs.W.data.copy_(centres.T)
    ours = ArcFaceLoss(centres, 0.5)(torch.tensor(vectors), batch)
    expected = theirs(torch.tensor(vectors), torch.tensor(PEOPLE))
    assert value(ours) == pytest.approx(value(expected))


def test_arcface_leaves_out_images_without_a_person(vectors, batch):
    loss = ArcFaceLoss(torch.tensor(np.random.default_rng(4).normal(size=(4, DIMENSION))))
    unknown = replace(batch, people=PEOPLE.copy())
    unknown.people[2:] = -1
    first = replace(batch, people=PEOPLE[:2])
    given = torch.tensor(vectors)
    assert value(loss(given, unknown)) == pytest.approx(value(loss(given[:2], first)))
    unknown.people[:] = -1
    assert value(loss(given, unknown)) == 0


@pytest.mark.parametrize("dimension", [DIMENSION, 4])
def test_distillation(vectors, batch, dimension):
    teacher = units(np.random.default_rng(5).normal(size=(COUNT + 10, dimension))).astype(np.float32)
    own = teacher[10:].astype(np.float64)

    def plain(vectors):
        total, others = 0.0, 0
        for i in range(COUNT):
            for j in range(COUNT):
                if i != j:
                    total += (units(vectors)[i] @ units(vectors)[j] - own[i] @ own[j]) ** 2
                    others += 1
        loss = total / others
        if dimension == DIMENSION:
            loss += np.mean([1 - units(vectors)[i] @ own[i] for i in range(COUNT)])
        return loss

    loss = Distillation(teacher)
    loss.teacher = loss.teacher.double()
    check(loss, plain, vectors, batch)


def test_images_without_a_vector_of_the_teacher_count_for_nothing(vectors, batch):
    teacher = units(np.random.default_rng(5).normal(size=(COUNT + 10, DIMENSION)))
    teacher[12:] = 0
    first = Batch(batch.images[:2], batch.views[:2], batch.a, batch.b, batch.labels, batch.people[:2])
    given, loss = tensor(vectors), Distillation(teacher)
    loss.teacher = loss.teacher.double()
    found = loss(given, batch)
    assert value(found) == pytest.approx(value(loss(given[:2], first)))
    found.backward()
    assert given.grad[:2].any() and not given.grad[2:].any()
    loss.teacher.zero_()
    assert value(loss(given, batch)) == 0


def test_the_teacher_itself_has_no_distance(vectors, batch):
    teacher = np.concatenate([np.zeros((10, DIMENSION)), units(vectors)]).astype(np.float32)
    assert float(Distillation(teacher)(torch.tensor(vectors).float(), batch)) == pytest.approx(0, abs=1e-6)


def test_a_weighted_sum(vectors, batch):
    teacher = np.eye(COUNT + 10, dtype=np.float32)
    given, one, other = torch.tensor(vectors).float(), ContrastiveLoss(MARGINS["contrastive"]), Distillation(teacher)
    expected = float(one(given, batch)) + 0.25 * float(other(given, batch))
    assert float(WeightedSum(one, other, 0.25)(given, batch)) == pytest.approx(expected)


def test_a_joined_teacher_has_the_mean_of_the_cosines():
    rng = np.random.default_rng(6)
    members = [units(rng.normal(size=(7, width))) for width in (3, 5, 8)]
    joined = joined_teacher(members)
    assert joined.shape == (7, 16) and joined.dtype == np.float32
    assert joined @ joined.T == pytest.approx(np.mean([each @ each.T for each in members], axis=0), abs=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        PairLoss(),
        ContrastiveLoss(MARGINS["contrastive"]),
        TripletLoss(MARGINS["triplet"]),
        ArcFaceLoss(torch.eye(4, DIMENSION)),
    ],
)
def test_equal_vectors_have_finite_gradients(loss, batch):
    given = torch.ones(COUNT, DIMENSION, requires_grad=True)
    loss(given, batch).backward()
    assert given.grad is not None and torch.isfinite(given.grad).all()


def test_triplets_of_one_person_are_none():
    given = torch.ones(3, DIMENSION, requires_grad=True)
    loss = TripletLoss(MARGINS["triplet"])(given, people_batch(np.arange(3), np.zeros(3, np.int64)))
    loss.backward()
    assert value(loss) == 0 and not given.grad.any()


def test_the_pair_loss_starts_from_what_the_frozen_vectors_say():
    kept, pairs = people_set(30, 1)
    vectors = units(kept.values.reshape(len(kept), -1).astype(np.float64))
    rows = np.arange(len(kept))
    started, whole = PairLoss(), Batch(rows, rows, pairs.a, pairs.b, pairs.labels, pairs.people)
    before = value(started(torch.tensor(vectors), whole))
    started.start_from(vectors, pairs)
    after = value(started(torch.tensor(vectors), whole))
    assert after < before and after < math.log(2)
    # Vectors that say nothing.
    started.start_from(np.ones_like(vectors), pairs)
    assert (value(started.log_scale), value(started.offset)) == (0, 0)


def test_arcface_starts_from_the_means_of_people():
    kept, pairs = people_set(5, 1)
    vectors = units(kept.values.reshape(len(kept), -1).astype(np.float64))
    loss = ArcFaceLoss(torch.zeros(5, vectors.shape[1]))
    loss.start_from(vectors, pairs)
    expected = units(np.stack([vectors[pairs.people == person].mean(axis=0) for person in range(5)]))
    assert loss.centres.detach().numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (np.eye(4), r"shape \(4, 4\) do not fit 3 training images"),
        (np.ones(3), r"shape \(3,\) do not fit"),
        (np.array([[1, 0], [np.nan, 1], [0, 1]]), r"1 training images are not finite \(first: image 1\)"),
        (np.array([[1, 0], [0, 1], [0, 2]]), "image 2 has the length 2, not 1"),
    ],
)
def test_wrong_teachers(teacher, message):
    with pytest.raises(UsageError, match=message):
        check_teacher(teacher, 3)


def test_a_teacher_without_a_vector_for_some_image_serves():
    check_teacher(np.array([[1.0, 0], [0, 0], [0, 1]]), 3)
