"""Fitting heads to synthetic people: bytes, folds, calibration, thresholds, and refused input."""

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
from batchverify.training.fit import FittedHead, fit_head, probabilities, splits
from batchverify.training.fuse import measure_heads

NETWORK: dict[str, Any] = {"widths": (16, 8), "epochs": 3, "max_lr": 3e-3, "dropout": 0.2}


def fit(train=None, dev=None, about=None, **options) -> FittedHead:
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
    assert measure_heads(head, [test]) == measure(test.labels, probability, head.threshold())


def test_probabilities_of_many_blocks_are_those_of_the_head():
    head, dev = fit().head, draw_people(20, 2, pairs=100)
    many = dev.subset(np.random.default_rng(0).integers(0, 100, 40_000))
    expected = head(dev.vectors[many.a[-5:]], dev.vectors[many.b[-5:]])[0]
    probability = probabilities(head, many)
    assert (probability.shape, probability.dtype) == ((40_000,), np.float32)
    assert np.array_equal(probability[-5:], expected)
    assert probabilities(head, dev.subset(np.zeros(0, int))).shape == (0,)


KINDS: dict[str, Any] = {
    "distance": {"algorithms": ("distance",)},
    "logistic": {"algorithms": ("logistic",)},
    "network": {"algorithms": ("network",)},
    # Concatenation learns little, but it can memorise.
    "snapshots": {"algorithms": ("network:concat",), "snapshots": 2, "widths": (64,)},
    "ensemble": {"algorithms": ("network", "distance", "weighted-chi2"), "snapshots": 2, "max_lr": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_the_same_bytes_whatever_the_threads_and_random_state(kind):
    before = torch.get_num_threads()
    options: dict[str, Any] = {"folds": 0 if kind == "snapshots" else 2, **KINDS[kind]}
    heads = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(threads)
            np.random.seed(threads)  # numpy's global state: nothing may depend on it
            state = torch.get_rng_state()
            heads.append(fit(**options).head.to_bytes())
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert heads[0] == heads[1]


def test_another_seed_gives_another_network():
    options: dict[str, Any] = {"algorithms": ("network",), "folds": 0}
    layers = [fit(**options, seed=seed).head.scorers[0].layers for seed in (0, 1)]
    assert not np.array_equal(layers[0][0][0], layers[1][0][0])


def test_scorers_of_an_ensemble_and_its_networks():
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
    folds = list(splits(train, 5, seed=0))
    assert len(folds) == 5
    scored = np.concatenate([outside for _, outside in folds])
    assert sorted(scored.tolist()) == list(range(len(train)))
    for inside, outside in folds:
        held_out = set(groups[train.a[outside]].tolist())
        assert not held_out & set(groups[np.r_[train.a[inside], train.b[inside]]].tolist())
        assert len(np.unique(inside)) == len(inside) >= 0.5 * len(train)
    assert not np.array_equal(folds[0][1], next(splits(train, 5, seed=1))[1])
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
    # The fit has memorised every label; out of fold it can only guess, and dev is a quarter of the held-out pairs.
    assert Curve.of(noise.labels, probabilities(head, noise)).auc() == 1
    assert head.about["held_out"]["pairs"] == 400
    assert abs(head.about["held_out"]["auc"] - 0.5) < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_without_folds_calibration_and_thresholds_come_from_dev_alone(kind):
    dev = draw_people(20, 2, pairs=100, noise=1.5, name="dev")
    head = fit(draw_people(40, 1, noise=1.5), dev, **{"folds": 0, "widths": (64,), **KINDS[kind]}).head
    assert head.about["thresholds"]["held_out_pairs"] == len(dev)
    assert head.about["training"]["folds"] == 0
    # The calibrated scores are the head's own: two ways to the same metrics.
    assert head.about["held_out"] == pytest.approx(head.about["dev"], abs=1e-4)


def test_a_large_dev_set_needs_no_folds():
    dev = draw_people(60, 2, pairs=100, name="dev")
    many = dev.subset(np.random.default_rng(0).integers(0, 100, 5000))
    assert fit(dev=many).head.about["training"]["folds"] == 0
    assert fit(dev=many.subset(np.arange(4999))).head.about["training"]["folds"] == 5


def one_against_all():
    """Pairs of one image with all others: without that image none are left."""
    train = draw_people(30, 1, known=False, images=20)
    b = np.r_[1:20, 20:120].astype(np.int32)
    return replace(train, a=np.zeros_like(b), b=b, labels=(b >= 20).astype(np.int8))


@pytest.mark.parametrize("algorithm", ["distance", "network"])
def test_if_no_fold_can_be_left_out_dev_alone_is_used(algorithm):
    about = fit(one_against_all(), algorithms=(algorithm,)).head.about
    assert (about["training"]["folds"], about["thresholds"]["held_out_pairs"]) == (0, 100)
    with pytest.raises(UsageError, match=r"--folds 3: .* too few training pairs of both labels are left"):
        fit(one_against_all(), algorithms=(algorithm,), folds=3)


def test_the_metadata_of_the_artifact():
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
    metrics = measure_heads(fits["platt"], [test])
    assert 0.6 < metrics.auc < 0.97
    assert metrics.ece < 0.04
    assert probabilities(fits["platt"], test).mean() == pytest.approx(0.5, abs=0.03)
    assert fits["none"].calibration == (1.0, 0.0)
    assert fits["temperature"].calibration[1] == 0
    for head in fits.values():
        assert measure_heads(head, [test]).auc == pytest.approx(metrics.auc, abs=1e-6)
    # A head that has memorised the training pairs is overconfident. Calibration corrects it.
    overconfident = fit(train.subset(np.arange(300)), dev, algorithms=("logistic",), shrinkage=1e-3).head.about[
        "calibration"
    ]
    before, after = overconfident["before"], overconfident["after"]
    assert before["ece"] > 0.1 > 0.05 > after["ece"]
    assert before["brier"] > after["brier"]


def with_value(pairs, value: float):
    vectors = pairs.vectors.copy()
    vectors[3, 100] = value
    return replace(pairs, vectors=vectors)


TRAIN = draw_people(40, 1, pairs=100)
REFUSED = {
    "same alone": ({"train": replace(TRAIN, labels=TRAIN.labels * 0)}, "100 pairs, 100 are same and 0 diff"),
    "dev different alone": (
        {"dev": draw_people(9, 2, name="dev").subset(np.zeros(0, int))},
        "dev pairs need .* of 0 pairs",
    ),
    "labels of two": ({"train": replace(TRAIN, labels=TRAIN.labels * 2)}, "pairs need label 0 and label 1"),
    "nineteen": ({"train": TRAIN.subset(np.arange(19))}, "only 19 training pairs; at least 20"),
    "nan": ({"train": with_value(TRAIN, np.nan)}, r"training pairs have 1 embeddings .* training/3\.jpg"),
    "inf": ({"dev": with_value(draw_people(9, 2, name="dev"), np.inf)}, "dev pairs have 1 embeddings"),
    "unknown": ({"algorithms": ("svm",)}, "got 'svm'"),
    "unknown features": ({"features": "cosin"}, "got 'cosin'"),
    "vector": ({"algorithms": ("distance:chi2",)}, "distance takes one of cosine"),
    "alike": ({"train": replace(TRAIN, vectors=TRAIN.vectors * 0 + 1)}, "cannot be told apart"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pairs_that_cannot_be_learned_from_are_refused(case):
    arguments, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        fit(**arguments)


def test_twenty_pairs_are_enough():
    assert fit(draw_people(40, 1, pairs=20)).head.about["dev"]["auc"] == 1


def test_a_network_that_cannot_learn_stops_with_advice():
    contradicting = TRAIN.subset(np.repeat(np.arange(50), 2))
    contradicting = replace(contradicting, labels=(np.arange(100) % 2).astype(np.int8))
    with pytest.raises(TrainingError, match=r"overfit check: .* cannot learn at all"):
        fit(contradicting, algorithms=("network",))


def test_augmented_views_are_used_for_fitting_but_not_scored():
    train = draw_people(40, 1, noise=1.5)
    rng = np.random.default_rng(0)
    view = (train.vectors + 0.01 * rng.normal(size=train.vectors.shape)).astype(np.float16)
    augmented = train.with_views([view, view], seed=0)
    head = fit(augmented, algorithms=("logistic",)).head
    assert head.about["held_out"]["pairs"] == 200 + 100
    assert head.about["training"]["pairs"] == 200
    plain = fit(train, algorithms=("logistic",)).head
    assert not np.array_equal(head.scorers[0].layers[0][0], plain.scorers[0].layers[0][0])
    groups = augmented.groups()
    for inside, outside in splits(augmented, 5, seed=0):
        assert outside.max() < 200
        assert not set(groups[augmented.a[outside]]) & set(groups[np.r_[augmented.a[inside], augmented.b[inside]]])


def test_epochs_of_the_whole_fit_are_reported_and_those_of_folds_are_not():
    reported = []
    options = TrainOptions(algorithms=("network", "distance"), **NETWORK, folds=2)
    fit_head(TRAIN, draw_people(20, 2), EMBEDDING, options, None, lambda *epoch: reported.append(epoch))
    assert [(name, epoch.epoch) for name, epoch in reported] == [("network:absdiff", number) for number in (1, 2, 3)]
