"""Pair features against slow loops, and their symmetry."""

import math

import numpy as np
import pytest
import torch

from batchverify.errors import UsageError
from batchverify.heads.features import FEATURES, Feature, Features
from batchverify.kernels.loops import EPSILON

RNG = np.random.default_rng(0)
SYMMETRIC = sorted(FEATURES.keys() - {"concat"})


def unit_rows(count: int, dimension: int = 512) -> torch.Tensor:
    rows = RNG.normal(size=(count, dimension)).astype(np.float32)
    return torch.nn.functional.normalize(torch.from_numpy(rows))


def raw_size(x: float, y: float) -> float:
    """a + b, at least EPSILON from zero on its own side; zero counts as positive."""
    return min(x + y, -EPSILON) if x + y < 0 else max(x + y, EPSILON)


def chi2(x: float, y: float) -> float:
    return (x - y) ** 2 / (abs(x) + abs(y) + EPSILON)


# From a row of a and a row of b, as lists, to a row of the feature.
SLOW = {
    "concat": lambda a, b: [*a, *b],
    "absdiff": lambda a, b: [abs(x - y) for x, y in zip(a, b, strict=True)],
    "sqdiff": lambda a, b: [(x - y) ** 2 for x, y in zip(a, b, strict=True)],
    "product": lambda a, b: [x * y for x, y in zip(a, b, strict=True)],
    "chi2": lambda a, b: [chi2(x, y) for x, y in zip(a, b, strict=True)],
    "chi2raw": lambda a, b: [(x - y) ** 2 / raw_size(x, y) for x, y in zip(a, b, strict=True)],
    "cosine": lambda a, b: [sum(x * y for x, y in zip(a, b, strict=True))],
    "euclidean": lambda a, b: [math.dist(a, b)],
    "chi2sum": lambda a, b: [sum(chi2(x, y) for x, y in zip(a, b, strict=True))],
}


def slow(name: str, a: torch.Tensor, b: torch.Tensor) -> list[list[float]]:
    return [SLOW[name](*rows) for rows in zip(a.tolist(), b.tolist(), strict=True)]


@pytest.mark.parametrize("dimension", [1, 7, 512])
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_is_its_formula(name, dimension):
    a, b = unit_rows(5, dimension).double(), unit_rows(5, dimension).double()
    found = Features.parse(name)(a, b)
    np.testing.assert_allclose(found.numpy(), slow(name, a, b), rtol=1e-9, atol=1e-12)
    assert found.shape == (5, Features.parse(name).width(dimension))
    single = Features.parse(name)(a.float(), b.float())
    assert single.dtype == torch.float32
    # The raw chi-square is left out: its values near a + b = 0 have no correct digits in float32.
    if name != "chi2raw":
        np.testing.assert_allclose(single.numpy(), found.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FEATURES)
def test_zeros_and_opposite_values_are_finite(name):
    a = torch.tensor([[0.5, 0.0, -0.1, -0.2, 0.3, -0.0]]).double()
    b = torch.tensor([[-0.5, 0.0, -0.1, 0.2, 0.0, 0.0]]).double()
    found = Features.parse(name)(a, b)
    assert torch.isfinite(found).all()
    np.testing.assert_allclose(found.numpy(), slow(name, a, b), rtol=1e-12)


def test_the_raw_chi_square_keeps_its_sign_and_the_safe_one_is_bounded():
    a, b = torch.tensor([[-0.5, 0.5, 0.5]]), torch.tensor([[-0.3, 0.3, -0.4999]])
    raw, safe = (Features.parse(name)(a, b)[0].tolist() for name in ("chi2raw", "chi2"))
    assert raw[0] == -raw[1] < 0
    assert raw[2] > 1000 > 1 > safe[2] > 0
    assert safe[0] == safe[1] == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SYMMETRIC)
def test_swapped_sides_give_the_same_bits(name, kind):
    a, b = unit_rows(200).to(kind), unit_rows(200).to(kind)
    a[0], b[0] = 0, -0.0
    a[1] = -b[1]
    feature = Features.parse(name)
    assert feature.symmetric
    assert torch.equal(feature(a, b), feature(b, a))


def test_concatenation_alone_is_not_symmetric():
    a, b = unit_rows(3), unit_rows(3)
    feature = Features.parse("concat")
    assert not feature.symmetric and not Features.parse("chi2+concat").symmetric
    assert not torch.equal(feature(a, b), feature(b, a))
    assert torch.equal(feature(a, b), torch.cat([a, b], dim=1))


@pytest.mark.parametrize("names", [*FEATURES, "+".join(FEATURES)])
def test_the_embeddings_are_not_modified(names):
    a, b = unit_rows(4), unit_rows(4)
    before = a.clone(), b.clone()
    Features.parse(names)(a, b).zero_()
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_the_distance_of_equal_rows_is_zero():
    a = unit_rows(9)
    for name in ("absdiff", "sqdiff", "chi2", "chi2raw", "euclidean", "chi2sum"):
        assert (Features.parse(name)(a, a) == 0).all(), name
    np.testing.assert_allclose(Features.parse("cosine")(a, a).numpy(), 1, atol=1e-6)


def test_combinations_are_concatenated_in_the_order_named():
    a, b = unit_rows(6), unit_rows(6)
    found = Features.parse("chi2 + cosine+concat")
    assert str(found) == "chi2+cosine+concat"
    assert found.widths(512) == [512, 1, 1024] and found.width(512) == 1537
    parts = [Features.parse(name)(a, b) for name in ("chi2", "cosine", "concat")]
    assert torch.equal(found(a, b), torch.cat(parts, dim=1))
    assert Features.parse(str(found)) == found != Features.parse("cosine+chi2+concat")


def test_no_pairs_give_no_rows():
    none = torch.zeros(0, 512)
    for name, feature in FEATURES.items():
        assert Features.parse(name)(none, none).shape == (0, feature.width(512))


def test_scalar_features():
    scalars = {name for name in FEATURES if Features.parse(name).scalar}
    assert scalars == {"cosine", "euclidean", "chi2sum"}
    assert not Features.parse("cosine+euclidean").scalar
    assert Features.parse("cosine+euclidean").width(512) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("deep", "features must be one of concat, absdiff, .* joined with \\+, got 'deep'"),
        ("", "features must be .* got ''"),
        ("chi2+", "features must be .* got ''"),
        ("chi2,product", "features must be .* got 'chi2,product'"),
        ("Chi2", "features must be .* got 'Chi2'"),
        ("chi2+cosine+ chi2", "features: 'chi2' appears twice in 'chi2\\+cosine\\+ chi2'"),
    ],
)
def test_invalid_names(names, message):
    with pytest.raises(UsageError, match=message):
        Features.parse(names)


def test_every_feature_has_its_own_name():
    assert all(isinstance(each, Feature) and each.name == name for name, each in FEATURES.items())
    assert SLOW.keys() == FEATURES.keys()
