"""Scorers against a slow forward pass; layers and metadata that do not fit are refused."""

import numpy as np
import pytest
import torch
from head_samples import warnings_are_errors

from batchverify.errors import UsageError
from batchverify.heads.features import Features
from batchverify.heads.scorer import LANES, Scorer, from_tensors, to_tensors

SHAPES = [
    ("cosine", ()),
    ("chi2sum+cosine", ()),
    ("chi2", ()),
    ("concat", ()),
    ("cosine", (3,)),
    ("absdiff", (7, 5)),
    ("absdiff", (1,)),
    ("product+chi2", (32, 16)),
    ("concat", (20, 1, 9)),
]


def vectors(count: int, seed: int) -> torch.Tensor:
    rows = np.random.default_rng(seed).normal(size=(count, 512)).astype(np.float32)
    return torch.nn.functional.normalize(torch.from_numpy(rows))


def make_scorer(features: str, widths: tuple[int, ...], seed: int = 0) -> Scorer:
    rng = np.random.default_rng(seed)
    layers, inputs = [], Features.parse(features).width(512)
    for outputs in (*widths, 1):
        weight, bias = rng.normal(size=(outputs, inputs)) / inputs**0.5, rng.random(outputs)
        layers.append((weight.astype(np.float32), bias.astype(np.float32)))
        inputs = outputs
    return Scorer("network", features, tuple(layers))


def slow_logits(scorer: Scorer, a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """float64, a layer at a time; the mean of both orders where they differ."""

    def forward(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
        values = Features.parse(scorer.features)(x.double(), y.double()).numpy()
        for depth, (weight, bias) in enumerate(scorer.layers):
            values = np.maximum(values, 0) if depth else values
            values = values @ weight.T.astype(np.float64) + bias
        return values[:, 0]

    return (forward(a, b) + forward(b, a)) / 2


@pytest.mark.parametrize(("features", "widths"), SHAPES, ids=str)
def test_logits_are_the_layers_with_relu_between_them(features, widths):
    scorer, a, b = make_scorer(features, widths), vectors(40, 1), vectors(40, 2)
    before = a.clone(), b.clone()
    logits = scorer.logits(a, b)
    assert logits.shape == (40,) and logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), slow_logits(scorer, a, b), atol=2e-5)
    assert logits.std() > 1e-3
    assert torch.equal(logits, scorer.logits(b, a))
    # The first call changed neither embeddings nor layers.
    assert torch.equal(logits, scorer.logits(a, b))
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_padding_is_not_part_of_the_scorer():
    scorer = make_scorer("absdiff", (LANES - 1, LANES + 1))
    scorer.logits(vectors(2, 1), vectors(2, 2))
    assert scorer.widths == [512, 15, 17, 1]
    assert scorer.parameters == 512 * 15 + 15 + 15 * 17 + 17 + 17 + 1
    assert [weight.shape for weight, _ in scorer.layers] == [(15, 512), (17, 15), (1, 17)]


def test_read_only_layers_score_alike_and_without_a_warning():
    plain, scorer = make_scorer("chi2", (3,)), make_scorer("chi2", (3,))
    for weight, bias in scorer.layers:
        weight.flags.writeable = bias.flags.writeable = False
    with warnings_are_errors():
        logits = scorer.logits(vectors(2, 1), vectors(2, 2))
    assert torch.equal(logits, plain.logits(vectors(2, 1), vectors(2, 2)))


@pytest.mark.parametrize(("features", "widths"), SHAPES, ids=str)
@pytest.mark.parametrize("slope", [2.5, -0.3, 0.0])
def test_rescaled(features, widths, slope):
    scorer, a, b = make_scorer(features, widths), vectors(20, 1), vectors(20, 2)
    before = scorer.layers[-1][0].copy()
    scaled = scorer.rescaled(slope, -1.25)
    np.testing.assert_allclose(scaled.logits(a, b), slope * scorer.logits(a, b) - 1.25, atol=1e-5)
    assert scaled.layers[:-1] == scorer.layers[:-1]
    assert scaled.layers[-1][0].dtype == scaled.layers[-1][1].dtype == np.float32
    assert np.array_equal(scorer.layers[-1][0], before)


def layer(outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones((outputs, inputs), np.float32), np.zeros(outputs, np.float32)


def test_layers_that_fit_pass_the_check():
    for features, widths in SHAPES:
        make_scorer(features, widths).check(512)
    Scorer("distance", "cosine", (layer(1, 1),)).check(128)


WRONG = {
    "no layers": ((), "without layers"),
    "too few inputs": ((layer(1, 511),), r"shapes \(1, 511\) .* for 512 inputs"),
    "layers that do not meet": ((layer(8, 512), layer(1, 7)), "for 8 inputs"),
    "two outputs": ((layer(2, 512),), "its last layer has 2 outputs, not 1"),
    "a flat weight": (((np.ones(512, np.float32), np.zeros(1, np.float32)),), r"shapes \(512,\) and"),
    "a square bias": (((np.ones((1, 512), np.float32), np.zeros((1, 1), np.float32)),), r"and \(1, 1\)"),
    "a bias of no axis": (((np.ones((1, 512), np.float32), np.array(0, np.float32)),), r"and \(\)"),
    "a bias too long": (((np.ones((1, 512), np.float32), np.zeros(2, np.float32)),), r"and \(2,\)"),
    "nan": (((np.full((1, 512), np.nan, np.float32), np.zeros(1, np.float32)),), "not finite"),
    "infinite": (((np.ones((1, 512), np.float32), np.full(1, np.inf, np.float32)),), "not finite"),
}


@pytest.mark.parametrize("what", WRONG)
def test_layers_that_do_not_fit(what):
    layers, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        Scorer("logistic", "chi2", layers).check(512)


def test_a_scalar_feature_needs_a_layer_too():
    # One input and one output: without layers the widths alone would fit.
    with pytest.raises(ValueError, match="without layers"):
        Scorer("distance", "cosine", ()).check(512)
    with pytest.raises(UsageError, match=r"features must be .* got 'deep'"):
        Scorer("logistic", "deep", (layer(1, 512),)).check(512)


def test_tensors_and_back():
    scorers = [make_scorer(features, widths, seed) for seed, (features, widths) in enumerate(SHAPES)]
    tensors = to_tensors(scorers)
    assert len(tensors) == sum(2 * len(scorer.layers) for scorer in scorers)
    assert tensors["8.2.bias"].shape == (9,)
    again = from_tensors(tensors, [scorer.about() for scorer in scorers])
    for scorer, loaded in zip(scorers, again, strict=True):
        assert scorer.about() == loaded.about()
        for mine, its in zip(scorer.layers, loaded.layers, strict=True):
            assert np.array_equal(mine[0], its[0]) and np.array_equal(mine[1], its[1])


@pytest.mark.parametrize(
    ("listed", "error"),
    [
        ([{"algorithm": "x", "features": "chi2"}], LookupError),
        ([{"algorithm": "x", "features": "chi2", "widths": [512, 4, 1]}], LookupError),
        ([{"algorithm": "x", "features": "chi2", "widths": 512}], TypeError),
        ([{"algorithm": "x", "features": "chi2", "widths": [512]}], ValueError),
        ([], ValueError),
        (["chi2"], TypeError),
        (None, TypeError),
    ],
)
def test_metadata_that_does_not_fit_the_tensors(listed, error):
    with pytest.raises(error):
        from_tensors(to_tensors([make_scorer("chi2", ())]), listed)
