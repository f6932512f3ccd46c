"""The pair head: symmetric, independent of neighbours, and its artifact whole or refused."""

import hashlib
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from batchverify.backbones import packaged_weights, stored_fingerprint
from batchverify.errors import ArtifactError, UsageError
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.head import BLOCK, METADATA_KEY, Head, default_head, default_head_name

EMBEDDING = EmbeddingFingerprint.of("ab" * 32, EmbeddingSettings())
ABOUT = {
    "version": "0.1",
    "embedding": dict(EMBEDDING.document),
    "thresholds": {
        "best_f1": 0.4,
        "different_pairs": 1200,
        "far": [
            {"far": 0.1, "threshold": 0.7, "pairs": 1200},
            {"far": 0.01, "threshold": 0.3, "pairs": 1200},
        ],
    },
}


def make_head(**changes) -> Head:
    rng = np.random.default_rng(5)
    weights = (3 + rng.normal(size=512)).astype(np.float32)
    return replace(Head("chi2", weights, -9.123456789, (1.1, 0.1), ABOUT), **changes)


def vectors(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, 512))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(a, b): b is a, more and more changed, so that the probabilities cover 0 to 1."""
    a = vectors(count)
    share = np.linspace(0, 1, count)[:, None]
    return a, (a * (1 - share) + vectors(count, 1) * share).astype(np.float16)


def test_the_score_is_the_formula():
    head, (a, b) = make_head(), pairs(30)
    probability, similarity = head(a, b)
    x, y = a.astype(np.float64), b.astype(np.float64)
    terms = (x - y) ** 2 / (abs(x) + abs(y) + 1e-6)
    logit = 1.1 * (terms @ head.weights.astype(np.float64) + head.bias) + 0.1
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-logit)), atol=1e-5)
    np.testing.assert_allclose(similarity, (x * y).sum(axis=1), atol=1e-6)
    assert probability.min() < 0.01 and probability.max() > 0.9
    assert probability.dtype == similarity.dtype == np.float32


def test_the_sides_can_be_exchanged_bit_for_bit():
    head, (a, b) = make_head(), pairs(BLOCK + 9)
    for there, back in zip(head(a, b), head(b, a), strict=True):
        assert np.array_equal(there, back)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_score_does_not_depend_on_neighbours_place_or_count(threads):
    head, (a, b) = make_head(), pairs(2 * BLOCK + 3)
    expected = np.stack(head(a, b))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        order = np.random.default_rng(2).permutation(len(a))
        assert np.array_equal(np.stack(head(a[order], b[order])), expected[:, order])
        for rows in (slice(5, 6), slice(0, 7), slice(BLOCK - 1, BLOCK + 1), slice(1000, 2050)):
            assert np.array_equal(np.stack(head(a[rows], b[rows])), expected[:, rows])
    finally:
        torch.set_num_threads(before)


def test_no_pairs_and_arrays_of_other_shapes():
    head, (a, b) = make_head(), pairs(3)
    assert [len(each) for each in head(a[:0], b[:0])] == [0, 0]
    for wrong in ((a, b[:2]), (a[:, :128], b[:, :128]), (a[0], b[0])):
        with pytest.raises(UsageError, match=r"two arrays \(N, 512\)"):
            head(*wrong)


def test_artifact_round_trip(tmp_path):
    head, (a, b) = make_head(), pairs(50)
    path = tmp_path / "head.safetensors"
    path.write_bytes(head.to_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Head.load(path)
        for fresh, loaded in zip(head(a, b), again(a, b), strict=True):
            assert np.array_equal(fresh, loaded)
    assert again.to_bytes() == head.to_bytes() == make_head().to_bytes()
    assert again.digest == head.digest != make_head(bias=-9.0).digest
    assert again.about["layers"] == [512, 1]
    again.check(EMBEDDING)


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


def changed(change) -> bytes:
    """A head's bytes after `change` of its tensors and metadata."""
    data = make_head().to_bytes()
    length = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][METADATA_KEY])
    tensors = load(data)
    change(tensors, about)
    return save(tensors, metadata={METADATA_KEY: json.dumps(about)})


DAMAGED = {
    "empty": b"",
    "cut": make_head().to_bytes()[:-100],
    "text": b"weights: 3",
    "no metadata": save({"weights": np.ones(512, np.float32), "bias": np.zeros(1, np.float32)}),
    "not json": save({"weights": np.ones(512, np.float32)}, metadata={METADATA_KEY: "hello"}),
    "a list": save(
        {"weights": np.ones(512, np.float32), "bias": np.zeros(1, np.float32)}, metadata={METADATA_KEY: "[]"}
    ),
    "a backbone": packaged_weights().read_bytes()[:300_000],
    "no bias": changed(lambda tensors, about: tensors.pop("bias")),
    "two biases": changed(lambda tensors, about: tensors.update(bias=np.zeros(2, np.float32))),
    "short weights": changed(lambda tensors, about: tensors.update(weights=np.ones(128, np.float32))),
    "nan weights": changed(lambda tensors, about: tensors.update(weights=np.full(512, np.nan, np.float32))),
    "no embedding": changed(lambda tensors, about: about.pop("embedding")),
    "no thresholds": changed(lambda tensors, about: about.pop("thresholds")),
    "thresholds of text": changed(lambda tensors, about: about["thresholds"].update(best_f1="high")),
    "nan threshold": changed(lambda tensors, about: about["thresholds"].update(best_f1=float("nan"))),
    "no rates": changed(lambda tensors, about: about["thresholds"].update(far=None)),
    "slope of text": changed(lambda tensors, about: about["calibration"].update(slope="steep")),
    "no slope": changed(lambda tensors, about: about["calibration"].pop("slope")),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_artifact_is_refused_in_one_line(what, tmp_path):
    path = tmp_path / "head.safetensors"
    path.write_bytes(DAMAGED[what])
    with pytest.raises(ArtifactError, match=r"head.safetensors: (not a head|the head holds)") as caught:
        Head.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"format": 2}, {"feature": "deep"}])
def test_a_head_of_another_version_is_named_so(change):
    with pytest.raises(ArtifactError, match=r"x: a head of another version of batchverify \(0.1\)"):
        Head.from_bytes(changed(lambda tensors, about: about.update(change)), "x")


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(ArtifactError, match="the head cannot be read"):
            Head.load(path)


def test_no_head_is_shipped_for_other_settings():
    assert default_head_name(EMBEDDING) == f"head-{EMBEDDING.id}.safetensors"
    with pytest.raises(ArtifactError, match=r"no head is shipped for these settings .*--head"):
        default_head(EMBEDDING)


def test_a_backbone_is_no_head():
    with pytest.raises(ArtifactError, match="not a head of batchverify: 'weights'"):
        Head.load(packaged_weights())


SHIPPED = sorted(packaged_weights().parent.glob("head-*.safetensors"))


def test_every_shipped_head_is_one_and_has_its_name():
    assert len(SHIPPED) == 8
    for path in SHIPPED:
        head = Head.load(path)
        assert path.name == default_head_name(head.embedding)
        assert head.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert 0 < head.threshold(at_far=0.01) < 1


@pytest.mark.parametrize(
    "settings", [{}, {"tta": "flip"}, {"crop": "center"}, {"crop": "none"}], ids=lambda each: str(each)
)
def test_the_packaged_backbone_has_a_head_for_its_settings(settings):
    fingerprint = stored_fingerprint(packaged_weights())
    embedding = EmbeddingFingerprint.of(fingerprint, EmbeddingSettings(**settings))
    head = default_head(embedding)
    head.check(embedding)
    a, b = pairs(2)
    assert head(a, a)[0].max() < head.threshold() < head(a, b)[0][1]
