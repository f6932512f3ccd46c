"""The network of a network head: standardised features, weights by seed, its layers as a member has them."""

import numpy as np
import pytest
import torch
from people import draw_people

from batchverify.heads.features import Features
from batchverify.heads.scorer import Member
from batchverify.perceptron import Perceptron, batches

PAIRS = draw_people(20, 1, dimension=16)


def both_orders(name: str) -> np.ndarray:
    """The features of all pairs, float64; concatenation in both orders."""
    features, (a, b, _) = Features.parse(name), PAIRS.take(np.arange(len(PAIRS)))
    values = [features(a, b)] if features.symmetric else [features(a, b), features(b, a)]
    return torch.cat(values).double().numpy()


@pytest.mark.parametrize("name", ["absdiff", "concat", "chi2+cosine"])
def test_features_are_standardised_by_the_pairs(name):
    network, values = Perceptron.fresh(PAIRS, Features.parse(name), (4,), 0.0, 0), both_orders(name)
    np.testing.assert_allclose(network.mean, values.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(network.scale, values.std(axis=0), rtol=1e-5)


def test_the_seed_alone_decides_the_weights():
    layers = []
    for seed, state in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(state)
        layers.append(Perceptron.fresh(PAIRS, Features.parse("absdiff"), (4,), 0.5, seed).snapshot()[0][0])
    assert np.array_equal(layers[0], layers[1]) and not np.array_equal(layers[0], layers[2])


@pytest.mark.parametrize("name", ["absdiff", "concat"])
def test_a_member_of_its_layers_scores_as_it_does(name):
    network = Perceptron.fresh(PAIRS, Features.parse(name), (8, 3), 0.9, 0).eval()
    member, (a, b, _) = Member("network", name, network.snapshot()), PAIRS.take(np.arange(50))
    with torch.no_grad():
        found = network.scores(a, b)
    assert found.std() > 1e-3
    np.testing.assert_allclose(member.logits(a, b), found, atol=1e-5)


@pytest.mark.parametrize(("name", "times"), [("absdiff", 1), ("concat", 2)])
def test_a_pass_has_every_pair_once_and_in_both_orders_where_they_differ(name, times):
    rng, features = np.random.default_rng(0), Features.parse(name)
    passes = [list(batches(PAIRS, features, 7, rng)) for _ in range(2)]
    first, second = (torch.cat([labels for *_, labels in each]) for each in passes)
    assert len(passes[0][0][2]) == 7 * times and len(first) == len(PAIRS) * times
    assert first.sum() == second.sum() == PAIRS.labels.sum() * times
    assert not torch.equal(first, second)
    a, b, labels = passes[0][0]
    if times == 2:
        assert torch.equal(a[:7], b[7:]) and torch.equal(a[7:], b[:7]) and torch.equal(labels[:7], labels[7:])
