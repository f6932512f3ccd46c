"""ONNX files of other projects: right whatever their colours, shapes and outputs, or refused with a clear error."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_files import MEANS, entry, expected, field, model, node, number, tensor, value, weights, write_model
from PIL import Image
from repository import REPOSITORY

from batchverify.embedding.backbone import find_spec, load_backbone
from batchverify.embedding.cpu_network import CpuNetwork
from batchverify.embedding.description import Description
from batchverify.embedding.embedder import Embedder
from batchverify.embedding.onnx_backbone import OnnxBackbone
from batchverify.embedding.onnx_file import OnnxFile
from batchverify.embedding.onnx_runtime import OnnxRuntimeNetwork
from batchverify.errors import ArtifactError, UsageError
from batchverify.faces.alignment import TEMPLATES

PLAIN: dict[str, Any] = {"crop": "none", "size": 112, "colour": "RGB", "mean": 127.5, "scale": 127.5}
# InsightFace's.
POINTS = [list(point) for point in TEMPLATES["arcface"].points]


def faces(count: int, size: int = 112) -> np.ndarray:
    """Faces of coarse squares, (N, S, S, 3) uint8."""
    cells = np.random.default_rng(count).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return cells.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


def embedder(path: Path, **options: Any) -> Embedder:
    options = {"device": "cpu", "dtype": "float32", "batch_size": 3, "threads": 1, **options}
    return Embedder(path, **options)


@pytest.mark.parametrize("colour", ["RGB", "BGR"])
@pytest.mark.parametrize(
    ("mean", "scale"), [(127.5, 127.5), (0, 1), (127.5, 128), ([123.675, 116.28, 103.53], [58.4, 57.1, 57.4])]
)
def test_colours_and_scales_are_those_of_the_description(tmp_path, colour, mean, scale):
    about = {**PLAIN, "colour": colour, "mean": mean, "scale": scale}
    path = write_model(tmp_path / "model.onnx", about)
    pixels = faces(7)
    found = embedder(path).vectors(pixels)
    np.testing.assert_allclose(found, expected(pixels, weights(96), colour, mean, scale), atol=1e-5)
    other = expected(pixels, weights(96), "RGB" if colour == "BGR" else "BGR", mean, scale)
    assert np.abs(found - other).max() > 0.01


@pytest.mark.parametrize(("size", "dimension"), [(112, 64), (128, 256), (160, 513), (224, 2048)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("batch", ["N", 1, 2])
def test_sizes_layouts_and_batches(tmp_path, size, dimension, layout, batch):
    about = {**PLAIN, "size": size}
    path = write_model(tmp_path / "model.onnx", about, size=size, dimension=dimension, layout=layout, batch=batch)
    pixels = faces(5, size)
    chosen = embedder(path)
    found = chosen.vectors(pixels)
    assert found.shape == (5, dimension) and chosen.fingerprint.document["size"] == size
    assert chosen.fingerprint.dimension == find_spec(str(path)).dimension == dimension
    np.testing.assert_allclose(found, expected(pixels, weights(dimension), "RGB", 127.5, 127.5), atol=1e-5)
    images = [pixels[0], pixels[1][:50]]
    embedded = chosen(images)
    assert embedded.vectors.shape == (2, dimension) and embedded.skipped == [None, None]


def test_a_file_that_takes_one_face_alone_gets_one(tmp_path):
    after = [node("Reshape", ["vectors", "shape"], ["embedding"])]
    extra = [tensor("shape", np.array([1, 96]))]
    path = write_model(tmp_path / "model.onnx", PLAIN, batch=1, after=after, extra=extra)
    backbone = OnnxBackbone.load(str(path))
    assert backbone.batch == 1 and CpuNetwork(backbone, batch_size=32).batch_size == 1
    pixels = faces(5)
    found = embedder(path).vectors(pixels)
    np.testing.assert_allclose(found, expected(pixels, weights(96), "RGB", 127.5, 127.5), atol=1e-5)


def two_outputs(path: Path, about: dict[str, Any]) -> Path:
    nodes = [
        node("ReduceL2", ["vectors"], ["norm"], axes=[1], keepdims=1),
        node("Div", ["vectors", "norm"], ["embedding"]),
    ]
    return write_model(path, about, after=nodes, outputs=[value("norm", ["N", 1]), value("embedding", ["N", 96])])


@pytest.mark.parametrize("output", ["embedding", 1])
def test_of_several_outputs_the_named_one_is_taken(tmp_path, output):
    path = two_outputs(tmp_path / "model.onnx", {**PLAIN, "output": output})
    pixels = faces(3)
    np.testing.assert_allclose(
        embedder(path).vectors(pixels), expected(pixels, weights(96), "RGB", 127.5, 127.5), atol=1e-5
    )


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            None,
            "has 2 outputs (norm, embedding): name the one with the vectors as `output` in its description",
        ),
        ("vector", "has no output 'vector'; its outputs are norm, embedding"),
        (2, "has no output 2; its outputs are norm, embedding"),
        ("norm", "output 'norm' has 1 numbers a face; a backbone gives 64 to 2,048"),
    ],
)
def test_an_output_that_does_not_fit_is_named(tmp_path, output, message):
    path = two_outputs(tmp_path / "model.onnx", {**PLAIN, "output": output})
    with pytest.raises(ArtifactError) as caught:
        load_backbone(str(path))
    assert str(caught.value) == f"{path}: {message}"


def test_a_file_without_a_description_gets_one_to_fill_in(tmp_path):
    path = write_model(tmp_path / "model.onnx", None)
    with pytest.raises(ArtifactError) as caught:
        load_backbone(str(path))
    text, _, blank = str(caught.value).partition("\n")
    assert text.startswith(f"{path}: no description: model.json beside it")
    assert "colour (RGB or BGR), mean and scale" in text
    form = json.loads(blank)
    assert form["size"] == 112 and form["output"] == "embedding" and form["colour"] is None
    # As it is, it says what is missing; filled in, it works.
    path.with_suffix(".json").write_text(blank)
    with pytest.raises(ArtifactError, match=r"model\.json: still to be filled in: crop, colour, mean, scale$"):
        load_backbone(str(path))
    path.with_suffix(".json").write_text(json.dumps(form | {"crop": "none", "colour": "RGB", "mean": 0, "scale": 1}))
    assert embedder(path).vectors(faces(1)).shape == (1, 96)


def test_a_description_in_the_metadata_counts_unless_one_lies_beside_the_file(tmp_path):
    inside = {"batchverify": json.dumps({**PLAIN, "colour": "BGR"})}
    path = write_model(tmp_path / "model.onnx", None, metadata=inside)
    pixels = faces(2)
    for colour in ("BGR", "RGB"):
        found = embedder(path).vectors(pixels)
        np.testing.assert_allclose(found, expected(pixels, weights(96), colour, 127.5, 127.5), atol=1e-5)
        path.with_suffix(".json").write_text(json.dumps(PLAIN))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "rgb"}, "colour must be RGB or BGR, got 'rgb'"),
        ({"color": "RGB"}, "unknown key 'color'; a description has colour, crop"),
        ({"size": 112.0}, "size must be a whole number from 32 to 512, got 112.0"),
        ({"size": True}, "size must be a whole number from 32 to 512, got True"),
        ({"size": 128}, "takes faces of 112 x 112 pixels, but its description says size 128"),
        ({"mean": [1, 2]}, "mean must be a number, or a list of three, got [1, 2]"),
        ({"mean": float("nan")}, "mean must be a number, or a list of three, got nan"),
        ({"scale": 0}, "scale must be a positive number, or a list of three, got 0"),
        ({"scale": [1, 1, float("inf")]}, "scale must be a positive number, or a list of three"),
        ({"crop": "face"}, "crop must be one of"),
        ({"crop": "none", "template": "arcface"}, "a template goes with crop align, not with none"),
        (
            {"preset": "faces"},
            "preset must be one of insightface, adaface, sface, edgeface, 0095, facenet, got 'faces'",
        ),
        ({"preset": ["0095"]}, "preset must be one of"),
        (
            {"crop": "align", "template": "mine"},
            "template must be one of vggface2, arcface, arcface-128, reid-0095, or",
        ),
        (
            {"crop": "align", "template": POINTS[:4]},
            "or five [x, y] in pixels of the face: left and right eye as",
        ),
        ({"crop": "align", "template": [*POINTS[:4], [1, "2"]]}, "template must be one of"),
        ({"crop": "align", "template": [*POINTS[:4], [1, 2, 3]]}, "template must be one of"),
        ({"crop": "align", "template": [*POINTS[:4], [1, 10**400]]}, "template must be one of"),
        ({"crop": "align", "template": [*POINTS[:4], 5]}, "template must be one of"),
        # The eyes the other way round, upside down, as shares of the side, beyond the face.
        ({"crop": "align", "template": [POINTS[1], POINTS[0], *POINTS[2:]]}, "are not those of a face: five"),
        ({"crop": "align", "template": [[x, 112 - y] for x, y in POINTS]}, "are not those of a face"),
        ({"crop": "align", "template": [[x / 112, y / 112] for x, y in POINTS]}, "are not those of a face"),
        ({"crop": "align", "template": [[x + 200, y] for x, y in POINTS]}, "are not those of a face"),
        ({"crop": "none", "template": POINTS}, "a template goes with crop align, not with none"),
        ({"output": ""}, "output must be the name or the number of an output, got ''"),
        ({"licence": 5}, "licence must be a text of at most 1,000 characters, got 5"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(tmp_path, change, message):
    path = write_model(tmp_path / "model.onnx", {**PLAIN, **change})
    with pytest.raises(ArtifactError) as caught:
        load_backbone(str(path))
    assert str(caught.value).startswith(str(tmp_path)) and message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the description is not JSON"),
        ("[1]", "a description is a JSON object, got [1]"),
        ('{"size": 1, "size": 2}', "gives one name twice"),
        ("[" * 90_000, "objects inside one another"),
        (b"\xff\xfe", "the description is not JSON"),
    ],
)
def test_a_description_that_is_no_object_is_refused(tmp_path, text, message):
    path = write_model(tmp_path / "model.onnx", None)
    beside = path.with_suffix(".json")
    beside.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArtifactError) as caught:
        load_backbone(str(path))
    assert str(caught.value).startswith(str(beside)) and message in str(caught.value)


def test_presets_say_what_their_projects_do(tmp_path):
    pixels = faces(2)
    for preset, colour, mean, scale in (
        ("insightface", "RGB", 127.5, 127.5),
        ("sface", "RGB", 0, 1),
        ("edgeface", "RGB", 127.5, 127.5),
        ("adaface", "BGR", 127.5, 127.5),
    ):
        path = write_model(tmp_path / f"{preset}.onnx", {"preset": preset, "crop": "none"})
        found = embedder(path).vectors(pixels)
        np.testing.assert_allclose(found, expected(pixels, weights(96), colour, mean, scale), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "template"),
    [
        ({}, "arcface"),
        ({"size": 224}, "arcface"),
        ({"size": 128}, "arcface-128"),
        ({"size": 256}, "arcface-128"),
    ],
)
def test_a_preset_aligns_faces_of_other_sizes_as_its_project_does(change, template):
    settings = Description.parse({"preset": "insightface", **change}, "model.json").settings
    assert (settings.crop, settings.detector, settings.template) == ("align", "retinaface", template)
    stated = Description.parse({"preset": "insightface", **change, "template": "arcface"}, "model.json")
    assert stated.settings.template == "arcface"
    assert Description.parse({"preset": "insightface", "crop": "detect"}, "model.json").template == ""


def test_a_model_of_insightface_that_scales_pixels_itself_gets_them_raw(tmp_path):
    before = [node("Sub", ["pixels", "mean"], ["centred"]), node("Mul", ["centred", "factor"], ["faces"])]
    extra = [tensor("mean", np.array([127.5], np.float32)), tensor("factor", np.array([1 / 128], np.float32))]
    path = write_model(tmp_path / "model.onnx", {"preset": "insightface", "crop": "none"}, before=before, extra=extra)
    pixels = faces(2)
    assert OnnxBackbone.load(str(path)).description.normalisation == "x, RGB"
    found = embedder(path).vectors(pixels)
    np.testing.assert_allclose(found, expected(pixels, weights(96), "RGB", 127.5, 128), atol=1e-5)


def test_bytes_as_input_are_taken_raw(tmp_path):
    before = [node("Cast", ["pixels"], ["faces"], to=1)]
    about = {**PLAIN, "mean": 0, "scale": 1}
    path = write_model(tmp_path / "model.onnx", about, before=before, kind=2)
    pixels = faces(2)
    found = embedder(path).vectors(pixels)
    np.testing.assert_allclose(found, expected(pixels, weights(96), "RGB", 0, 1), atol=1e-5)
    path.with_suffix(".json").write_text(json.dumps(PLAIN))
    with pytest.raises(ArtifactError, match="its input holds bytes, so its description must say mean 0 and scale 1"):
        load_backbone(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrix": np.full((MEANS, 96), np.nan, np.float32)}, "vectors that are not finite"),
        ({"matrix": np.zeros((MEANS, 96), np.float32)}, "the vector of a face is zero"),
        (
            {
                "after": [
                    node("Mul", ["vectors", "zero"], ["nothing"]),
                    node("Add", ["nothing", "one"], ["embedding"]),
                ],
                "extra": [tensor("zero", np.zeros(1, np.float32)), tensor("one", np.ones(1, np.float32))],
            },
            "two different faces have the same vector",
        ),
        (
            {
                "after": [
                    node("ReduceMean", ["vectors"], ["crowd"], axes=[0], keepdims=1),
                    node("Sub", ["vectors", "crowd"], ["embedding"]),
                ]
            },
            "a face's vector depends on the other faces of its batch",
        ),
    ],
)
def test_the_self_check_names_the_file_and_what_failed(tmp_path, options, message):
    path = write_model(tmp_path / "model.onnx", PLAIN, **options)
    with pytest.raises(ArtifactError) as caught:
        embedder(path)
    assert str(caught.value).startswith(f"{path}: its self-check failed: ") and message in str(caught.value)


def test_broken_files_are_refused(tmp_path):
    path = write_model(tmp_path / "model.onnx", PLAIN)
    whole = path.read_bytes()
    for data in (
        b"",
        b"\x00",
        b"<html>",
        whole[: len(whole) // 2],
        whole[:40],
        b"\x08\x08",
        os.urandom(3000),
    ):
        path.write_bytes(data)
        with pytest.raises(ArtifactError) as caught:
            load_backbone(str(path))
        assert str(caught.value).startswith(str(path)) and "ONNX" in str(caught.value)
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_backbone(str(tmp_path / "absent.onnx"))
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ArtifactError, match="no ONNX model: no file"):
        load_backbone(str(tmp_path / "folder.onnx"))


def test_models_that_are_no_backbones_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    write_model(path, PLAIN, after=[node("Unheard", ["vectors"], ["embedding"])])
    with pytest.raises(ArtifactError, match=r"OpenVINO cannot read this model: .*Unheard"):
        load_backbone(str(path))
    write_model(path, PLAIN, dimension=63)
    with pytest.raises(ArtifactError, match="has 63 numbers a face; a backbone gives 64 to 2,048"):
        load_backbone(str(path))
    nodes = [node("Add", ["a", "b"], ["embedding"])]
    shape: list[int | str] = ["N", 3, 112, 112]
    path.write_bytes(model(nodes, [], [value("a", shape), value("b", shape)], [value("embedding", shape)]))
    with pytest.raises(ArtifactError, match="a backbone has one input, this model has 2: a, b"):
        load_backbone(str(path))
    nodes = [node("Relu", ["a"], ["embedding"])]
    path.write_bytes(model(nodes, [], [value("a", ["N", 1, 112, 112])], [value("embedding", ["N", 1, 112, 112])]))
    with pytest.raises(ArtifactError, match="neither N x 3 x H x W nor N x H x W x 3"):
        load_backbone(str(path))


def test_tensors_in_a_file_beside_the_model_are_read_and_part_of_the_fingerprint(tmp_path):
    path = write_model(tmp_path / "model.onnx", PLAIN, location="model.bin")
    data = tmp_path / "model.bin"
    data.write_bytes(weights(96).tobytes())
    pixels = faces(2)
    found = embedder(path).vectors(pixels)
    np.testing.assert_allclose(found, expected(pixels, weights(96), "RGB", 127.5, 127.5), atol=1e-5)
    before = find_spec(str(path)).fingerprint
    data.write_bytes((weights(96) * 2).tobytes())
    assert find_spec(str(path)).fingerprint != before


@pytest.mark.parametrize(
    "name", ["../secret.bin", "/etc/passwd", "link.bin", "inner/../../secret.bin", "*/_ORT_MEM_ADDR_/*", ""]
)
def test_tensors_outside_of_the_models_folder_are_refused(tmp_path, name):
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)
    (folder / "*" / "_ORT_MEM_ADDR_" / "*").write_bytes(weights(96).tobytes())
    (tmp_path / "secret.bin").write_bytes(weights(96).tobytes())
    (folder / "link.bin").symlink_to("../secret.bin")
    path = write_model(folder / "model.onnx", PLAIN, location=name)
    with pytest.raises(ArtifactError, match="which is outside of its folder"):
        load_backbone(str(path))


def test_tensors_in_branches_and_attributes_are_looked_at_too(tmp_path):
    """A constant inside of a branch, as `If` has them, and one in a function."""
    outside = tensor("deep", np.zeros(1, np.float32), location="../secret.bin")
    constant = (
        field(2, "deep") + field(4, "Constant") + field(5, field(1, "value") + field(5, outside) + field(20, 4))
    )
    branch = field(1, constant) + field(2, "branch")
    conditional = field(4, "If") + field(5, field(1, "then_branch") + field(6, branch) + field(20, 5))
    good = write_model(tmp_path / "model.onnx", PLAIN).read_bytes()
    for data in (field(7, field(1, conditional)), field(7, field(5, outside)), field(25, field(7, constant))):
        (tmp_path / "model.onnx").write_bytes(good + data)
        with pytest.raises(ArtifactError, match="which is outside of its folder"):
            load_backbone(str(tmp_path / "model.onnx"))


def test_absent_tensors_and_endless_graphs_are_refused(tmp_path):
    path = write_model(tmp_path / "model.onnx", PLAIN, location="absent.bin")
    with pytest.raises(ArtifactError, match="which is no file in its folder"):
        load_backbone(str(path))
    graph = b""
    for _ in range(500):
        graph = field(1, field(5, field(6, graph)))
    path.write_bytes(field(7, graph))
    with pytest.raises(ArtifactError, match="more than 16 graphs inside one another"):
        load_backbone(str(path))
    path.write_bytes(number(7 << 3 | 3))
    with pytest.raises(ArtifactError, match="a field of wire type 3"):
        load_backbone(str(path))
    path.write_bytes(field(7, b"") + field(14, entry("a", "b") + b"\x12\xff\xff\xff\xff\x0f"))
    with pytest.raises(ArtifactError, match="cut short"):
        load_backbone(str(path))


def test_the_fingerprint_covers_the_file_the_description_and_the_crop(tmp_path):
    def prints(**change: Any) -> str:
        path = write_model(tmp_path / "model.onnx", {**PLAIN, **change})
        return embedder(path).fingerprint.id

    ids = [prints(), prints(colour="BGR"), prints(mean=127), prints(scale=128), prints(crop="center")]
    ids.append(prints(crop="detect", margin=0))
    assert len(set(ids)) == len(ids)
    assert prints(licence="MIT", source="https://example.com") == ids[0]
    path = write_model(tmp_path / "model.onnx", PLAIN, matrix=weights(96) + 1)
    assert embedder(path).fingerprint.id != ids[0]
    assert embedder(path, crop="center").settings.crop == "center"


def test_a_template_of_ones_own_is_used_and_part_of_the_fingerprint(tmp_path):
    samples = sorted((REPOSITORY / "sample_manifests" / "faces").glob("*.jpg"))[:2]
    drawn = [np.asarray(Image.open(path).convert("RGB")) for path in samples]

    def embedded(template: Any) -> tuple[str, np.ndarray]:
        path = write_model(tmp_path / "model.onnx", {**PLAIN, "crop": "align", "template": template})
        made = embedder(path)
        assert json.loads(made.fingerprint.canonical)["crop"]["template"] == template
        return made.fingerprint.id, made(drawn).vectors

    (named, wanted), (own, found) = embedded("arcface"), embedded(POINTS)
    np.testing.assert_array_equal(found, wanted)
    moved, elsewhere = embedded([[x + 8.0, y] for x, y in POINTS])
    assert len({named, own, moved}) == 3 and np.abs(elsewhere - wanted).max() > 0.01


def test_what_a_cpu_and_a_gpu_cannot_do_is_said(tmp_path):
    path = write_model(tmp_path / "model.onnx", PLAIN)
    with pytest.raises(
        UsageError, match=r"--runtime torch: .*model.onnx is an ONNX file, which OpenVINO runs on a CPU"
    ):
        embedder(path, runtime="torch")
    with pytest.raises(UsageError, match=r"--dtype int8: the weights of .*model.onnx state no activation ranges"):
        embedder(path, dtype="int8")
    with pytest.raises(UsageError, match="--weights goes with"):
        load_backbone(str(path), tmp_path)
    backbone = OnnxBackbone.load(str(path))
    with pytest.raises(UsageError, match=r"--dtype bfloat16: on a GPU .* computes in its own types"):
        OnnxRuntimeNetwork(backbone, "cuda", dtype="bfloat16")


def test_damage_anywhere_is_an_artifact_error_or_goes_unseen(tmp_path):
    """Of the messages; what OpenVINO makes of them is its own."""
    path = write_model(tmp_path / "model.onnx", PLAIN, location="model.bin", metadata={"a": "b"})
    (tmp_path / "model.bin").write_bytes(b"0")
    data, refusals, rng = path.read_bytes(), [], random.Random(0)
    for _ in range(400):
        damaged = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        for _ in range(min(len(damaged), 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            OnnxFile.read(path).digest()
        except ArtifactError as exc:
            refusals.append(str(exc))
    assert 100 < len(refusals) < 400
    assert all(refusal.startswith(str(path)) for refusal in refusals)


@pytest.mark.parametrize("key", [*PLAIN, "preset", "template", "margin", "output", "licence", "source", "new"])
def test_no_value_of_a_key_is_a_traceback(key):
    values = [
        None,
        True,
        -1,
        0,
        10**400,
        1e400,
        float("nan"),
        "",
        "x" * 5000,
        [],
        [1] * 3,
        [None] * 3,
        {},
        {"a": [1]},
    ]
    refusals = []
    for each in values:
        try:
            about = Description.parse({**PLAIN, key: each}, "model.json")
        except ArtifactError as exc:
            refusals.append(str(exc))
        else:
            assert json.loads(about.identity) and about.normalisation and about.settings.crop == "none"
    assert all(refusal.startswith("model.json: ") and len(refusal) < 400 for refusal in refusals)
