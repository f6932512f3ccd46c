"""The pair head's scores: symmetric, independent of neighbours; its thresholds; what it refuses."""

import numpy as np
import pytest
import torch
from head_samples import ABOUT, KINDS, make_head, pairs, warnings_are_errors

from batchverify.errors import ArtifactError, UsageError
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.head import BLOCK


def test_the_score_is_the_formula():
    head, (a, b) = make_head(), pairs(30)
    probability, similarity = head(a, b)
    x, y = a.astype(np.float64), b.astype(np.float64)
    terms = (x - y) ** 2 / (abs(x) + abs(y) + 1e-6)
    weight, bias = (each.astype(np.float64) for each in head.members[0].layers[0])
    logit = 1.1 * (terms @ weight[0] + bias) + 0.1
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-logit)), atol=1e-5)
    np.testing.assert_allclose(similarity, (x * y).sum(axis=1), atol=1e-6)
    assert probability.min() < 0.01 and probability.max() > 0.9
    assert probability.dtype == similarity.dtype == np.float32


def test_an_ensemble_is_the_mean_of_its_members_logits():
    head, (a, b) = make_head("ensemble", calibration=(0.7, -0.2)), pairs(40)
    x, y = (torch.from_numpy(side).float() for side in (a, b))
    logit = sum(member.logits(x, y).double().numpy() for member in head.members) / 4
    np.testing.assert_allclose(head(a, b)[0], 1 / (1 + np.exp(-(0.7 * logit - 0.2))), atol=1e-5)
    assert head.parameters == sum(member.parameters for member in head.members) + 2
    assert make_head("distance").parameters == 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_sides_can_be_exchanged_bit_for_bit(kind):
    head, (a, b) = make_head(kind), pairs(BLOCK + 9)
    assert len(np.unique(head(a, b)[0])) > BLOCK / 2
    for there, back in zip(head(a, b), head(b, a), strict=True):
        assert np.array_equal(there, back)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_does_not_depend_on_neighbours_place_count_or_threads(kind, set_threads):
    head, (a, b) = make_head(kind), pairs(2 * BLOCK + 3)
    set_threads(1)
    expected = np.stack(head(a, b))
    for threads in (1, 2, 3):
        set_threads(threads)
        for seed in range(3):
            order = np.random.default_rng(seed).permutation(len(a))
            assert np.array_equal(np.stack(head(a[order], b[order])), expected[:, order])
        for rows in (slice(5, 6), slice(0, 7), slice(BLOCK - 1, BLOCK + 1), slice(1000, 2050)):
            assert np.array_equal(np.stack(head(a[rows], b[rows])), expected[:, rows])


@pytest.mark.parametrize("kind", ["linear", "network"])
def test_arrays_of_any_layout_are_scored_alike_and_stay_as_they_are(kind):
    head, (a, b) = make_head(kind), pairs(BLOCK + 9)
    expected, before = np.stack(head(a, b)), (a.copy(), b.copy())
    a.flags.writeable = b.flags.writeable = False
    with warnings_are_errors():
        assert np.array_equal(np.stack(head(a, b)), expected)
        assert np.array_equal(np.stack(head(a[::-1], b[::-1])), expected[:, ::-1])
        a, b = (each.copy() for each in (a, b))
        assert np.array_equal(np.stack(head(a[::-1], b[::-1])), expected[:, ::-1])
        assert np.array_equal(np.stack(head(np.asfortranarray(a), b)), expected)
        assert np.array_equal(np.stack(head(a.astype(np.float32), b)), expected)
    assert np.array_equal(a, before[0]) and np.array_equal(b, before[1])


def test_no_pairs_and_arrays_of_other_shapes():
    head, (a, b) = make_head(), pairs(3)
    assert [len(each) for each in head(a[:0], b[:0])] == [0, 0]
    for wrong in ((a, b[:2]), (a[:, :128], b[:, :128]), (a[0], b[0])):
        with pytest.raises(UsageError, match=r"two arrays \(N, 512\)"):
            head(*wrong)


def test_other_embeddings_are_refused_with_what_differs():
    with pytest.raises(ArtifactError, match=r"crop.margin 44 against 14 .*--head"):
        make_head().check(EmbeddingFingerprint.of("ab" * 32, EmbeddingSettings(margin=14)))
    with pytest.raises(ArtifactError, match="backbone abababababab… against cdcdcdcdcdcd…"):
        make_head().check(EmbeddingFingerprint.of("cd" * 32, EmbeddingSettings()))


def test_thresholds():
    head = make_head()
    assert head.threshold() == 0.4
    assert head.threshold(at_far=0.01) == 0.3
    assert [head.threshold(value) for value in (0, 0.25, 1)] == [0, 0.25, 1]
    with pytest.raises(UsageError, match=r"--at-far 0.001: .* 1,200 different pairs support: 0.1, 0.01"):
        head.threshold(at_far=0.001)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="--threshold must lie between 0 and 1"):
            head.threshold(wrong)
    with pytest.raises(UsageError, match="exclude"):
        head.threshold(0.5, at_far=0.1)
    none = make_head(about={**ABOUT, "thresholds": {**ABOUT["thresholds"], "far": []}})
    with pytest.raises(UsageError, match="support: none"):
        none.threshold(at_far=0.1)
