"""Our backbones as ONNX files: read back, they give the same vectors and verdicts, and say where they come from."""

import errno
import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from failing_calls import failing_calls
from installed_plugins import install_plugins
from onnx_files import write_model
from PIL import Image
from repository import REPOSITORY
from safetensors.numpy import save_file

import batchverify
from batchverify.embedding import compact
from batchverify.embedding.backbone import COMPACT, find_spec, load_backbone, load_weights, quantise
from batchverify.embedding.description import Description
from batchverify.embedding.embedder import Embedder
from batchverify.embedding.forward import TorchNetwork
from batchverify.embedding.onnx_backbone import OnnxBackbone
from batchverify.embedding.onnx_export import export, onnx_bytes
from batchverify.embedding.onnx_file import OnnxFile
from batchverify.embedding.onnx_runtime import OnnxRuntimeNetwork
from batchverify.errors import ArtifactError, BatchverifyError, UsageError
from batchverify.fingerprint import EmbeddingFingerprint
from batchverify.heads.head import default_head

NAMES = ("vggface2", COMPACT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The packaged backbones as `NAME.onnx`."""
    folder = tmp_path_factory.mktemp("onnx")
    for name in NAMES:
        export(name, folder / f"{name}.onnx")
    return folder


def noise(size: int, count: int = 5) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def exact(backbone, pixels: np.ndarray, *, flip: bool = False) -> np.ndarray:
    """The vectors of a backbone of ours in float32."""
    network = TorchNetwork(backbone, "cpu", dtype="float32", batch_size=len(pixels), flip=flip, threads=1)
    return network.vectors(pixels)


@pytest.mark.parametrize(("name", "tta"), [("vggface2", "none"), (COMPACT, "none"), (COMPACT, "flip")])
def test_read_back_it_gives_the_same_vectors(folder, name, tta):
    backbone = load_backbone(name)
    embedder = Embedder(folder / f"{name}.onnx", device="cpu", threads=1, dtype="float32", batch_size=3, tta=tta)
    pixels = noise(backbone.spec.size)
    expected = exact(backbone, pixels, flip=tta == "flip")
    assert (embedder.vectors(pixels) * expected).sum(axis=1).min() > 0.99999


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_the_same_faces_but_is_another_backbone(folder, name):
    found, ours = find_spec(str(folder / f"{name}.onnx")), find_spec(name)
    assert (found.size, found.dimension, found.defaults) == (ours.size, ours.dimension, ours.defaults)
    assert found.fingerprint != ours.fingerprint
    assert found.normalisation.removesuffix(", RGB") == ours.normalisation


@pytest.mark.parametrize("name", NAMES)
def test_the_description_says_what_it_takes_and_where_it_is_from(folder, name):
    text = (folder / f"{name}.json").read_text()
    document = json.loads(text)
    scaled = {"vggface2": ("RGB", 127.5, 128), COMPACT: ("BGR", 0, 1)}[name]
    assert (document["colour"], document["mean"], document["scale"]) == scaled
    crop = {"vggface2": ("detect", 44, None, 160), COMPACT: ("align", None, "reid-0095", 128)}[name]
    assert tuple(document.get(key) for key in ("crop", "margin", "template", "size")) == crop
    assert document["licence"] == {"vggface2": "MIT", COMPACT: "Apache-2.0"}[name]
    fingerprint = load_backbone(name).fingerprint
    assert document["source"].endswith(f"written by batchverify {batchverify.__version__}, fingerprint {fingerprint}")
    about = Description.parse(document, "it")
    assert (about.output, about.licence) == ("embedding", document["licence"])
    # The model holds it, too, for when it is moved alone.
    assert OnnxFile.read(folder / f"{name}.onnx").metadata == {"batchverify": text}


def test_a_model_that_is_moved_alone_is_read(folder, tmp_path):
    shutil.copy(folder / "compact.onnx", tmp_path / "moved.onnx")
    assert find_spec(str(tmp_path / "moved.onnx")) == find_spec(str(folder / "compact.onnx"))


def test_the_same_backbone_gives_the_same_bytes(folder, tmp_path):
    exported = export(COMPACT, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (folder / "compact.onnx").read_bytes()
    assert exported.to_json() == {
        "onnx": str(tmp_path / "again.onnx"),
        "description": str(tmp_path / "again.json"),
        "backbone": COMPACT,
        "fingerprint": load_backbone(COMPACT).fingerprint,
    }


def verdicts(folder, backbone: str, head) -> dict[str, list]:
    """The rows of the sample manifest."""
    head = replace(head, about={**head.about, "embedding": dict(embedding_of(backbone).document)})
    (folder / "head.safetensors").write_bytes(head.to_bytes())
    scores = batchverify.score(
        REPOSITORY / "sample_manifests" / "faces.csv",
        backbone=backbone,
        head=str(folder / "head.safetensors"),
        no_cache=True,
        device="cpu",
        num_cpus=1,
        dtype="float32",
        quiet=True,
    )
    return scores.to_arrow().to_pydict()


def embedding_of(backbone: str):
    spec = find_spec(backbone)
    return EmbeddingFingerprint.of(spec, spec.settings())


@pytest.mark.parametrize("name", NAMES)
def test_its_verdicts_on_real_rows_are_the_same(folder, tmp_path, name):
    head = default_head(embedding_of(name))
    path = str(folder / f"{name}.onnx")
    expected, found = verdicts(tmp_path, name, head), verdicts(tmp_path, path, head)
    assert set(expected["status"]) == {"ok"}
    for column in ("label", "status", "image_a", "image_b"):
        assert found[column] == expected[column]
    np.testing.assert_allclose(found["probability"], expected["probability"], atol=2e-3)
    with pytest.raises(ArtifactError, match="no head is shipped"):
        default_head(embedding_of(path))


@pytest.mark.weights
@pytest.mark.parametrize("name", NAMES)
def test_its_verdicts_on_photographs_are_the_same(shared, folder, name):
    people = sorted((shared / "data" / "lfw" / "lfw-deepfunneled").iterdir())[::97]
    images = [np.asarray(Image.open(image)) for person in people for image in sorted(person.iterdir())[:2]]
    ours = Embedder(name, device="cpu", threads=1, dtype="float32")
    theirs = Embedder(folder / f"{name}.onnx", device="cpu", threads=1, dtype="float32")
    faces = ours.find_faces(images[:20])
    expected, found = ours.embed_faces(faces).vectors, theirs.embed_faces(faces).vectors
    assert (found * expected).sum(axis=1).min() > 0.99999
    head = default_head(ours.fingerprint)
    a, b = np.array(list(combinations(range(len(faces)), 2))).T
    verdicts = [head.score_pairs(rows, a, b)[0] >= head.threshold() for rows in (found, expected)]
    assert (verdicts[0] == verdicts[1]).mean() >= 0.999


def changed(backbone, seed: int = 0):
    """A backbone whose tensors have all learnt a little."""
    dice = np.random.default_rng(seed)
    tensors = {
        name: (array * dice.uniform(0.95, 1.05, array.shape)).astype(np.float32)
        for name, array in backbone.tensors.items()
    }
    return replace(backbone, tensors=tensors)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_counts(name, tmp_path):
    """Batch normalisation is folded from statistics that are all different from each other."""
    backbone = changed(load_backbone(name))
    about = {"crop": "none", "colour": "RGB", "mean": 127.5, "scale": 128}
    if name == COMPACT:
        about |= {"colour": "BGR", "mean": 0, "scale": 1}
    about["size"] = backbone.spec.size
    (tmp_path / "it.onnx").write_bytes(onnx_bytes(backbone, {"batchverify": json.dumps(about)}))
    pixels = noise(backbone.spec.size)
    found = Embedder(tmp_path / "it.onnx", device="cpu", threads=1, dtype="float32").vectors(pixels)
    assert (found * exact(backbone, pixels)).sum(axis=1).min() > 0.99999
    assert (found * exact(load_backbone(name), pixels)).sum(axis=1).min() < 0.99999


@pytest.mark.parametrize("stored", ["float", "int8", "pt"])
def test_files_of_the_users_are_exported(tmp_path, stored):
    backbone = changed(load_weights("vggface2"))
    path = tmp_path / f"mine.{'pt' if stored == 'pt' else 'safetensors'}"
    about = json.dumps({"architecture": backbone.architecture, "licence": "CC0", "source": "a thesis"})
    if stored == "pt":
        torch.save({name: torch.from_numpy(array) for name, array in backbone.tensors.items()}, path)
    else:
        tensors = backbone.tensors if stored == "float" else quantise(backbone.tensors)
        save_file(tensors, path, {"batchverify": about})
    export(str(path), tmp_path / "mine.onnx")
    # Weights of a file are float32 once they are read, whatever they were.
    data = (tmp_path / "mine.onnx").read_bytes()
    assert data == onnx_bytes(load_weights(str(path)), OnnxFile.read(tmp_path / "mine.onnx").metadata)
    document = json.loads((tmp_path / "mine.json").read_text())
    licence, source = ("not stated", "mine.pt") if stored == "pt" else ("CC0", "a thesis")
    assert document["licence"] == licence and document["source"].startswith(f"{source}; written by")


@pytest.mark.parametrize("texts", [{}, {"licence": 5, "source": ["x"]}])
def test_a_file_that_states_no_origin_is_named(tmp_path, texts):
    tensors = load_backbone(COMPACT).tensors
    about = {"architecture": compact.ARCHITECTURE, **texts}
    save_file(tensors, tmp_path / "mine.safetensors", {"batchverify": json.dumps(about)})
    export(str(tmp_path / "mine.safetensors"), tmp_path / "mine.onnx")
    document = json.loads((tmp_path / "mine.json").read_text())
    assert document["licence"] == "not stated" and document["source"].startswith("mine.safetensors; written")


@pytest.mark.weights
def test_published_weights_are_exported(shared, tmp_path):
    weights = shared / "weights"
    export("vggface2-float", tmp_path / "it.onnx", weights)
    backbone, pixels = load_weights("vggface2-float", weights), noise(160, 2)
    found = Embedder(tmp_path / "it.onnx", device="cpu", threads=1, dtype="float32").vectors(pixels)
    assert (found * exact(backbone, pixels)).sum(axis=1).min() > 0.99999
    assert json.loads((tmp_path / "it.json").read_text())["source"].startswith("https://github.com/timesler")


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [
        (COMPACT, "it.bin", r"-o must end in \.onnx, got .*it\.bin"),
        ("it.onnx", "other.onnx", "it.onnx: an ONNX file already"),
        ("vggface2+compact", "it.onnx", r"vggface2\+compact: several backbones; export each by itself"),
        ("compakt", "it.onnx", "unknown backbone 'compakt': vggface2, compact"),
    ],
)
def test_what_cannot_be_exported(tmp_path, name, output, message):
    with pytest.raises(UsageError, match=message):
        export(name, tmp_path / output)
    assert list(tmp_path.iterdir()) == []


def test_plug_ins_cannot_be_exported(tmp_path, monkeypatch):
    install_plugins(tmp_path, {"mynet": "of_nobody:Network"})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="mynet: a plug-in; only weights of our networks can be exported"):
        export("mynet", tmp_path / "it.onnx")


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_another_network_are_refused(tmp_path, name):
    backbone = load_backbone(name)
    tensors = dict(list(backbone.tensors.items())[1:])
    about = json.dumps({"architecture": backbone.architecture})
    save_file(tensors, tmp_path / "mine.safetensors", {"batchverify": about})
    with pytest.raises(ArtifactError, match=r"mine\.safetensors: not the weights of .*: 1 tensors are missing"):
        export(str(tmp_path / "mine.safetensors"), tmp_path / "mine.onnx")
    assert not (tmp_path / "mine.onnx").exists()


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"a": 1}'])
def test_a_file_of_something_else_is_not_replaced(tmp_path, text):
    (tmp_path / "it.json").write_text(text)
    with pytest.raises(UsageError, match=r"it\.json: would be replaced, but it is no description of a model"):
        export(COMPACT, tmp_path / "it.onnx")
    assert (tmp_path / "it.json").read_text() == text and not (tmp_path / "it.onnx").exists()


def test_earlier_files_are_replaced(tmp_path):
    write_model(tmp_path / "it.onnx", {"preset": "adaface"})
    export(COMPACT, tmp_path / "it.onnx")
    assert find_spec(str(tmp_path / "it.onnx")).size == 128
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.json", "it.onnx"]


def test_a_disk_that_is_full_is_reported_and_leaves_no_half_file(tmp_path, monkeypatch):
    def fails(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(BatchverifyError, match=r"it\.onnx: cannot be written: No space left on device"):
        export(COMPACT, tmp_path / "it.onnx")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BatchverifyError, match=r"nowhere/it\.onnx: cannot be written: No such file or directory"):
        export(COMPACT, tmp_path / "nowhere" / "it.onnx")


@pytest.mark.parametrize("name", NAMES)
def test_onnx_runtime_gives_the_same_vectors(folder, name):
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    backbone, pixels = load_backbone(name), noise(load_backbone(name).spec.size)
    network = OnnxRuntimeNetwork(OnnxBackbone.load(str(folder / f"{name}.onnx")), "cpu")
    assert (network.vectors(pixels) * exact(backbone, pixels)).sum(axis=1).min() > 0.99999


@pytest.mark.parametrize("name", NAMES)
def test_the_library_onnx_finds_no_fault(folder, name):
    onnx = pytest.importorskip("onnx", reason="pip install onnx")
    onnx.checker.check_model(onnx.load(folder / f"{name}.onnx"), full_check=True)


@pytest.mark.parametrize("fault", ["ENOSPC", "late", "full"])
def test_every_call_may_fail_and_no_description_is_beside_another_model(tmp_path, fault):
    export(COMPACT, tmp_path / "expected.onnx")
    expected = (tmp_path / "expected.onnx").read_bytes()
    with failing_calls(tmp_path) as calls:
        with calls.failing():
            export(COMPACT, tmp_path / "counted.onnx")
        for number in range(len(calls.seen)):
            path = tmp_path / str(number) / "it.onnx"
            path.parent.mkdir()
            old = write_model(path, {"preset": "adaface"}).read_bytes()
            with calls.failing(number, fault), suppress(BatchverifyError):
                export(COMPACT, path)
            beside, is_new = path.with_suffix(".json"), path.read_bytes() == expected
            assert is_new or path.read_bytes() == old
            # Without one, the new model's metadata holds its own.
            assert not beside.exists() or ("size" in json.loads(beside.read_text())) == is_new, calls.hit
            export(COMPACT, path)
            assert path.read_bytes() == expected and json.loads(beside.read_text())["size"] == 128


def test_a_relative_path_starts_from_the_working_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = export(COMPACT, Path("here.onnx"))
    assert (tmp_path / "here.onnx").read_bytes() == (folder / f"{COMPACT}.onnx").read_bytes()
    assert (tmp_path / "here.json").is_file() and done.onnx == "here.onnx"
