"""Fitting a head on synthetic people, and gathering pairs from a manifest."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from batchverify.errors import ManifestError, UsageError
from batchverify.features import chi_square
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.gallery import Gallery
from batchverify.head import Head
from batchverify.manifest import Manifest
from batchverify.records import Reason, Skipped
from batchverify.training import MOST_STRANGERS, LabelledPairs, fit_head, fit_weights

EMBEDDING = EmbeddingFingerprint.of("ab" * 32, EmbeddingSettings())


def draw_pairs(count: int, seed: int, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, labels), float16 unit rows: same pairs share a direction but for `noise`; half are different."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    people = rng.normal(size=(2, count, 512))
    a = people[0] + noise * rng.normal(size=(count, 512))
    b = people[labels, np.arange(count)] + noise * rng.normal(size=(count, 512))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return a.astype(np.float16), b.astype(np.float16), labels.astype(np.int8)


def fit(train=None, dev=None, strangers=None, about=None) -> Head:
    a, b, _ = draw_pairs(600, 3)
    return fit_head(
        train or draw_pairs(300, 1),
        dev or draw_pairs(100, 2),
        strangers or (a[1::2], b[1::2]),
        EMBEDDING,
        about or {"data": "synthetic", "training": {"left_out": 4}},
    )


def test_separable_pairs_are_separated():
    head = fit()
    a, b, labels = draw_pairs(400, 9)
    probability = head(a, b)[0]
    assert roc_auc_score(labels, probability) == 1
    assert ((probability >= head.threshold()) == labels).all()
    assert probability[labels == 0].max() < 0.2 and probability[labels == 1].min() > 0.8


def test_the_same_pairs_give_the_same_bytes_whatever_the_threads():
    first = fit().to_bytes()
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        assert fit().to_bytes() == first
    finally:
        torch.set_num_threads(before)


def test_what_the_artifact_tells():
    head = Head.from_bytes(fit().to_bytes(), "x")
    about = head.about
    assert about["data"] == "synthetic"
    assert about["training"] == {"left_out": 4, "pairs": 300, "shrinkage": 1.0}
    assert about["dev"]["auc"] == 1 and about["dev"]["pairs"] == 100
    assert about["dev"]["threshold"] == about["thresholds"]["best_f1"] == head.threshold()
    # 300 strangers support one false accept in ten, and no rarer one.
    assert about["thresholds"]["different_pairs"] == 300
    assert [each["far"] for each in about["thresholds"]["far"]] == [0.1]
    assert head.embedding.id == EMBEDDING.id


def test_pairs_that_overlap_give_calibrated_probabilities():
    a, b, labels = draw_pairs(2000, 4, noise=3.0)
    head = fit(train=(a, b, labels), dev=draw_pairs(2000, 5, noise=3.0))
    probability = head(a, b)[0]
    # The optimum of a logistic regression with a free bias: the mean probability is the share of ones.
    assert probability.mean() == pytest.approx(0.5, abs=2e-3)
    assert 0.6 < head.about["dev"]["auc"] < 0.99
    # With all terms weighted alike it would be this regression; weights of their own may not spoil it.
    total = chi_square(torch.from_numpy(a).double(), torch.from_numpy(b).double()).sum(dim=1).numpy()[:, None]
    plain = LogisticRegression(C=1e6).fit(total, labels).predict_proba(total)[:, 1]
    assert np.corrcoef(plain, probability)[0, 1] > 0.9
    assert roc_auc_score(labels, probability) >= roc_auc_score(labels, plain) - 1e-3


def test_what_cannot_be_learned_from_is_refused():
    a, b, labels = draw_pairs(20, 6)
    with pytest.raises(UsageError, match="training pairs need label 0 and label 1: of 20 pairs 20 are same"):
        fit(train=(a, b, labels * 0))
    with pytest.raises(UsageError, match=r"dev pairs need .* of 0 pairs"):
        fit(dev=(a[:0], b[:0], labels[:0]))
    with pytest.raises(UsageError, match="training pairs need"):
        fit(train=(a, b, labels - 1))
    for side in (a, b):
        side[3, 100] = np.nan
        with pytest.raises(UsageError, match="training pairs hold embeddings that are not finite"):
            fit(train=(a, b, labels))
        side[3, 100] = np.inf
        with pytest.raises(UsageError, match="dev pairs hold"):
            fit(dev=(a, b, labels))
        side[3, 100] = 0


def test_pairs_all_alike_are_refused():
    a = np.ones((4, 512), np.float16)
    with pytest.raises(UsageError, match="cannot be told apart"):
        fit_weights(a, a, np.array([0, 1, 0, 1]))


def collect(tmp_path, text: str, failed: tuple[int, ...] = ()) -> tuple[LabelledPairs, Gallery]:
    """The pairs of a CSV whose images have vectors that hold their own index, but for those that failed."""
    (tmp_path / "pairs.csv").write_text(text)
    manifest = Manifest.open(tmp_path / "pairs.csv")
    scan = manifest.scan()
    gallery = Gallery(len(scan.images))
    for index in range(len(scan.images)):
        if index in failed:
            gallery.fail(index, Skipped(Reason.NO_FACE))
        else:
            gallery.put(index, np.full(512, index, np.float16))
    return LabelledPairs.collect(manifest.blocks(scan), gallery), gallery


# r1 is of nobody known.
MANIFEST = """image_a,image_b,label,person_a,person_b
p1.jpg,p2.jpg,0,P,P
p1.jpg,q1.jpg,1,P,Q
p2.jpg,q1.jpg,,P,Q
q1.jpg,r1.jpg,1,Q,
r1.jpg,p3.jpg,1,,P
p3.jpg,q2.jpg,1,P,Q
"""


def index_of(tmp_path) -> dict[str, int]:
    scan = Manifest.open(tmp_path / "pairs.csv").scan()
    return {str(path).rpartition("/")[2]: index for index, path in enumerate(scan.images.references)}


def test_blank_labels_and_failed_images_are_left_out_and_counted(tmp_path):
    collect(tmp_path, MANIFEST)
    index = index_of(tmp_path)
    pairs, gallery = collect(tmp_path, MANIFEST, failed=(index["q2.jpg"],))
    assert pairs.left_out == 2
    assert pairs.labels.tolist() == [0, 1, 1, 1]
    assert pairs.a.tolist() == [index[name] for name in ("p1.jpg", "p1.jpg", "q1.jpg", "r1.jpg")]
    a, b, labels = pairs.vectors(gallery)
    assert a[:, 0].tolist() == pairs.a.tolist() and b[:, 511].tolist() == pairs.b.tolist()
    assert labels is pairs.labels


def test_strangers_are_all_pairs_of_two_known_people(tmp_path):
    collect(tmp_path, MANIFEST)
    index = index_of(tmp_path)
    pairs, gallery = collect(tmp_path, MANIFEST, failed=(index["q2.jpg"],))
    a, b = pairs.strangers(gallery)
    # P's three images against Q's one; r1 is of nobody known, q2 has no vector.
    found = {frozenset(couple) for couple in zip(a[:, 0].tolist(), b[:, 0].tolist(), strict=True)}
    assert found == {frozenset({index[name], index["q1.jpg"]}) for name in ("p1.jpg", "p2.jpg", "p3.jpg")}
    assert len(a) == 3


def test_without_persons_the_labelled_different_pairs_are_the_strangers(tmp_path):
    text = "image_a,image_b,label\na.jpg,b.jpg,0\na.jpg,c.jpg,1\nb.jpg,c.jpg,\n"
    pairs, gallery = collect(tmp_path, text)
    a, b = pairs.strangers(gallery)
    assert (len(a), pairs.persons, pairs.left_out) == (1, {}, 1)
    assert (a[0, 0], b[0, 0]) == (pairs.a[1], pairs.b[1])


def test_strangers_of_many_images_are_a_fixed_draw(tmp_path):
    rows = [f"{n}a.jpg,{n}b.jpg,0,{n},{n}\n" for n in range(MOST_STRANGERS)]
    pairs, gallery = collect(tmp_path, "image_a,image_b,label,person_a,person_b\n" + "".join(rows))
    gallery.vectors = gallery.vectors[:, :2]  # for the test's memory alone
    a, b = pairs.strangers(gallery)
    assert MOST_STRANGERS * (MOST_STRANGERS - 2) / 2 <= len(a) <= MOST_STRANGERS * (MOST_STRANGERS - 1) / 2
    assert len(np.unique(np.concatenate([a, b])[:, 0])) == MOST_STRANGERS
    assert np.array_equal(pairs.strangers(gallery)[1], b)


def test_a_manifest_without_labels(tmp_path):
    with pytest.raises(ManifestError, match="no column 'label'"):
        collect(tmp_path, "image_a,image_b\na.jpg,b.jpg\n")
