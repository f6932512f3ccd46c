"""Network heads: checks before training, learning rates, early stopping, snapshots, memory."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from people import QUICK, draw_people
from repository import REPOSITORY, SUPPORT
from torch.nn.functional import binary_cross_entropy_with_logits
from torch_threads import one_torch_thread

from batchverify.errors import TrainingError
from batchverify.evaluation.figures import Curve
from batchverify.heads.features import Features
from batchverify.heads.scorer import Scorer
from batchverify.training.network import Perceptron, batches, fit_network, overfit_check, range_test

ABSDIFF = Features.parse("absdiff")
SMALL = 32  # dimension: as easy to learn, and faster
PAIRS = draw_people(20, 1, dimension=16)


one_thread = pytest.fixture(scope="module", autouse=True)(one_torch_thread)


@pytest.fixture(scope="module")
def train():
    return draw_people(60, 1, pairs=400, dimension=SMALL)


@pytest.fixture(scope="module")
def dev():
    return draw_people(30, 2, name="dev", dimension=SMALL)


@pytest.fixture(scope="module")
def hard():
    """(train, dev) with so much noise that a network soon memorises the training pairs."""
    drawn: dict[str, Any] = {"noise": 1.5, "dimension": SMALL}
    return draw_people(40, 1, **drawn), draw_people(40, 2, name="dev", **drawn)


HARD = replace(QUICK, widths=(64,), dropout=0.0, weight_decay=0.0, epochs=12, max_lr=1e-2, patience=99)


def scores(scorer, pairs) -> torch.Tensor:
    a, b, _ = pairs.take(np.arange(len(pairs)))
    return scorer.logits(a, b)


def dev_loss(scorer, pairs) -> float:
    return float(binary_cross_entropy_with_logits(scores(scorer, pairs), torch.from_numpy(pairs.labels).float()))


def same_layers(one, other) -> bool:
    return all(
        np.array_equal(x, y) for a, b in zip(one.layers, other.layers, strict=True) for x, y in zip(a, b, strict=True)
    )


def contradicting(pairs):
    """A hundred pairs, each with both labels."""
    rows = np.repeat(np.arange(50), 2)
    return replace(pairs.subset(rows), labels=(np.arange(100) % 2).astype(np.int8))


def test_sensible_pairs_are_memorised(train):
    assert overfit_check(train, ABSDIFF, QUICK) >= 0.99
    # The check switches dropout and weight decay off: with them it would fail.
    assert overfit_check(train, ABSDIFF, replace(QUICK, dropout=0.99, weight_decay=1e3)) >= 0.99


def test_contradicting_labels_stop_the_training_with_an_explanation(train, dev):
    message = r"overfit check: .* 50% of 100 .* 99% are needed.* cannot learn at all.*both labels.*absdiff"
    with pytest.raises(TrainingError, match=message):
        fit_network(contradicting(train), dev, ABSDIFF, QUICK)
    fit_network(contradicting(train), dev, ABSDIFF, replace(QUICK, epochs=1), checked_lr=QUICK.max_lr)


def test_images_all_alike_stop_the_training(train):
    alike = replace(train, vectors=np.repeat(train.vectors[:1], len(train.vectors), axis=0))
    with pytest.raises(TrainingError, match="images that are all alike"):
        overfit_check(alike, ABSDIFF, QUICK)


def test_range_test_curve_and_pick(train, dev):
    test = range_test(train, ABSDIFF, QUICK)
    assert len(test.rates) == len(test.losses) <= 100
    assert test.rates[0] == pytest.approx(1e-6) and test.rates[-1] <= 1
    assert np.allclose(np.diff(np.log(test.rates)), np.log(1e6) / 99)
    assert np.isfinite(test.losses).all()
    # The loss starts as that of a random guess, then falls; the pick lies before its minimum.
    assert test.losses[0] == pytest.approx(np.log(2), abs=0.15)
    assert min(test.losses) < 0.5 * test.losses[0]
    assert test.rates[0] < test.pick <= test.rates[int(np.argmin(test.losses))]
    assert 1e-4 < test.pick < 0.3
    assert range_test(train, ABSDIFF, QUICK) == test
    fit = fit_network(train, dev, ABSDIFF, replace(QUICK, max_lr=None, epochs=8))
    assert (fit.range_test, fit.max_lr) == (test, test.pick)
    assert fit.epochs[fit.best_epoch - 1].dev_auc > 0.99


def test_a_diverging_range_test_ends_early_with_finite_values(train):
    test = range_test(train, ABSDIFF, replace(QUICK, widths=(32,) * 16))
    assert len(test.rates) == len(test.losses) < 100
    assert np.isfinite(test.losses).all() and np.isfinite(test.pick)


def test_a_given_rate_skips_the_range_test_and_runs_one_cycle(train, dev):
    seen = []
    fit = fit_network(train, dev, ABSDIFF, replace(QUICK, epochs=10), seen.append)
    assert (fit.range_test, fit.max_lr) == (None, QUICK.max_lr)
    assert seen == fit.epochs and [each.epoch for each in seen] == list(range(1, 11))
    rates = [each.lr for each in seen]
    assert rates[0] == pytest.approx(QUICK.max_lr / 25)
    assert rates[3] == max(rates) == pytest.approx(QUICK.max_lr, rel=0.05)
    assert rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] < 0.1 * QUICK.max_lr
    assert seen[-1].loss < seen[0].loss
    assert seen[-1].dev_auc > 0.99 and seen[-1].dev_f1 > 0.95


def test_a_layer_for_each_width(train, dev):
    (scorer,) = fit_network(train, dev, ABSDIFF, replace(QUICK, widths=(5, 9, 3), epochs=1)).scorers
    assert scorer.widths == [SMALL, 5, 9, 3, 1]
    assert (scorer.algorithm, scorer.features) == ("network", "absdiff")
    scorer.check(SMALL)


@pytest.mark.parametrize("features", ["absdiff", "chi2+product", "concat", "cosine"])
def test_the_scorer_gives_the_scores_of_the_network(train, dev, features):
    settings = replace(QUICK, snapshots=4)
    fit = fit_network(train, dev, Features.parse(features), settings, checked_lr=QUICK.max_lr)
    # The network measured dev before its standardisation was folded into the first layer.
    for scorer in fit.scorers:
        losses = [abs(each.dev_loss - dev_loss(scorer, dev)) for each in fit.epochs]
        assert min(losses) < 1e-5
    best = fit.epochs[fit.best_epoch - 1]
    assert dev_loss(fit.scorers[0], dev) == pytest.approx(best.dev_loss, abs=1e-5)
    probability = torch.sigmoid(scores(fit.scorers[0], dev)).numpy()
    assert Curve.of(dev.labels, probability).auc() == pytest.approx(best.dev_auc, abs=1e-3)
    assert Curve.of(dev.labels, probability).best_f1()[0] == pytest.approx(best.dev_f1, abs=1e-2)


def test_the_best_epoch_is_restored(hard):
    train, dev = hard
    every = fit_network(train, dev, ABSDIFF, replace(HARD, snapshots=12))
    losses = [each.dev_loss for each in every.epochs]
    assert every.best_epoch == 1 + int(np.argmin(losses)) < 12  # afterwards it only memorised
    assert losses[-1] > min(losses) + 0.05
    one = fit_network(train, dev, ABSDIFF, HARD)
    assert (len(one.scorers), one.best_epoch) == (1, every.best_epoch)
    assert same_layers(one.scorers[0], every.scorers[0])
    assert dev_loss(one.scorers[0], dev) == pytest.approx(min(losses), abs=1e-5)


def test_training_stops_when_the_best_is_old(hard):
    train, dev = hard
    whole = fit_network(train, dev, ABSDIFF, HARD)
    fit = fit_network(train, dev, ABSDIFF, replace(HARD, patience=2))
    assert fit.best_epoch == whole.best_epoch
    assert len(fit.epochs) == fit.best_epoch + 2 < 12
    # Until then the trainings are the same: patience changes no rate.
    assert [each.dev_loss for each in fit.epochs] == [each.dev_loss for each in whole.epochs[: len(fit.epochs)]]


@pytest.mark.parametrize(("monitor", "field"), [("loss", "dev_loss"), ("auc", "dev_auc"), ("f1", "dev_f1")])
def test_the_snapshots_are_the_best_epochs_by_the_monitor_best_first(hard, monitor, field):
    train, dev = hard
    fit = fit_network(train, dev, ABSDIFF, replace(HARD, snapshots=3, monitor=monitor))
    sign = 1 if monitor == "loss" else -1
    # Ties go to the earlier epoch.
    ranked = sorted(fit.epochs, key=lambda epoch: sign * getattr(epoch, field))
    assert fit.best_epoch == ranked[0].epoch
    assert len(fit.scorers) == 3
    losses = [dev_loss(scorer, dev) for scorer in fit.scorers]
    assert losses == pytest.approx([epoch.dev_loss for epoch in ranked[:3]], abs=1e-5)


def test_more_snapshots_than_epochs(train, dev):
    assert len(fit_network(train, dev, ABSDIFF, replace(QUICK, epochs=2, snapshots=5)).scorers) == 2


def test_the_seed_decides_weights_and_order(train, dev):
    one, again, other = (fit_network(train, dev, ABSDIFF, replace(QUICK, seed=seed)).scorers[0] for seed in (3, 3, 4))
    assert same_layers(one, again) and not same_layers(one, other)


def test_a_feature_that_is_constant_in_training_does_no_harm(train, dev):
    still = replace(train, vectors=train.vectors.copy())
    still.vectors[:, 0] = 0
    (scorer,) = fit_network(still, dev, ABSDIFF, replace(QUICK, epochs=8)).scorers
    assert Curve.of(dev.labels, scores(scorer, dev).numpy()).auc() > 0.99


def test_the_error_about_a_rate_that_is_too_large(train, dev):
    wild = replace(QUICK, widths=(8,) * 6, max_lr=1e8, batch_pairs=len(train), epochs=2)
    with pytest.raises(TrainingError, match=r"loss is not finite after epoch 1; give a smaller --max-lr"):
        fit_network(train, dev, ABSDIFF, wild)


def test_one_batch_in_one_epoch(train, dev):
    fit = fit_network(train, dev, ABSDIFF, replace(QUICK, epochs=1, batch_pairs=10_000))
    assert len(fit.epochs) == 1 and np.isfinite(fit.epochs[0].dev_loss)


# The difference in MB of the peak memory of fits to 200,000 and to 50,000 pairs of 500 images.
MEASURE = """
import resource
import sys
from dataclasses import replace
import numpy as np
import torch
from people import EMBEDDING, QUICK, draw_people
from batchverify.heads.features import Features
from batchverify.training.network import fit_network
from batchverify.options import TrainOptions
from batchverify.training.fit import fit_head

def fit(pairs):
    if sys.argv[1] == "network":
        settings = replace(QUICK, epochs=1, max_lr=None)
        fit_network(pairs, dev, Features.parse("absdiff"), settings)
    else:
        fit_head(pairs, dev, EMBEDDING, TrainOptions(algorithms=("distance:cosine",), folds=0))

torch.set_num_threads(1)
few, dev = draw_people(125, 1), draw_people(20, 2, name="dev")
rng = np.random.default_rng(0)
a, b = rng.integers(0, 500, (2, 200_000)).astype(np.int32)
b = np.where(rng.random(200_000) < 0.5, a // 4 * 4 + b % 4, b)
many = replace(few, a=a, b=b, labels=(a // 4 != b // 4).astype(np.int8))
fit(many.subset(np.arange(50_000)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fit(many)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("kind", ["network", "linear"])
def test_memory_does_not_grow_with_the_pairs(kind):
    path = os.pathsep.join([str(SUPPORT), str(REPOSITORY)])
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, kind],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    # The rows of both sides of 150,000 more pairs would be 307 MB in float16, and twice that in float32.
    assert float(result.stdout) < 100


def both_orders(name: str) -> np.ndarray:
    """The features of all pairs, float64; concatenation in both orders."""
    features, (a, b, _) = Features.parse(name), PAIRS.take(np.arange(len(PAIRS)))
    values = [features(a, b)] if features.symmetric else [features(a, b), features(b, a)]
    return torch.cat(values).double().numpy()


@pytest.mark.parametrize("name", ["absdiff", "concat", "chi2+cosine"])
def test_features_are_standardised_by_the_pairs(name):
    network, values = Perceptron(PAIRS, Features.parse(name), QUICK), both_orders(name)
    np.testing.assert_allclose(network.mean, values.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(network.scale, values.std(axis=0), rtol=1e-5)


def test_the_seed_alone_decides_the_weights():
    layers = []
    for seed, state in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(state)
        network = Perceptron(PAIRS, ABSDIFF, replace(QUICK, seed=seed))
        layers.append(network.snapshot()[0][0])
    assert np.array_equal(layers[0], layers[1]) and not np.array_equal(layers[0], layers[2])


@pytest.mark.parametrize("name", ["absdiff", "concat"])
def test_a_scorer_of_its_snapshot_gives_the_same_scores(name):
    network = Perceptron(PAIRS, Features.parse(name), QUICK).eval()
    scorer, (a, b, _) = Scorer("network", name, network.snapshot()), PAIRS.take(np.arange(50))
    with torch.no_grad():
        expected = network.scores(a, b)
    assert expected.std() > 1e-3
    np.testing.assert_allclose(scorer.logits(a, b), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "times"), [("absdiff", 1), ("concat", 2)])
def test_a_pass_has_every_pair_once_or_in_both_orders(name, times):
    rng, features = np.random.default_rng(0), Features.parse(name)
    passes = [list(batches(PAIRS, features, 7, rng)) for _ in range(2)]
    first, second = (torch.cat([labels for *_, labels in each]) for each in passes)
    assert len(passes[0][0][2]) == 7 * times and len(first) == len(PAIRS) * times
    assert first.sum() == second.sum() == PAIRS.labels.sum() * times
    assert not torch.equal(first, second)
    a, b, labels = passes[0][0]
    if times == 2:
        assert torch.equal(a[:7], b[7:]) and torch.equal(a[7:], b[:7]) and torch.equal(labels[:7], labels[7:])
