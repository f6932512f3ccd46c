"""The compact backbone: packaged, the same in both runtimes, and the same as Open Model Zoo's own files."""

import json
import shutil
from dataclasses import replace
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
from batchverify.runtime.compiled_network import capabilities

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


def test_eight_bits_in_some_layers_are_as_exact_as_bfloat16_nearly(backbone, pixels):
    exact = CpuNetwork(backbone, dtype="float32").vectors(pixels)
    rounded = CpuNetwork(backbone, dtype="int8_float32")
    found = rounded.vectors(pixels)
    cosines = (found * exact).sum(axis=1)
    assert cosines.min() > 0.99 and not np.array_equal(found, exact)
    for size in (1, 3):
        other = CpuNetwork(backbone, dtype="int8_float32", batch_size=size)
        assert np.array_equal(other.vectors(pixels), found)


def test_eight_bits_are_the_default_where_the_cpu_multiplies_bfloat16(backbone):
    dtype = CpuNetwork(backbone).dtype
    assert dtype == ("int8_bfloat16" if "BF16" in capabilities() else "float32")


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"stage9.0.expand": (-1.0, 1.0)}, "activation ranges for 'stage9.0.expand', which is no layer of"),
        ({"stem_depthwise": (-1.0, 1.0)}, "activation ranges for 'stem_depthwise', which is no layer of"),
    ],
)
def test_ranges_of_other_layers_are_refused(backbone, ranges, message):
    with pytest.raises(ArtifactError, match=message):
        CpuNetwork(replace(backbone, ranges=ranges), dtype="int8")


@pytest.mark.weights
def test_the_range_of_a_layer_leaves_out_the_outliers(backbone, monkeypatch, pixels):
    from repository import REPOSITORY

    monkeypatch.syspath_prepend(str(REPOSITORY / "jobs"))
    from make_weights import compact_ranges

    ranges = compact_ranges(backbone.tensors, np.concatenate([pixels] * 4))
    assert set(ranges) == set(backbone.ranges) and len(ranges) == 15
    assert all(low < 0 < high for low, high in ranges.values())


@pytest.mark.weights
def test_number_types_agree(backbone, shared):
    """One number class: 8-bit and 16-bit vectors serve the caches and heads of float32."""
    people = sorted((shared / "data" / "lfw" / "lfw-deepfunneled").iterdir())[::26]
    pictures = [np.asarray(Image.open(min(person.iterdir()))) for person in people]
    vectors = {
        dtype: Embedder(backbone, device="cpu", dtype=dtype)(pictures).vectors
        for dtype in ("float32", "int8", *(["bfloat16"] if "BF16" in capabilities() else []))
    }
    for dtype in vectors.keys() - {"float32"}:
        cosines = (vectors[dtype] * vectors["float32"]).sum(axis=1)
        assert len(cosines) > 100 and cosines.mean() >= 0.999 and cosines.min() >= 0.99


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
    ranges = load_backbone(COMPACT).ranges
    made = compact_bytes(folder / "face-reidentification-retail-0095.xml", ranges)
    assert made == packaged_weights(COMPACT).read_bytes()


@pytest.mark.weights
def test_its_onnx_file_gives_the_same_verdicts(shared, backbone, tmp_path):
    path = shutil.copy(shared / "weights" / "compact" / "omz-0095" / "omz0095.onnx", tmp_path / "omz0095.onnx")
    (tmp_path / "omz0095.json").write_text(json.dumps({"preset": "0095", "licence": "Apache-2.0"}))
    people = sorted((shared / "data" / "lfw" / "lfw-deepfunneled").iterdir())[::97]
    images = [np.asarray(Image.open(image)) for person in people for image in sorted(person.iterdir())[:2]][:64]
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
