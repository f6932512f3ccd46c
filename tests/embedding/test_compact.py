"""The compact backbone: packaged, the same in both runtimes, and the same as Open Model Zoo's own files."""

import json
import shutil
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batchverify.embedding import compact
from batchverify.embedding.backbone import (
    COMPACT,
    Backbone,
    find_spec,
    fingerprint,
    load_backbone,
    packaged_weights,
)
from batchverify.embedding.cpu_network import CpuNetwork
from batchverify.embedding.embedder import Embedder
from batchverify.embedding.forward import TorchNetwork
from batchverify.errors import ArtifactError, UsageError
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.heads.head import default_head

MOST_BYTES = 4_000_000


@pytest.fixture(scope="module")
def backbone() -> Any:
    return load_backbone(COMPACT)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Five faces of soft blobs, (5, 128, 128, 3) uint8."""
    cells = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(each).resize((128, 128), Image.Resampling.BICUBIC)) for each in cells]
    )


def test_the_package_holds_what_it_says(backbone):
    path = packaged_weights(COMPACT)
    assert path.stat().st_size < MOST_BYTES and path.with_name("LICENSE-compact").is_file()
    assert backbone.fingerprint == fingerprint(backbone.tensors, compact.ARCHITECTURE)
    assert find_spec(COMPACT) == backbone.spec
    settings = backbone.spec.defaults
    assert (settings.crop, settings.detector, settings.template) == ("align", "retinaface", "reid-0095")
    assert sum(array.size for array in backbone.tensors.values()) == 1_106_814
    with pytest.raises(UsageError, match=r"--weights goes with .*, not with 'compact'"):
        load_backbone(COMPACT, path.parent)


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_it_has_a_default_head(backbone, tta):
    embedding = EmbeddingFingerprint.of(backbone.spec, backbone.spec.settings(tta=tta))
    head = default_head(embedding)
    assert head.embedding.id == embedding.id and head.dimension == 256 and 0 < head.threshold() < 1


def test_a_copy_by_another_name_is_the_same_backbone(backbone, tmp_path):
    path = shutil.copy(packaged_weights(COMPACT), tmp_path / "mine.safetensors")
    assert find_spec(str(path)) == backbone.spec


@pytest.mark.parametrize("flip", [False, True])
def test_both_runtimes_agree(backbone, pixels, flip):
    found = CpuNetwork(backbone, dtype="float32", batch_size=2, flip=flip).vectors(pixels)
    assert found.shape == (5, 256)
    other = TorchNetwork(backbone, "cpu", dtype="float32", batch_size=2, flip=flip).vectors(pixels)
    np.testing.assert_allclose(found, other, atol=5e-6)


def test_tensors_of_another_network_are_refused(backbone):
    tensors = {name: array for name, array in backbone.tensors.items() if name != "stem.slope"}
    other = Backbone("mine", tensors, "f" * 64, {}, compact.ARCHITECTURE)
    for network in (CpuNetwork, lambda each: TorchNetwork(each, "cpu")):
        with pytest.raises(ArtifactError, match=r"mine: not the weights of .*: 1 tensors .*'stem\.slope'"):
            network(other)


def test_a_detector_without_good_landmarks_is_refused(backbone):
    with pytest.raises(UsageError, match="--crop align needs --detector retinaface"):
        Embedder(backbone, detector="mtcnn", device="cpu")


@pytest.mark.weights
def test_the_packaged_weights_are_open_model_zoos(shared, monkeypatch):
    from repository import REPOSITORY

    monkeypatch.syspath_prepend(str(REPOSITORY / "jobs"))
    from make_weights import compact_bytes

    folder = shared / "weights" / "compact" / "omz-0095" / "FP16"
    made = compact_bytes(folder / "face-reidentification-retail-0095.xml")
    assert made == packaged_weights(COMPACT).read_bytes()


@pytest.mark.weights
def test_its_onnx_file_gives_the_same_verdicts(shared, backbone, tmp_path):
    path = shutil.copy(
        shared / "weights" / "compact" / "omz-0095" / "omz0095.onnx", tmp_path / "omz0095.onnx"
    )
    (tmp_path / "omz0095.json").write_text(json.dumps({"preset": "0095", "licence": "Apache-2.0"}))
    people = sorted((shared / "data" / "lfw" / "lfw-deepfunneled").iterdir())[::97]
    images = [np.asarray(Image.open(image)) for person in people for image in sorted(person.iterdir())[:2]][
        :64
    ]
    # In bfloat16 two libraries round differently.
    ours = Embedder(backbone, device="cpu", dtype="float32")
    theirs = Embedder(path, device="cpu", dtype="float32")
    assert ours.settings == theirs.settings
    found, expected = theirs(images).vectors, ours(images).vectors
    assert (found * expected).sum(axis=1).min() > 0.9999
    head = default_head(ours.fingerprint)
    a, b = np.array(list(combinations(range(len(images)), 2))).T
    verdicts = [head.score_pairs(rows, a, b)[0] >= head.threshold() for rows in (found, expected)]
    assert (verdicts[0] == verdicts[1]).mean() >= 0.999
