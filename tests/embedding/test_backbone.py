"""Backbones: the packaged weights against the published ones, fingerprints, and files that are none."""

import json
import pickle
import random
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from repository import REPOSITORY
from safetensors.numpy import save_file
from sklearn.metrics import roc_auc_score

from batchverify.embedding.backbone import (
    COMPACT,
    METADATA_KEY,
    PACKAGED,
    Backbone,
    dequantise,
    fingerprint,
    list_backbones,
    load_backbone,
    load_weights,
    packaged_weights,
    quantise,
    read_tensors,
    stored_fingerprint,
)
from batchverify.embedding.download import PUBLISHED
from batchverify.embedding.embedder import Embedder
from batchverify.embedding.inception import ARCHITECTURE
from batchverify.errors import ArtifactError, UsageError
from batchverify.faces.mtcnn import weights_path
from batchverify.manifest.prepare import prepare_lfw

sys.path.insert(0, str(REPOSITORY / "jobs"))
FLOAT_FILE = "20180402-114759-vggface2.pt"


@pytest.fixture(scope="module")
def packaged() -> Backbone:
    return load_weights()


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine without published weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("BATCHVERIFY_WEIGHTS", raising=False)


@pytest.fixture(scope="session")
def lfw_vectors(shared, tmp_path_factory):
    """The images of a sixth of LFW View 1's test pairs, cut in the middle.

    (packaged vectors, float vectors, image names, rows)
    """
    folder = tmp_path_factory.mktemp("lfw")
    lines = prepare_lfw(shared / "data" / "lfw", folder).manifests["test"].read_text().splitlines()
    rows = [line.split(",") for line in lines[1::6]]
    names = sorted({name for row in rows for name in row[:2]})
    pictures = [np.asarray(Image.open(folder / name)) for name in names]
    weights = shared / "weights" / FLOAT_FILE
    own, published = (
        Embedder(name, crop="center", device="cpu", weights=file)(pictures).vectors
        for name, file in ((PACKAGED, None), ("vggface2-float", weights))
    )
    return own, published, names, rows


@pytest.mark.weights
def test_the_packaged_vectors_are_the_published_ones_but_for_rounding(lfw_vectors):
    own, published, names, _ = lfw_vectors
    cosines = (own * published).sum(axis=1)
    assert len(names) > 300
    assert np.median(cosines) >= 0.999
    assert cosines.min() >= 0.99


@pytest.mark.weights
def test_the_packaged_weights_verify_as_well_as_the_published_ones(lfw_vectors):
    own, published, names, rows = lfw_vectors
    a, b = ([names.index(row[side]) for row in rows] for side in (0, 1))
    labels = [int(row[2]) for row in rows]
    areas = [roc_auc_score(labels, -(each[a] * each[b]).sum(axis=1)) for each in (own, published)]
    assert len(rows) == 167
    assert min(areas) >= 0.998
    assert abs(areas[0] - areas[1]) <= 0.0005


@pytest.mark.weights
def test_the_job_still_makes_the_packaged_bytes(shared):
    from make_weights import mtcnn_bytes, packaged_bytes

    ranges = load_backbone().ranges
    assert packaged_bytes(shared / "weights" / FLOAT_FILE, ranges) == packaged_weights().read_bytes()
    assert mtcnn_bytes() == weights_path().read_bytes()


def test_the_packaged_header_states_the_fingerprint(packaged):
    assert stored_fingerprint(packaged_weights()) == packaged.fingerprint == fingerprint(packaged.tensors)
    assert {array.dtype for array in packaged.tensors.values()} == {np.dtype(np.float32)}


def test_the_fingerprint_sees_bits_names_shapes_and_numbers_and_no_order():
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(1, np.float32)}
    known = fingerprint(tensors)
    assert fingerprint(dict(reversed(tensors.items()))) == known
    assert fingerprint({**tensors, "a": np.asfortranarray(tensors["a"])}) == known
    flipped = tensors["a"].copy()
    flipped.view(np.uint32)[1, 2] ^= 1
    others = [
        {**tensors, "a": flipped},
        {**tensors, "a": tensors["a"].reshape(3, 2)},
        {**tensors, "b": np.zeros((), np.float32)},
        {**tensors, "a": tensors["a"].astype(np.float64)},
        {"c": tensors["a"], "b": tensors["b"]},
        {"a": tensors["a"]},
    ]
    assert len({known, *map(fingerprint, others)}) == 7


def test_eight_bits_are_rounded_by_no_more_than_half_a_step():
    tensors = {
        "w": np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32),
        "b": np.ones(4, np.float32),
    }
    tensors["w"][2] = 0
    stored = quantise(tensors)
    again = dequantise(stored)
    steps = np.abs(tensors["w"]).max(axis=(1, 2), keepdims=True) / 127
    assert stored["w"].dtype == np.int8
    assert again.keys() == tensors.keys()
    assert (np.abs(again["w"] - tensors["w"]) <= steps * 0.501).all()
    assert np.array_equal(again["b"], tensors["b"])


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "x.pt") -> Path:
    torch.save(tensors, folder / name)
    return folder / name


def test_logits_and_counters_are_no_part_of_the_embedding(tmp_path):
    plain = {"a.weight": torch.randn(2, 3), "a.bias": torch.randn(2)}
    more = {
        **plain,
        "logits.weight": torch.randn(9, 2),
        "logits.bias": torch.randn(9),
        "a.num_batches_tracked": torch.tensor(7),
    }
    first, second = read_tensors(write(tmp_path, plain)), read_tensors(write(tmp_path, more, "y.pt"))
    assert fingerprint(first) == fingerprint(second)
    assert second.keys() == plain.keys()


def test_other_number_formats_come_as_float32(tmp_path):
    values = torch.tensor([[0.5, -2.0]])
    expected = fingerprint({"w": values.numpy()})
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        assert fingerprint(read_tensors(write(tmp_path, {"w": values.to(kind)}))) == expected
    assert fingerprint(read_tensors(write(tmp_path, {"w": torch.nn.Parameter(values)}))) == expected
    save_file({"w": values.double().numpy()}, tmp_path / "w.safetensors")
    assert fingerprint(read_tensors(tmp_path / "w.safetensors")) == expected


class Bomb:
    """A pickle that touches a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_is_refused_and_nothing_of_it_runs(tmp_path):
    for name in ("zip.pt", "plain.pt"):
        if name == "zip.pt":
            torch.save({"w": Bomb(tmp_path / "touched")}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(pickle.dumps({"w": Bomb(tmp_path / "touched")}))
        with pytest.raises(
            ArtifactError, match=f"{name}: damaged, or not a torch state dict .*; pickled code is not run"
        ):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "touched").exists()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_files_that_hold_no_weights(tmp_path):
    whole = packaged_weights().read_bytes()
    save_file({"w": np.ones((2, 2), np.int8)}, tmp_path / "unscaled.safetensors")
    save_file({"w": np.ones((2, 2), np.int8), "w.scale": np.ones(3, np.float32)}, tmp_path / "scales.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole[:500_000])
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    write(tmp_path, {"w": torch.tensor([1.0, float("nan")])}, "nan.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "nested.pt")
    # A kilobyte each, and four gigabytes in memory.
    torch.save({"w": torch.ones(1).expand(10**9)}, tmp_path / "expanded.pt")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 20))
    with (tmp_path / "sparse.safetensors").open("wb") as file:
        file.truncate(5 << 30)
    torch.save({"w": torch.ones(2, dtype=torch.complex64)}, tmp_path / "complex.pt")
    torch.save({"w": torch.ones(2, 2).to_sparse()}, tmp_path / "lists.pt")
    huge = json.dumps({"activation_ranges": json.loads("[" * 500 + "]" * 500)})
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "deep.safetensors", {"batchverify": huge})
    for name, message in {
        "unscaled.safetensors": "need a scale",
        "scales.safetensors": "need a scale",
        "cut.safetensors": "not a safetensors file",
        "text.safetensors": "not a safetensors file",
        "text.pt": "not a torch state dict",
        "empty.pt": "not a torch state dict",
        "nan.pt": "tensor 'w' holds values that are not finite",
        "list.pt": "not a torch state dict",
        "nested.pt": "not a torch state dict",
        "absent.pt": "no such weights file",
        "expanded.pt": "1,000,000,000 values, the limit is",
        "packed.pt": "a compressed file",
        "sparse.safetensors": "1,342,177,280 values, the limit is",
        "complex.pt": "complex numbers",
        "lists.pt": "not a torch state dict",
        "deep.safetensors": "metadata is damaged: JSON with more than 32 objects",
    }.items():
        with pytest.raises(ArtifactError, match=f"{name}: .*{message}") as caught:
            load_backbone(str(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_damage_anywhere_is_an_artifact_error_or_goes_unseen(zipped, tmp_path):
    path, rng = tmp_path / "w.pt", random.Random(0)
    torch.save({"a": torch.ones(4, 3), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    data, refusals = path.read_bytes(), []
    for _ in range(150):
        damaged = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        for _ in range(min(len(damaged), 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_tensors(path)
            except ArtifactError as exc:
                refusals.append(str(exc))
    assert len(refusals) > 50
    assert not any("\n" in refusal for refusal in refusals)


def test_another_network_is_refused(packaged):
    name = "last_linear.weight"
    without = {key: array for key, array in packaged.tensors.items() if key != name}
    for tensors, count, example in (
        (without, 1, name),
        ({**without, name: np.ones((512, 3), np.float32)}, 1, name),
        ({**packaged.tensors, "extra.weight": np.ones(3, np.float32)}, 1, "extra.weight"),
        ({}, len(packaged.tensors), "block8.branch0.bn.bias"),
    ):
        with pytest.raises(
            ArtifactError, match=f"mine: not the weights of {ARCHITECTURE}: {count} tensors .*'{example}'"
        ):
            Backbone("mine", tensors, "").check_tensors()


@pytest.mark.usefixtures("nowhere")
def test_names_and_weights_that_make_no_sense(tmp_path):
    with pytest.raises(
        UsageError, match="unknown backbone 'resnet': vggface2, compact, vggface2-float, casia-webface or"
    ):
        load_backbone("resnet")
    with pytest.raises(UsageError, match=r"--weights goes with .*, not with 'vggface2'"):
        load_backbone(PACKAGED, tmp_path)
    with pytest.raises(UsageError, match="--weights goes with --backbone vggface2-float or casia-webface, not with"):
        load_backbone("mine.pt", tmp_path)
    with pytest.raises(ArtifactError, match=r"casia-webface\.pt in this folder"):
        load_backbone("casia-webface", tmp_path)


@pytest.mark.usefixtures("nowhere")
def test_the_list_of_backbones(tmp_path):
    plain = list_backbones()
    assert [each.name for each in plain] == [PACKAGED, COMPACT, *PUBLISHED]
    for each in plain[:2]:
        assert each.fingerprint == stored_fingerprint(packaged_weights(each.name))
    assert (plain[2].path, plain[2].fingerprint) == (None, None)
    assert "not on this machine" in "\n".join(plain[2].lines())
    torch.save({"w": torch.ones(2)}, tmp_path / FLOAT_FILE)
    found = list_backbones(tmp_path / FLOAT_FILE)[2]
    assert found.fingerprint == fingerprint({"w": np.ones(2, np.float32)})
    assert json.loads(json.dumps(found.to_json()))["path"] == str(tmp_path / FLOAT_FILE)


def stating(folder: Path, **metadata) -> str:
    """The compact network in a file whose header says more."""
    path = folder / "mine.safetensors"
    about = json.dumps({"architecture": load_backbone(COMPACT).architecture, **metadata})
    save_file(load_backbone(COMPACT).tensors, path, metadata={METADATA_KEY: about})
    return str(path)


def test_a_file_states_how_its_faces_are_cut_out(tmp_path):
    settings = {"crop": "detect", "margin": 20, "detector": "mtcnn", "template": "reid-0095"}
    stated = load_backbone(stating(tmp_path, settings=settings)).spec
    assert (stated.settings().crop, stated.settings().margin, stated.settings().detector) == (
        "detect",
        20,
        "mtcnn",
    )
    assert stated.settings(crop="center").crop == "center"
    silent = load_backbone(stating(tmp_path)).spec
    assert silent.defaults == load_backbone(COMPACT).spec.defaults


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop": "oval"}, "crop must be one of"),
        ({"crop": "align", "detector": "mtcnn"}, "needs --detector retinaface"),
        ({"margin": 20.5}, "margin must be a whole number"),
        ({"template": "mine"}, "template must be one of"),
        ({"template": [[1, 2]]}, "wrong settings"),
        ({"view": 3}, "view is not one of crop, margin"),
        ("detect", "wrong settings"),
        (7, "wrong settings"),
    ],
)
def test_settings_that_do_not_exist_are_an_error(tmp_path, settings, words):
    path = stating(tmp_path, settings=settings)
    with pytest.raises(ArtifactError, match=words) as error:
        load_backbone(path)
    assert path in str(error.value)
