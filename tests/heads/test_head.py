"""The pair head: symmetric scores that do not depend on neighbours, thresholds, and refused artifacts."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from head_samples import ABOUT, EMBEDDING, KINDS, make_head, pairs, warnings_are_errors
from repository import PACKAGE
from safetensors.numpy import load, save

from batchverify.embedding.backbone import packaged_weights, stored_fingerprint
from batchverify.errors import ArtifactError, UsageError
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.heads.head import (
    BLOCK,
    METADATA_KEY,
    MOST_BYTES,
    Head,
    default_head,
    default_head_name,
    find_head,
)


def test_the_score_is_the_formula():
    head, (a, b) = make_head(), pairs(30)
    probability, similarity = head(a, b)
    x, y = a.astype(np.float64), b.astype(np.float64)
    terms = (x - y) ** 2 / (abs(x) + abs(y) + 1e-6)
    weight, bias = (each.astype(np.float64) for each in head.scorers[0].layers[0])
    logit = 1.1 * (terms @ weight[0] + bias) + 0.1
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-logit)), atol=1e-5)
    cosine = np.where((x == y).all(axis=1), 1, (x * y).sum(axis=1))
    np.testing.assert_allclose(similarity, cosine, atol=1e-6)
    assert probability.min() < 0.01 and probability.max() > 0.9
    assert probability.dtype == similarity.dtype == np.float32


def test_an_ensemble_is_the_mean_of_its_scorers_logits():
    head, (a, b) = make_head("ensemble", calibration=(0.7, -0.2)), pairs(40)
    x, y = (torch.from_numpy(side).float() for side in (a, b))
    logit = sum(scorer.logits(x, y).double().numpy() for scorer in head.scorers) / 4
    np.testing.assert_allclose(head(a, b)[0], 1 / (1 + np.exp(-(0.7 * logit - 0.2))), atol=1e-5)
    assert head.parameters == sum(scorer.parameters for scorer in head.scorers) + 2
    assert make_head("distance").parameters == 4


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_sides_give_the_same_bits(kind):
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
def test_a_score_does_not_depend_on_neighbours_position_count_or_threads(kind, set_threads):
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
def test_arrays_of_any_layout_are_scored_alike_and_not_modified(kind):
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


@pytest.mark.parametrize("kind", KINDS)
def test_similarities_lie_between_minus_1_and_1_though_rounded_rows_are_longer_or_shorter(kind):
    """An image beside itself, or beside another file of the same pixels, has 1."""
    head, (a, _) = make_head(kind), pairs(BLOCK + 9)
    rows = np.arange(len(a))
    squares = (a.astype(np.float32) ** 2).sum(axis=1)
    assert squares.min() < 0.99995 and squares.max() > 1.00005
    for b, expected in ((a, np.ones(len(a))), (-a, -np.minimum(squares, 1))):
        for _, similarity in (head(a, b), head.score_pairs(np.concatenate([a, b]), rows, rows + len(a))):
            np.testing.assert_allclose(similarity, expected, atol=1e-6)
            assert abs(similarity).max() == 1
    assert (head.score_pairs(a, rows, rows)[1] == 1).all()


def test_probabilities_follow_from_the_cosine_before_it_is_cut_off():
    head, (a, _) = make_head("cosine"), pairs(40)
    ((weight, bias),) = head.scorers[0].layers
    squares = (a.astype(np.float64) ** 2).sum(axis=1)
    logits = 1.1 * (squares * weight[0, 0] + bias[0]) + 0.1
    np.testing.assert_allclose(head(a, a)[0], 1 / (1 + np.exp(-logits)), rtol=1e-5)


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


@pytest.mark.parametrize("own", [{}, {"face": "largest"}, {"min_face": 40}])
@pytest.mark.parametrize("chosen", [{}, {"face": "probable"}, {"min_face": 20}])
def test_another_choice_of_the_face_fits_and_is_said(own, chosen, caplog):
    embedding = EmbeddingFingerprint.of("ab" * 32, EmbeddingSettings(**own))
    head = make_head(about={**ABOUT, "embedding": dict(embedding.document)})
    head.check(EmbeddingFingerprint.of("ab" * 32, EmbeddingSettings(**chosen)))
    said = [text for text in caplog.messages if "measured with another choice of the face: crop." in text]
    assert len(said) == len(caplog.messages) == (own != chosen)
    with pytest.raises(ArtifactError, match=r"crop\.margin 44 against 14"):
        head.check(EmbeddingFingerprint.of("ab" * 32, EmbeddingSettings(margin=14, **chosen)))


def test_the_shipped_head_is_found_whichever_face_is_taken(caplog):
    backbone = stored_fingerprint(packaged_weights())
    for tta in ("none", "flip"):
        usual = default_head(EmbeddingFingerprint.of(backbone, EmbeddingSettings(tta=tta)))
        for changes in ({"face": "largest"}, {"face": "probable"}, {"min_face": 40}):
            embedding = EmbeddingFingerprint.of(backbone, EmbeddingSettings(tta=tta, **changes))
            assert default_head(embedding).digest == usual.digest
            assert find_head(None, embedding).digest == usual.digest
    assert len(caplog.messages) == 6


def test_thresholds():
    head = make_head()
    assert head.threshold() == 0.4
    assert head.threshold(at_far=0.01) == 0.3
    assert [head.threshold(value) for value in (0, 0.25, 1)] == [0, 0.25, 1]
    with pytest.raises(UsageError, match=r"--at-far 0.001: .* 1,200 different pairs support 0.1, 0.01"):
        head.threshold(at_far=0.001)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="--threshold must lie between 0 and 1"):
            head.threshold(wrong)
    with pytest.raises(UsageError, match="exclude"):
        head.threshold(0.5, at_far=0.1)
    none = make_head(about={**ABOUT, "thresholds": {**ABOUT["thresholds"], "far": []}})
    with pytest.raises(UsageError, match="support none"):
        none.threshold(at_far=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_artifact_round_trip(kind, tmp_path):
    head, (a, b) = make_head(kind), pairs(50)
    path = tmp_path / "head.safetensors"
    path.write_bytes(head.to_bytes())
    with warnings_are_errors():
        again = Head.load(path)
        for fresh, loaded in zip(head(a, b), again(a, b), strict=True):
            assert np.array_equal(fresh, loaded)
    assert again.to_bytes() == head.to_bytes() == make_head(kind).to_bytes()
    assert again.digest == head.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert head.digest != make_head(kind, calibration=(1.1, 0.2)).digest
    assert again.calibration == (1.1, 0.1)
    assert [each["features"] for each in again.about["members"]] == [features for features, _ in KINDS[kind]]
    assert [each["widths"] for each in again.about["members"]] == [each.widths for each in head.scorers]
    again.check(EMBEDDING)


def test_other_entries_of_the_calibration_are_kept():
    about = {**ABOUT, "calibration": {"before": {"ece": 0.2}, "slope": 99.0}}
    again = Head.from_bytes(make_head(about=about).to_bytes(), "x")
    assert again.about["calibration"] == {"before": {"ece": 0.2}, "slope": 1.1, "offset": 0.1}


def changed(change) -> bytes:
    """A head's bytes after `change` of its tensors and metadata."""
    data = make_head().to_bytes()
    length = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][METADATA_KEY])
    tensors = load(data)
    change(tensors, about)
    return save(tensors, metadata={METADATA_KEY: json.dumps(about)})


def damaged_scorer(**tensors) -> bytes:
    """A head with other tensors: `weight` and `bias` of its one layer, or another by its name."""
    return changed(lambda layers, about: layers.update({f"0.0.{name}": x for name, x in tensors.items()}))


def damaged(*path, **changes) -> bytes:
    """A head with other metadata at a path of keys."""

    def change(_, about):
        for key in path:
            about = about[key]
        about.update(changes)

    return changed(change)


DEEP = b"[" * 200_000


def header(name: str, shape: list[int], offsets: list[int]) -> bytes:
    """A safetensors file whose header announces one tensor of 2,048 bytes."""
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    about = {"__metadata__": {METADATA_KEY: json.dumps({"format": 2})}, name: tensor}
    text = json.dumps(about).encode()
    return len(text).to_bytes(8, "little") + text + bytes(offsets[1])


ONE = {"0.0.weight": np.ones((1, 512), np.float32), "0.0.bias": np.zeros(1, np.float32)}
TAIL = {"pairs": 9, "ranks": [1], "scores": [0.5]}
BOUNDS = {"unit": "people", "different": TAIL, "same": TAIL}
DAMAGED = {
    "empty": b"",
    "cut": make_head().to_bytes()[:-100],
    "text": b"weights: 3",
    "no metadata": save(ONE),
    "not json": save(ONE, metadata={METADATA_KEY: "hello"}),
    "a list": save(ONE, metadata={METADATA_KEY: "[]"}),
    "deep brackets": save(ONE, metadata={METADATA_KEY: "[" * 100_000}),
    "a backbone": packaged_weights().read_bytes()[:300_000],
    "no bias": changed(lambda tensors, about: tensors.pop("0.0.bias")),
    "no weight": changed(lambda tensors, about: tensors.pop("0.0.weight")),
    "two biases": damaged_scorer(bias=np.zeros(2, np.float32)),
    "a square bias": damaged_scorer(bias=np.zeros((1, 1), np.float32)),
    "flat weights": damaged_scorer(weight=np.ones(512, np.float32)),
    "short weights": damaged_scorer(weight=np.ones((1, 128), np.float32)),
    "nan weights": damaged_scorer(weight=np.full((1, 512), np.nan, np.float32)),
    "weights that overflow": damaged_scorer(weight=np.full((1, 512), 1e37, np.float32)),
    "a bias that overflows": damaged_scorer(bias=np.full(1, 2e38, np.float32)),
    "infinite bias": damaged_scorer(bias=np.full(1, np.inf, np.float32)),
    "a tensor too many": damaged_scorer(other=np.zeros(1, np.float32)),
    "no embedding": changed(lambda tensors, about: about.pop("embedding")),
    "no dimension": changed(lambda tensors, about: about["embedding"].pop("dimension")),
    "another dimension": damaged("embedding", dimension=128),
    "no scorers": damaged(members=[]),
    "a scorer without layers": damaged("members", 0, widths=[512]),
    "a scorer with more layers": damaged("members", 0, widths=[512, 64, 1]),
    "a scorer of text": damaged(members=["chi2"]),
    "scorers of nothing": damaged(members=None),
    "unknown features": damaged("members", 0, features="deep"),
    "other features": damaged("members", 0, features="concat"),
    "no thresholds": changed(lambda tensors, about: about.pop("thresholds")),
    "thresholds of text": damaged("thresholds", best_f1="high"),
    "nan threshold": damaged("thresholds", best_f1=float("nan")),
    "a threshold above 1": damaged("thresholds", best_f1=1.5),
    "a rate's threshold below 0": damaged("thresholds", far=[{"far": 0.1, "threshold": -1, "pairs": 9}]),
    "infinite pairs": damaged("thresholds", different_pairs=float("inf")),
    "bounds of nothing": damaged("thresholds", bounds=None),
    "bounds without tails": damaged("thresholds", bounds={"unit": "people"}),
    "bounds of planets": damaged("thresholds", bounds={**BOUNDS, "unit": "planets"}),
    "bounds beyond 1": damaged("thresholds", bounds={**BOUNDS, "same": {**TAIL, "scores": [1.5]}}),
    "a number beyond floats": damaged("thresholds", best_f1=10**400),
    "no rates": damaged("thresholds", far=None),
    "slope of text": damaged("calibration", slope="steep"),
    "infinite slope": damaged("calibration", slope=float("inf")),
    "doubles": damaged_scorer(weight=np.ones((1, 512), np.float64)),
    "half floats": damaged_scorer(bias=np.zeros(1, np.float16)),
    "whole numbers": damaged_scorer(weight=np.ones((1, 512), np.int32)),
    "a dimension of text": damaged("embedding", dimension="512"),
    "a dimension without end": damaged("embedding", dimension=10**12),
    "a huge string": damaged(note="x" * 5_000_000),
    "a huge name": damaged("members", 0, features="chi2" * 10_000),
    "many scorers": damaged(members=[{"algorithm": "", "features": "", "widths": [1]}] * 100_000),
    "deep metadata": damaged(note=json.loads("[" * 500 + "]" * 500)),
    "one name twice": save(ONE, metadata={METADATA_KEY: '{"format": 2, "format": 2}'}),
    "a billion values": header("0.0.weight", [10**9], [0, 2048]),
    "a shape beyond memory": header("0.0.weight", [10**9, 10**9], [0, 2048]),
    "a shape of nothing": header("0.0.weight", [0, 10**18], [0, 0]),
    "a length beyond the file": (1 << 62).to_bytes(8, "little") + b"{}",
    "a header of brackets": len(DEEP).to_bytes(8, "little") + DEEP,
    "no slope": changed(lambda tensors, about: about["calibration"].pop("slope")),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_artifact_is_refused_in_one_line(what, tmp_path):
    path = tmp_path / "head.safetensors"
    path.write_bytes(DAMAGED[what])
    with pytest.raises(ArtifactError, match=r"head.safetensors: not a head of batchverify: ") as caught:
        Head.load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_damaged_artifacts_take_no_memory(tmp_path):
    for name, data in DAMAGED.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    # The shapes above would take exabytes; a gigabyte lets numpy and torch be imported.
    code = (
        "import resource, sys; from pathlib import Path; from batchverify.heads.head import Head\n"
        "from batchverify.errors import ArtifactError\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))\n"
        "for path in Path(sys.argv[1]).iterdir():\n"
        "    try: Head.load(path)\n"
        "    except ArtifactError: continue\n"
        "    print(path)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_a_file_larger_than_any_head_is_not_read(tmp_path):
    path = tmp_path / "head.safetensors"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ArtifactError, match=r"the head cannot be read: .*1,073,741,825 bytes, the limit is"):
        Head.load(path)


@pytest.mark.parametrize("other", [1, 3, "2", None])
def test_the_error_about_another_format_names_the_version(other):
    with pytest.raises(
        ArtifactError,
        match=r"^x: the head has format \S+ \(batchverify 0.1\), .* reads format 2: train it again$",
    ):
        Head.from_bytes(damaged(format=other), "x")


def test_an_absent_file_and_a_folder(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(ArtifactError, match="the head cannot be read"):
            Head.load(path)


def test_no_head_is_shipped_for_other_settings():
    assert default_head_name(EMBEDDING) == f"head-{EMBEDDING.id}.safetensors"
    with pytest.raises(ArtifactError, match=r"no head is shipped for these settings .*--head"):
        default_head(EMBEDDING)


def test_a_backbone_is_not_a_head():
    with pytest.raises(ArtifactError, match="not a head of batchverify: it has no 'version'"):
        Head.load(packaged_weights())


SHIPPED = sorted((PACKAGE / "heads" / "weights").glob("head-*.safetensors"))


def test_every_shipped_head_loads_and_has_the_right_name():
    # Four of each form of InceptionResnetV1, two of the compact network.
    assert len(SHIPPED) == 10
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
