"""The training itself: checks, rates, epochs, early stopping, precision, and what it refuses."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from finetune_samples import Kept, SmallNetwork, people_set, quick, steps_of
from sklearn.metrics import roc_auc_score

from batchverify.errors import BatchverifyError, TrainingError, UsageError
from batchverify.training.finetuning.fit import FinetuneTask, StoredPairs, fit
from batchverify.training.finetuning.learner import Learner
from batchverify.training.finetuning.team import Team
from batchverify.training.finetuning.vectors import auc_of, embedded

LOSSES = ("pair", "contrastive", "triplet", "arcface", "distillation")


@pytest.fixture(scope="module")
def train():
    return people_set(40, 1)


@pytest.fixture(scope="module")
def dev():
    return people_set(30, 2, "dev")


@pytest.fixture
def learn(train, dev, tmp_path):
    """Train a small network; returns it and the fit."""

    def run(
        options=None,
        *,
        network=None,
        train=train,
        dev=dev,
        folder=tmp_path,
        teacher=None,
        frozen=None,
        **others,
    ):
        network = network or SmallNetwork()
        task = FinetuneTask(
            network, StoredPairs(*train), StoredPairs(*dev), options or quick(), folder, teacher, frozen
        )
        return network, fit(task, **others)

    return run


@pytest.fixture
def learnt(learn, train, tmp_path):
    """Train in a folder of its own and measure on the training set, so that no epoch is worse than the one before."""
    places = iter(range(99))

    def run(options, **others):
        network, result = learn(options, dev=train, folder=tmp_path / str(next(places)), **others)
        assert result.best_epoch == options.epochs
        return network

    return run


def teacher_of(people_set):
    """Unit vectors that know the people."""
    directions = np.random.default_rng(8).normal(size=(40, 12))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions[people_set[1].people].astype(np.float32)


def near(one, other, most):
    """Whether no parameter differs by more."""
    return all(
        torch.allclose(mine, theirs, rtol=0, atol=most)
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True)
    )


def same_states(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def best_auc(result):
    return result.epochs[result.best_epoch].dev_auc


def auc(network, dev):
    stored, pairs = dev
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(network.eval()(torch.from_numpy(stored.values))).numpy()
    cosines = (vectors[pairs.a] * vectors[pairs.b]).sum(axis=1)
    return roc_auc_score(pairs.labels, -cosines)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns(learn, train, dev, loss):
    options = quick(
        loss=loss, epochs=10 if loss == "arcface" else 5, teacher="any" if loss == "distillation" else None
    )
    frozen = auc(SmallNetwork(), dev)
    teacher = teacher_of(train) if loss == "distillation" else None
    network, result = learn(options, teacher=teacher)
    assert result.frozen_auc == result.epochs[0].dev_auc == pytest.approx(frozen)
    assert result.helped and best_auc(result) > frozen + 0.02
    assert auc(network, dev) == pytest.approx(best_auc(result))
    assert best_auc(result) == max(epoch.dev_auc for epoch in result.epochs)
    assert [epoch.epoch for epoch in result.epochs] == list(range(options.epochs + 1))
    assert result.epochs[0].loss is None and result.epochs[-1].loss < result.epochs[1].loss


def test_the_frozen_networks_vectors_are_not_computed_again_where_they_are_known(learn, dev, tmp_path):
    stored, pairs = dev
    learner = Learner(SmallNetwork(), torch.nn.Identity())
    known = embedded(learner, stored, pairs.images, quick().batch_images, Team(torch.device("cpu")))
    network, result = learn(folder=tmp_path / "computed")
    other, given = learn(folder=tmp_path / "known", frozen=known)
    assert same_states(network.state_dict(), other.state_dict()) and given.frozen_auc == result.frozen_auc
    _, moved = learn(folder=tmp_path / "moved", frozen=np.roll(known, 1, axis=0))
    assert moved.frozen_auc != result.frozen_auc


def test_a_teacher_beside_a_loss(learnt, train):
    alone = learnt(quick())
    nothing, half = (
        learnt(quick(teacher="any", teacher_weight=weight), teacher=teacher_of(train)) for weight in (0.0, 0.5)
    )
    assert near(alone, nothing, 1e-6) and not near(alone, half, 1e-3)


def test_epochs_are_reported_and_steps_counted(learn, tmp_path):
    seen = []
    _, result = learn(report=seen.append)
    assert seen == result.epochs and len(seen) == 4
    total = 3 * (480 // 16)
    assert steps_of(tmp_path) == (total, total)
    assert result.max_lr == 3e-3 and result.range_test is None
    assert result.epochs[1].lr == pytest.approx(3e-3 / 25)
    assert result.epochs[2].lr > result.epochs[3].lr > result.epochs[1].lr


def test_one_seed_gives_one_network(learnt):
    options = quick(dropout=0.3)
    one, other, third, wet = (
        learnt(each, network=SmallNetwork(dropout=dropout))
        for each, dropout in ((options, 0.3), (options, 0.3), (replace(options, seed=1), 0.3), (options, 0.0))
    )
    assert same_states(one.state_dict(), other.state_dict())
    assert not near(one, third, 1e-3) and not near(one, wet, 1e-3)


def test_the_callers_random_state_is_kept(learn):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    learn(quick(epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_the_range_test_picks_a_rate(learn):
    _, result = learn(quick(max_lr=None, epochs=1))
    tested = result.range_test
    assert result.max_lr == tested.pick and 1e-6 < tested.pick < 0.1
    assert len(tested.rates) <= 60 and tested.rates[0] == pytest.approx(1e-6)
    assert np.isfinite(tested.losses).all() and min(tested.losses) < tested.losses[0]


def test_checks_leave_no_trace(learn, learnt, train, tmp_path):
    first, result = learn(quick(max_lr=None), dev=train, folder=tmp_path / "tested")
    assert result.helped
    assert same_states(first.state_dict(), learnt(quick(max_lr=result.max_lr)).state_dict())


def test_an_untrained_epoch_zero_wins_if_nothing_helps(learn, train):
    stored, pairs = train
    # Dev labels that say the opposite: learning makes it worse.
    opposite = replace(pairs, labels=(1 - pairs.labels).astype(np.int8))
    network, result = learn(quick(epochs=9, patience=2), dev=(stored, opposite))
    assert (result.helped, result.best_epoch, best_auc(result)) == (False, 0, result.frozen_auc)
    assert len(result.epochs) == 3  # stopped early
    assert same_states(network.state_dict(), SmallNetwork().state_dict())


def test_the_best_epoch_is_kept(learn, dev, tmp_path):
    # A rate that overshoots at its top.
    network, result = learn(quick(epochs=6, max_lr=0.3))
    aucs = [epoch.dev_auc for epoch in result.epochs]
    assert result.best_epoch == int(np.argmax(aucs)) and len(aucs) == 7
    assert aucs[-1] != max(aucs) and auc(network, dev) == pytest.approx(max(aucs))
    # Stopped early at the second epoch after the best one.
    _, early = learn(quick(epochs=6, max_lr=0.3, patience=1), folder=tmp_path / "early")
    assert [epoch.dev_auc for epoch in early.epochs] == aucs[: len(early.epochs)]
    assert len(early.epochs) == early.best_epoch + 2


def test_deeper_blocks_learn_more_slowly(learnt):
    def moved(decay):
        network, start = learnt(quick(lr_decay=decay, weight_decay=0.0)), SmallNetwork()
        with torch.no_grad():
            return [
                float((getattr(network, name).weight - getattr(start, name).weight).abs().max())
                for name in ("linear", "convolution")
            ]

    (_, inner), (outer, slow), (_, still) = moved(1.0), moved(0.1), moved(1e-6)
    assert slow < 0.3 * inner and still < 1e-3 * inner < outer


def test_weight_decay_spares_vectors(learnt):
    plain, decayed = (dict(learnt(quick(weight_decay=decay)).state_dict().items()) for decay in (0.0, 10.0))
    assert float(decayed["linear.weight"].norm()) < 0.8 * float(plain["linear.weight"].norm())
    assert float(decayed["norm.weight"].norm()) > 0.9 * float(plain["norm.weight"].norm())


def test_accumulated_batches_are_one_step(learn, learnt, tmp_path):
    learn(quick(accumulate=4, epochs=1))
    assert steps_of(tmp_path) == (7, 7)
    # The gradients of two halves average to that of the whole: the contrastive loss is a mean over pairs.
    one = learnt(quick(loss="contrastive"))
    two = learnt(quick(loss="contrastive", batch_images=16, accumulate=2))
    assert near(one, two, 1e-4) and not same_states(one.state_dict(), two.state_dict())


def test_bfloat16_is_near_float32(learn, tmp_path, dev):
    full, result = learn(quick(epochs=5), folder=tmp_path / "a")
    mixed, other = learn(quick(epochs=5, dtype="bfloat16"), folder=tmp_path / "b")
    assert result.helped and not same_states(full.state_dict(), mixed.state_dict())
    assert all(tensor.dtype == torch.float32 for tensor in mixed.parameters())
    # Dev is measured in float32.
    assert other.frozen_auc == result.frozen_auc
    assert best_auc(other) == pytest.approx(best_auc(result), abs=0.03)
    assert auc(mixed, dev) == pytest.approx(best_auc(other))


def test_views_take_part(learnt):
    assert not near(learnt(quick()), learnt(quick(), train=people_set(40, 1, views=3)), 1e-3)


def test_contradicting_labels_stop_the_training(learn, train):
    stored, pairs = train
    a, b = np.tile(pairs.a[:20], 2), np.tile(pairs.b[:20], 2)
    twice = replace(pairs, a=a, b=b, labels=np.repeat([0, 1], 20).astype(np.int8))
    with pytest.raises(TrainingError, match=r"overfit check: after 100 steps .* AUC of 0\.\d+ .*both labels"):
        learn(train=(stored, twice), options=quick(batch_images=64))


def test_images_all_alike_stop_the_training(learn, train):
    stored, pairs = train
    alike = Kept(np.repeat(stored.values[:1], len(stored), axis=0))
    with pytest.raises(TrainingError, match="images that are all alike"):
        learn(train=(alike, pairs))
    options = quick(loss="distillation", teacher="any")
    with pytest.raises(TrainingError, match=r"a loss of .* on \d+ images, but half is needed"):
        learn(options, train=(alike, pairs), teacher=np.eye(len(stored), dtype=np.float32))


def test_vectors_that_are_not_finite(learn, train, dev):
    for which, message in (("train", "160 training images"), ("dev", "120 dev images")):
        stored, pairs = {"train": train, "dev": dev}[which]
        broken = Kept(stored.values.copy())
        broken.values[:] = np.nan
        with pytest.raises(TrainingError, match=rf"{message} \(first: image 0\) are not finite before"):
            learn(quick(), **{which: (broken, pairs)})


@pytest.mark.parametrize("loss", ["contrastive", "triplet"])
def test_losses_that_are_not_finite_stop_the_overfit_check(learn, train, loss):
    broken = Kept(np.full_like(train[0].values, np.inf))
    with pytest.raises(TrainingError, match="overfit check: the loss is not finite"):
        learn(quick(loss=loss), train=(broken, train[1]))


def test_a_loss_that_becomes_nan_names_epoch_and_step(learn, train):
    stored, pairs = train

    class Sick(Kept):
        def batch(self, images, views):
            tensor = super().batch(images, views)
            # Broken only in views, which the overfit check does not take.
            tensor[torch.from_numpy(views) > 0] = math.nan
            return tensor

    with pytest.raises(TrainingError, match=r"epoch 1, step \d+: the loss is not finite; give a smaller --max-lr"):
        learn(train=(Sick(stored.values, 1), pairs))


def test_a_rate_that_breaks_the_network(learn):
    with pytest.raises(TrainingError, match="not finite"):
        learn(quick(max_lr=1e8))


def test_sets_that_do_not_fit(learn, train, dev):
    stored, pairs = train
    one = replace(pairs, people=np.zeros_like(pairs.people))
    nobody = replace(pairs, people=np.full_like(pairs.people, -1))
    for loss, people, message in (
        ("arcface", one, "training images show 1 known person"),
        ("triplet", one, "show 1 known person"),
        ("arcface", nobody, "--loss arcface needs the people .* person_a and person_b"),
    ):
        with pytest.raises(UsageError, match=message):
            learn(quick(loss=loss), train=(stored, people))
    with pytest.raises(UsageError, match="the dev pairs need label 0 and label 1"):
        learn(dev=(dev[0], replace(dev[1], labels=np.zeros_like(dev[1].labels))))
    with pytest.raises(UsageError, match=r"--batch-images 2000 takes 1,000 pairs.* give at most 960"):
        learn(quick(batch_images=2000))
    message = r"--accumulate 100 and --workers 1 take 100 batches a step.* fills only 30 of --batch-images 32"
    with pytest.raises(UsageError, match=message):
        learn(quick(accumulate=100))
    with pytest.raises(UsageError, match="shape"):
        learn(quick(teacher="any"), teacher=np.ones((3, 4), np.float32))


def test_triplets_without_people_come_from_same_pairs(learnt, train):
    stored, pairs = train
    nobody = replace(pairs, people=np.full_like(pairs.people, -1))
    named, joined = (learnt(quick(loss="triplet"), train=(stored, each)) for each in (pairs, nobody))
    # All pairs of one person are there, so the groups are the people.
    assert same_states(named.state_dict(), joined.state_dict())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory(learn, error):
    class Hungry(SmallNetwork):
        def forward(self, activations):
            if len(activations) > 20:
                raise error
            return super().forward(activations)

    with pytest.raises(TrainingError, match=r"not enough memory for --batch-images 32: .*--accumulate"):
        learn(network=Hungry())


def test_other_errors_pass(learn):
    class Broken(SmallNetwork):
        def forward(self, activations):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        learn(network=Broken())


def test_the_auc_is_that_of_the_reference():
    _, pairs = people_set(10, 3)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = [vectors[a] @ vectors[b] for a, b in zip(pairs.a, pairs.b, strict=True)]
    assert auc_of(vectors, pairs) == pytest.approx(roc_auc_score(pairs.labels, -np.array(cosines)))


def test_workers_that_see_different_folders(learn):
    class Alone(Team):
        """Of two members; the other one has read a checkpoint."""

        def of_first(self, value):
            return value + 5

    with pytest.raises(BatchverifyError, match="worker 1 finds another checkpoint here than worker 0"):
        learn(team=Alone(torch.device("cpu"), 1, 2))


def test_a_team_of_one():
    team, module = Team(torch.device("cpu")), SmallNetwork()
    assert team.joined(module) is module and team.of_first(0.1) == 0.1
    with team.apart(module):
        assert torch.equal(team.total(torch.ones(2)), torch.ones(2))
