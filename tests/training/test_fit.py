"""Fitting a head on synthetic people: bytes, folds, calibration, thresholds, and what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from people import EMBEDDING, draw_people

from batchverify.errors import TrainingError, UsageError
from batchverify.evaluation.figures import Curve, measure
from batchverify.heads.head import Head
from batchverify.options import TrainOptions
from batchverify.training.fit import Fitted, fit_head, measure_head, probabilities, splits

NETWORK: dict[str, Any] = {"widths": (16, 8), "epochs": 3, "max_lr": 3e-3, "dropout": 0.2}


def fit(train=None, dev=None, about=None, **options) -> Fitted:
    return fit_head(
        train if train is not None else draw_people(40, 1),
        dev if dev is not None else draw_people(20, 2, pairs=100, name="dev"),
        EMBEDDING,
        TrainOptions(**{**NETWORK, **options}),
        about,
    )


def test_separable_pairs_are_separated():
    head = fit().head
    test = draw_people(50, 9, pairs=300, name="test")
    probability = probabilities(head, test)
    assert Curve.of(test.labels, probability).auc() == 1
    assert ((probability >= head.threshold()) == test.labels).all()
    assert probability[test.labels == 0].max() < 0.2 and probability[test.labels == 1].min() > 0.8
    assert measure_head(head, test) == measure(test.labels, probability, head.threshold())


def test_probabilities_of_many_blocks_are_those_of_the_head():
    head, dev = fit().head, draw_people(20, 2, pairs=100)
    many = dev.subset(np.random.default_rng(0).integers(0, 100, 40_000))
    one = head(dev.vectors[many.a[-5:]], dev.vectors[many.b[-5:]])[0]
    found = probabilities(head, many)
    assert (found.shape, found.dtype) == ((40_000,), np.float32)
    assert np.array_equal(found[-5:], one)
    assert probabilities(head, dev.subset(np.zeros(0, int))).shape == (0,)


KINDS: dict[str, Any] = {
    "distance": {"algorithms": ("distance",)},
    "logistic": {"algorithms": ("logistic",)},
    "network": {"algorithms": ("network",)},
    # Concatenation learns little, but by heart it does.
    "snapshots": {"algorithms": ("network:concat",), "snapshots": 2, "widths": (64,)},
    "ensemble": {"algorithms": ("network", "distance", "weighted-chi2"), "snapshots": 2, "max_lr": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_the_same_bytes_whatever_the_threads_and_random_state(kind):
    before = torch.get_num_threads()
    options: dict[str, Any] = {"folds": 0 if kind == "snapshots" else 2, **KINDS[kind]}
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(threads)
            np.random.seed(threads)  # the old global state: nothing may follow from it
            state = torch.get_rng_state()
            found.append(fit(**options).head.to_bytes())
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_another_seed_gives_another_network():
    options: dict[str, Any] = {"algorithms": ("network",), "folds": 0}
    layers = [fit(**options, seed=seed).head.scorers[0].layers for seed in (0, 1)]
    assert not np.array_equal(layers[0][0][0], layers[1][0][0])


def test_members_of_an_ensemble_and_its_networks():
    fitted = fit(**KINDS["ensemble"], folds=0)
    algorithms = [scorer.algorithm for scorer in fitted.head.scorers]
    assert algorithms == ["network", "network", "distance", "weighted-chi2"]
    assert list(fitted.networks) == ["network:absdiff"]
    assert fitted.networks["network:absdiff"].max_lr == fitted.networks["network:absdiff"].range_test.pick
    again = Head.from_bytes(fitted.head.to_bytes(), "x")
    test = draw_people(30, 8)
    assert np.array_equal(probabilities(again, test), probabilities(fitted.head, test))


@pytest.mark.parametrize("known", [True, False])
def test_folds_hold_out_whole_people_and_score_every_pair_once(known):
    train = draw_people(40, 1, pairs=400, known=known)
    groups = train.groups()
    found = list(splits(train, 5, seed=0))
    assert len(found) == 5
    scored = np.concatenate([outside for _, outside in found])
    assert sorted(scored.tolist()) == list(range(len(train)))
    for inside, outside in found:
        held_out = set(groups[train.a[outside]].tolist())
        assert not held_out & set(groups[np.r_[train.a[inside], train.b[inside]]].tolist())
        assert len(np.unique(inside)) == len(inside) >= 0.5 * len(train)
    assert not np.array_equal(found[0][1], next(splits(train, 5, seed=1))[1])
    assert list(splits(train, 0, seed=0)) == []


@pytest.mark.parametrize("share", [0.5, 0.2, 0.8])
def test_a_fold_keeps_the_share_of_the_labels(share):
    train = draw_people(60, 1, pairs=600)
    rows = np.concatenate(
        [
            np.flatnonzero(train.labels == 1)[: int(300 * share)],
            np.flatnonzero(train.labels == 0)[: int(300 - 300 * share)],
        ]
    )
    train = train.subset(rows)
    for inside, _ in splits(train, 5, seed=0):
        assert train.labels[inside].mean() == pytest.approx(share, abs=0.01)


def test_held_out_scores_come_from_fits_that_have_not_seen_the_pair():
    train = draw_people(60, 1, pairs=300)
    noise = replace(train, labels=np.random.default_rng(0).integers(0, 2, len(train)).astype(np.int8))
    options: dict[str, Any] = {"algorithms": ("logistic",), "shrinkage": 1e-3, "calibration": "none"}
    head = fit(noise, **options).head
    # By heart the fit knows every label; out of fold it can but guess, and dev is a quarter of the held-out pairs.
    assert Curve.of(noise.labels, probabilities(head, noise)).auc() == 1
    assert head.about["held_out"]["pairs"] == 400
    assert abs(head.about["held_out"]["auc"] - 0.5) < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_without_folds_dev_alone_carries_calibration_and_thresholds(kind):
    dev = draw_people(20, 2, pairs=100, noise=1.5, name="dev")
    head = fit(draw_people(40, 1, noise=1.5), dev, **{"folds": 0, "widths": (64,), **KINDS[kind]}).head
    assert head.about["thresholds"]["held_out_pairs"] == len(dev)
    assert head.about["training"]["folds"] == 0
    # The scores that were calibrated are the head's own: the same metrics by two ways.
    assert head.about["held_out"] == pytest.approx(head.about["dev"], abs=1e-4)


def test_a_large_dev_set_needs_no_folds():
    dev = draw_people(60, 2, pairs=100, name="dev")
    many = dev.subset(np.random.default_rng(0).integers(0, 100, 5000))
    assert fit(dev=many).head.about["training"]["folds"] == 0
    assert fit(dev=many.subset(np.arange(4999))).head.about["training"]["folds"] == 5


def one_against_all():
    """Pairs of one image with all others: whoever leaves it out has none left."""
    train = draw_people(30, 1, known=False, images=20)
    b = np.r_[1:20, 20:120].astype(np.int32)
    return replace(train, a=np.zeros_like(b), b=b, labels=(b >= 20).astype(np.int8))


@pytest.mark.parametrize("algorithm", ["distance", "network"])
def test_where_no_fold_can_be_left_out_dev_alone_serves(algorithm):
    about = fit(one_against_all(), algorithms=(algorithm,)).head.about
    assert (about["training"]["folds"], about["thresholds"]["held_out_pairs"]) == (0, 100)
    with pytest.raises(UsageError, match=r"--folds 3: .* too few training pairs of both labels are left"):
        fit(one_against_all(), algorithms=(algorithm,), folds=3)


def test_what_the_artifact_tells():
    extra = {"data": "synthetic", "training": {"left_out": 4}}
    dev = draw_people(20, 2, pairs=100, name="dev")
    about = Head.from_bytes(fit(dev=dev, about=extra, algorithms=("logistic",)).head.to_bytes(), "x").about
    assert about["data"] == "synthetic"
    assert about["training"]["left_out"] == 4
    assert (about["training"]["pairs"], about["training"]["folds"]) == (200, 5)
    assert about["training"]["options"]["recipes"] == ["logistic:chi2"]
    assert about["training"]["options"]["shrinkage"] == TrainOptions().shrinkage
    assert "widths" not in about["training"]["options"]
    assert about["dev"]["auc"] == 1 and about["dev"]["pairs"] == 100
    assert about["held_out"]["pairs"] == about["calibration"]["held_out_pairs"] == 300
    assert about["dev"]["threshold"] == about["thresholds"]["best_f1"] == about["held_out"]["threshold"]
    assert set(about["calibration"]["before"]) == set(about["calibration"]["after"]) == {"brier", "ece"}
    assert 0 <= about["thresholds"]["equal_error"]["rate"] < 0.01
    assert about["embedding"] == dict(EMBEDDING.document)
    assert fit(algorithms=("network",)).head.about["training"]["options"]["widths"] == (16, 8)


def test_rates_that_the_different_pairs_cannot_support_are_not_stored():
    dev = draw_people(20, 2, pairs=100, name="dev")
    head = fit(dev=dev).head
    # 80 images of 20 people: 20 * 19 / 2 * 16 impostor pairs, ten of which are a share of 0.0033.
    assert head.about["thresholds"]["different_pairs"] == 3040
    assert [each["far"] for each in head.about["thresholds"]["far"]] == [0.1, 0.01]
    impostor_pairs = probabilities(head, dev.impostor_pairs())
    for each in head.about["thresholds"]["far"]:
        assert head.threshold(at_far=each["far"]) == each["threshold"]
        assert each["far"] * 0.9 < (impostor_pairs < each["threshold"]).mean() <= each["far"]
    with pytest.raises(UsageError, match=r"--at-far 0.001: .* 3,040 different pairs support 0.1, 0.01"):
        head.threshold(at_far=1e-3)
    unknown = fit(dev=replace(dev, persons={})).head.about["thresholds"]
    assert (unknown["different_pairs"], unknown["far"]) == (50, [])


def test_pairs_that_overlap_give_calibrated_probabilities():
    drawn: dict[str, Any] = {"pairs": 2000, "images": 6, "noise": 3.0}
    train, dev, test = (draw_people(100, seed, **drawn, name=f"set {seed}") for seed in (4, 5, 6))
    fits = {name: fit(train, dev, calibration=name).head for name in ("platt", "temperature", "none")}
    metrics = measure_head(fits["platt"], test)
    assert 0.6 < metrics.auc < 0.97
    assert metrics.ece < 0.04
    assert probabilities(fits["platt"], test).mean() == pytest.approx(0.5, abs=0.03)
    assert fits["none"].calibration == (1.0, 0.0)
    assert fits["temperature"].calibration[1] == 0
    for head in fits.values():
        assert measure_head(head, test).auc == pytest.approx(metrics.auc, abs=1e-6)
    # An overconfident head: by heart it knows the training pairs. Calibration brings it back.
    sure = fit(train.subset(np.arange(300)), dev, algorithms=("logistic",), shrinkage=1e-3).head.about[
        "calibration"
    ]
    assert sure["before"]["ece"] > 0.1 > 0.05 > sure["after"]["ece"]
    assert sure["before"]["brier"] > sure["after"]["brier"]


def with_value(pairs, value: float):
    vectors = pairs.vectors.copy()
    vectors[3, 100] = value
    return replace(pairs, vectors=vectors)


TRAIN = draw_people(40, 1, pairs=100)
REFUSED = {
    "same alone": ({"train": replace(TRAIN, labels=TRAIN.labels * 0)}, "100 pairs 100 are same and 0 diff"),
    "dev different alone": (
        {"dev": draw_people(9, 2, name="dev").subset(np.zeros(0, int))},
        "dev pairs need .* of 0 pairs",
    ),
    "labels of two": ({"train": replace(TRAIN, labels=TRAIN.labels * 2)}, "pairs need label 0 and label 1"),
    "nineteen": ({"train": TRAIN.subset(np.arange(19))}, "training pairs are 19: fewer than 20"),
    "nan": ({"train": with_value(TRAIN, np.nan)}, r"training pairs hold 1 embeddings .* training/3\.jpg"),
    "inf": ({"dev": with_value(draw_people(9, 2, name="dev"), np.inf)}, "dev pairs hold 1 embeddings"),
    "unknown": ({"algorithms": ("svm",)}, "got 'svm'"),
    "unknown features": ({"features": "cosin"}, "got 'cosin'"),
    "vector": ({"algorithms": ("distance:chi2",)}, "takes one number a pair"),
    "alike": ({"train": replace(TRAIN, vectors=TRAIN.vectors * 0 + 1)}, "cannot be told apart"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learned_from_is_refused(case):
    arguments, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        fit(**arguments)


def test_twenty_pairs_are_enough():
    assert fit(draw_people(40, 1, pairs=20)).head.about["dev"]["auc"] == 1


def test_a_network_that_cannot_learn_stops_with_what_that_means():
    torn = TRAIN.subset(np.repeat(np.arange(50), 2))
    torn = replace(torn, labels=(np.arange(100) % 2).astype(np.int8))
    with pytest.raises(TrainingError, match=r"overfit check: .* cannot learn at all"):
        fit(torn, algorithms=("network",))


def test_views_are_learned_from_and_never_scored():
    train = draw_people(40, 1, noise=1.5)
    rng = np.random.default_rng(0)
    view = (train.vectors + 0.01 * rng.normal(size=train.vectors.shape)).astype(np.float16)
    seen = train.with_views([view, view], seed=0)
    head = fit(seen, algorithms=("logistic",)).head
    assert head.about["held_out"]["pairs"] == 200 + 100
    assert head.about["training"]["pairs"] == 200
    plain = fit(train, algorithms=("logistic",)).head
    assert not np.array_equal(head.scorers[0].layers[0][0], plain.scorers[0].layers[0][0])
    groups = seen.groups()
    for inside, outside in splits(seen, 5, seed=0):
        assert outside.max() < 200
        assert not set(groups[seen.a[outside]]) & set(groups[np.r_[seen.a[inside], seen.b[inside]]])


def test_epochs_of_the_whole_fit_are_reported_and_those_of_folds_are_not():
    told = []
    options = TrainOptions(algorithms=("network", "distance"), **NETWORK, folds=2)
    fit_head(TRAIN, draw_people(20, 2), EMBEDDING, options, None, lambda *each: told.append(each))
    assert [(name, epoch.epoch) for name, epoch in told] == [("network:absdiff", at) for at in (1, 2, 3)]
