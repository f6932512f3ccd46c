"""Estimator specs (`--algorithm`): parsing, defaults, and the fit of each algorithm."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from people import draw_people

from batchverify.errors import UsageError
from batchverify.evaluation.figures import Curve
from batchverify.options import ALGORITHMS, TrainOptions
from batchverify.training.fit import EstimatorSpec, estimator_specs

NETWORK: dict[str, Any] = {"widths": (16,), "dropout": 0.1, "epochs": 4, "max_lr": 1e-2, "snapshots": 2}
SMALL = 32


@pytest.fixture(scope="module")
def train():
    return draw_people(40, 1, dimension=SMALL)


@pytest.fixture(scope="module")
def dev():
    return draw_people(20, 2, name="dev", dimension=SMALL)


@pytest.mark.parametrize(
    ("text", "features", "expected"),
    [
        ("distance", None, "distance:chi2sum"),
        ("distance:cosine", None, "distance:cosine"),
        ("distance", "euclidean", "distance:euclidean"),
        ("logistic", None, "logistic:chi2"),
        ("logistic", "chi2+product", "logistic:chi2+product"),
        # A spec's own features take precedence over `--features`.
        ("logistic:sqdiff", "chi2+product", "logistic:sqdiff"),
        ("weighted-chi2", None, "weighted-chi2:chi2"),
        ("weighted-chi2:chi2raw", None, "weighted-chi2:chi2raw"),
        ("network:concat", None, "network:concat"),
        ("network:", None, "network:absdiff"),
    ],
)
def test_names(text, features, expected):
    spec = EstimatorSpec.parse(text, features)
    assert str(spec) == expected
    assert EstimatorSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "features", "message"),
    [
        ("svm", None, "--algorithm must be one of distance, logistic, weighted-chi2, network, got 'svm'"),
        ("", None, "--algorithm must be one of"),
        ("Logistic", None, "got 'Logistic'"),
        ("logistic:chi3", None, "features must be one of concat, .* got 'chi3'"),
        ("logistic", "chi2+", "features must be one of .* got ''"),
        ("network:absdiff+absdiff", None, "'absdiff' appears twice"),
        ("distance:absdiff", None, "distance takes one of cosine, euclidean and chi2sum, got 'absdiff'"),
        ("distance", "chi2", "distance takes one of"),
        ("distance:cosine+euclidean", None, r"distance takes one of .* got 'cosine\+euclidean'"),
        ("weighted-chi2:product", None, "weighted-chi2 takes chi2 or chi2raw, got 'product'"),
    ],
)
def test_invalid_names(text, features, message):
    with pytest.raises(UsageError, match=message):
        estimator_specs(TrainOptions(algorithms=(text,), features=features))


def test_a_spec_that_appears_twice_is_refused():
    with pytest.raises(UsageError, match="--algorithm network:absdiff appears twice"):
        estimator_specs(TrainOptions(algorithms=("network", "logistic", "network:absdiff")))
    several = estimator_specs(TrainOptions(algorithms=("network", "network:sqdiff", "distance")))
    assert [str(each) for each in several] == ["network:absdiff", "network:sqdiff", "distance:chi2sum"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_fits_and_its_scores_are_the_mean_of_its_scorers(train, dev, algorithm):
    fit = EstimatorSpec.parse(algorithm).fit(train, dev, TrainOptions(**NETWORK))
    assert len(fit.scorers) == (2 if algorithm == "network" else 1)
    assert (fit.network is not None) == (algorithm == "network")
    assert {scorer.algorithm for scorer in fit.scorers} == {algorithm}
    scores = fit.scores(dev)
    assert Curve.of(dev.labels, scores).auc() > 0.95
    a, b, _ = dev.take(np.arange(len(dev)))
    mean = sum(scorer.logits(a, b) for scorer in fit.scorers) / len(fit.scorers)
    assert np.allclose(scores, mean.numpy(), atol=1e-5) and scores.dtype == np.float64
    assert fit.scores(dev.subset(np.zeros(0, int))).shape == (0,)


def test_scores_of_more_pairs_than_a_block_are_in_order(train, dev):
    fit = EstimatorSpec.parse("distance:cosine").fit(train, dev, TrainOptions())
    rows = np.random.default_rng(0).integers(0, len(dev), 10_000)
    assert np.array_equal(fit.scores(dev.subset(rows)), fit.scores(dev)[rows])


def test_the_weighted_chi_square_is_fitted_with_its_own_loss_and_shrinkage_is_passed_on(train, dev):
    def weights(text: str, **options) -> np.ndarray:
        return EstimatorSpec.parse(text).fit(train, dev, TrainOptions(**options)).scorers[0].layers[0][0]

    assert not np.allclose(weights("weighted-chi2"), weights("logistic:chi2"), rtol=1e-2)
    # Strong shrinkage leaves all terms of a feature the same weight.
    assert np.ptp(weights("logistic", shrinkage=1e8)) < 1e-3 * abs(weights("logistic", shrinkage=1e8).mean())
    assert np.ptp(weights("logistic", shrinkage=1.0)) > 0.01 * abs(weights("logistic", shrinkage=1.0).mean())


def test_a_network_that_is_checked_already_takes_the_given_rate(train, dev):
    spec, seen = EstimatorSpec.parse("network:sqdiff"), []
    options = TrainOptions(**{**NETWORK, "max_lr": None})
    # Contradicting labels would not pass the overfit check.
    contradicting = replace(train.subset(np.repeat(np.arange(50), 2)), labels=(np.arange(100) % 2).astype(np.int8))
    fit = spec.fit(contradicting, dev, options, lambda *epoch: seen.append(epoch), checked_lr=1e-3)
    assert (fit.network.range_test, fit.network.max_lr) == (None, 1e-3)
    assert seen == [("network:sqdiff", epoch) for epoch in fit.network.epochs]
    whole = spec.fit(train, dev, options)
    assert whole.network.range_test.pick == whole.network.max_lr


def test_fits_leave_gradients_off(train, dev):
    assert torch.is_grad_enabled()
    EstimatorSpec.parse("network").fit(train, dev, TrainOptions(**NETWORK)).scores(dev)
    assert torch.is_grad_enabled()
