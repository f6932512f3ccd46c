"""The head of several backbones: the sum of the calibrated logits, by every backbone that has both vectors."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from head_samples import ABOUT, make_head, vectors
from repository import PACKAGE
from safetensors.numpy import load, save

from batchverify.errors import ArtifactError
from batchverify.fingerprint import BackboneSpec, EmbeddingFingerprint, EmbeddingSettings
from batchverify.heads.fused_head import FusedHead, combination_key, find_fused_head, fused_head_name
from batchverify.heads.head import METADATA_KEY, Head, read_metadata

SETTINGS = EmbeddingSettings(crop="none")
EMBEDDINGS = [EmbeddingFingerprint.of(BackboneSpec(name), SETTINGS) for name in ("first", "second", "third")]
KINDS = ("distance", "cosine", "linear")
SLOPES = {(0, 1): (0.6, 0.1), (0, 2): (0.7, -0.2), (1, 2): (0.8, 0.3), (0, 1, 2): (0.5, 0.05)}


def fused(count: int = 3) -> FusedHead:
    members = tuple(
        make_head(kind, about={**ABOUT, "embedding": dict(embedding.document)})
        for kind, embedding in zip(KINDS[:count], EMBEDDINGS, strict=False)
    )
    calibrations = {
        combination_key([EMBEDDINGS[number] for number in chosen]): calibration
        for chosen, calibration in SLOPES.items()
        if max(chosen) < count
    }
    whole = EmbeddingFingerprint.fused(EMBEDDINGS[:count])
    return FusedHead(members, calibrations, {**ABOUT, "embedding": dict(whole.document)})


def test_scores_are_those_of_the_backbones_that_have_both_vectors():
    head, rng = fused(), np.random.default_rng(0)
    known = rng.random((3, 80)) < 0.7
    tables = [vectors(80, seed) for seed in range(3)]
    for table in tables:
        table[1::2] = (table[::2] + table[1::2] / 3).astype(np.float16)
    a, b = np.arange(79), np.arange(1, 80)
    usable = (known[:, a] & known[:, b]).any(axis=0)
    a, b = a[usable], b[usable]
    probability, similarity = head.score_pairs(list(zip(tables, known, strict=True)), a, b)
    combinations = set()
    for row, (i, j) in enumerate(zip(a, b, strict=True)):
        makers = tuple(k for k in range(3) if known[k, i] and known[k, j])
        singles = [head.members[k](tables[k][[i]], tables[k][[j]]) for k in makers]
        shares = [float(single[0][0]) for single in singles]
        slope, offset = SLOPES.get(makers, (1.0, 0.0))
        logit = slope * sum(np.log(p / (1 - p)) for p in shares) + offset
        assert abs(probability[row] - 1 / (1 + np.exp(-logit))) < 1e-4
        assert abs(similarity[row] - np.mean([single[1][0] for single in singles])) < 1e-6
        combinations.add(makers)
    assert len(combinations) == 7
    some = np.arange(0, len(a), 3)
    again = head.score_pairs(list(zip(tables, known, strict=True)), a[some], b[some])
    assert (again[0] == probability[some]).all() and (again[1] == similarity[some]).all()


def test_the_artifact_is_the_same_whatever_the_order():
    head = fused()
    turned = head.arranged(EMBEDDINGS[::-1])
    assert [member.embedding for member in turned.members] == EMBEDDINGS[::-1]
    assert turned.to_bytes() == head.to_bytes() and turned.digest == head.digest
    read = FusedHead.from_bytes(head.to_bytes(), "x").arranged(EMBEDDINGS)
    assert read.calibrations == head.calibrations and read.threshold() == 0.4
    assert read.threshold(at_far=0.1) == 0.7 and read.to_bytes() == head.to_bytes()
    assert [member.digest for member in read.members] == [member.digest for member in head.members]


def test_a_head_fits_its_backbones_alone(tmp_path):
    path, single = tmp_path / "fused.safetensors", tmp_path / "single.safetensors"
    path.write_bytes(fused(2).to_bytes())
    single.write_bytes(fused().members[0].to_bytes())
    assert len(find_fused_head(str(path), EMBEDDINGS[1::-1]).members) == 2
    with pytest.raises(ArtifactError, match="trained for other backbones: fusion"):
        find_fused_head(str(path), EMBEDDINGS)
    with pytest.raises(ArtifactError, match="trained for other backbones: fusion"):
        find_fused_head(str(path), EMBEDDINGS[1:])
    with pytest.raises(ArtifactError, match=r"single.safetensors: a head of one backbone, but --backbone names"):
        find_fused_head(str(single), EMBEDDINGS[:2])
    with pytest.raises(ArtifactError, match=r"fused.safetensors: a head of several backbones; give them all"):
        Head.load(path)
    with pytest.raises(ArtifactError, match="no head is shipped for these backbones together"):
        find_fused_head(None, EMBEDDINGS[:2])


def test_every_shipped_head_loads_and_has_the_right_name():
    shipped = sorted((PACKAGE / "heads" / "weights").glob("fused-*.safetensors"))
    assert len(shipped) == 2
    for path in shipped:
        head = FusedHead.load(path)
        assert path.name == fused_head_name(head.embedding)
        assert head.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert 0 < head.threshold(at_far=0.001) < head.threshold(at_far=0.01) < 1
        assert 0.3 < head.calibration(head.members)[0] < 0.8


def test_another_choice_of_the_face_fits():
    settings = EmbeddingSettings(face="largest")
    plain = [EmbeddingFingerprint.of(BackboneSpec(name), EmbeddingSettings()) for name in ("first", "second")]
    largest = [EmbeddingFingerprint.of(BackboneSpec(name), settings) for name in ("first", "second")]
    members = tuple(make_head(about={**ABOUT, "embedding": dict(each.document)}) for each in plain)
    head = FusedHead(members, {combination_key(plain): (1.0, 0.0)}, ABOUT)
    assert head.arranged(largest).calibration(members) == (1.0, 0.0)


BAD = {
    "one backbone": lambda head: replace(head, members=head.members[:1]),
    "a backbone twice": lambda head: replace(head, members=head.members[:1] * 2),
    "no calibration of two": lambda head: replace(head, calibrations=dict(list(head.calibrations.items())[1:])),
    "infinite slope": lambda head: replace(
        head, calibrations={key: (float("inf"), 0.0) for key in head.calibrations}
    ),
    "threshold": lambda head: replace(head, about={**ABOUT, "thresholds": {**ABOUT["thresholds"], "best_f1": 1.5}}),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_damaged_head_is_refused(change):
    with pytest.raises(ArtifactError, match=r"^x: not a head of batchverify: "):
        FusedHead.from_bytes(change(fused()).to_bytes(), "x")


def test_a_damaged_member_is_named():
    data = fused(2).to_bytes()
    tensors = load(data)
    tensors["head.1"] = tensors["head.1"][:100]
    with pytest.raises(ArtifactError, match=r"^x: head 2: not a head of batchverify"):
        FusedHead.from_bytes(save(tensors, metadata={METADATA_KEY: read_metadata(data)}), "x")
    for bad in (b"", data[:50], data[:-9]):
        with pytest.raises(ArtifactError, match=r"^x: not a head of batchverify: "):
            FusedHead.from_bytes(bad, "x")
