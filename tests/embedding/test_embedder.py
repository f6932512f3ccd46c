"""The embedder: order, crops, mirrored views, and vectors that depend only on their image."""

import json
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from facenet_pytorch import InceptionResnetV1
from PIL import Image
from safetensors.numpy import load_file, save_file

from batchverify.embedding.backbone import METADATA_KEY, RANGES_KEY, Backbone, load_weights, packaged_weights
from batchverify.embedding.cpu_network import CpuNetwork
from batchverify.embedding.embedder import Embedded, Embedder
from batchverify.embedding.forward import TorchNetwork
from batchverify.embedding.inception import CPU_BATCH
from batchverify.errors import ArtifactError, BatchverifyError, UsageError
from batchverify.faces.crops import box_pixels, fixed_face
from batchverify.faces.detection import GPU_BATCH_SIZES, BatchSizes, FaceDetector, choose_face
from batchverify.records import Reason, Skipped
from batchverify.runtime.compiled_network import capabilities
from batchverify.runtime.devices import resolve_device, resolve_runtime

BATCH = 2


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_weights()


@pytest.fixture(scope="module")
def embedder(backbone) -> Embedder:
    """The whole picture, in the fastest number format of this machine."""
    return Embedder(backbone, crop="none", device="cpu", batch_size=BATCH)


@pytest.fixture(scope="module")
def exact(backbone) -> Embedder:
    """The whole picture in float32."""
    return Embedder(backbone, crop="none", device="cpu", batch_size=BATCH, dtype="float32")


@pytest.fixture(scope="module")
def faces(shared) -> list[np.ndarray]:
    """Six pictures of LFW, (250, 250, 3)."""
    people = sorted((shared / "data" / "lfw" / "lfw-deepfunneled").iterdir())[::150][:6]
    return [np.asarray(Image.open(min(person.iterdir()))) for person in people]


def draw(count: int, seed: int = 0) -> list[np.ndarray]:
    """Pictures of soft blobs, no two of one size."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)
    sizes = [(90 + 20 * row, 200 - 10 * row) for row in range(count)]
    return [
        np.asarray(Image.fromarray(each).resize(size, Image.Resampling.BICUBIC))
        for each, size in zip(small, sizes, strict=True)
    ]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b).sum(axis=1)


def test_rows_are_unit_vectors_in_the_order_of_the_pictures(embedder):
    pictures = draw(6)
    found = embedder(pictures)
    assert found.vectors.shape == (6, 512) and found.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-6)
    assert found.skipped == [None] * 6 and len(found) == 6
    backwards = embedder(pictures[::-1])
    assert np.array_equal(backwards.vectors[::-1], found.vectors)
    assert len(np.unique(found.vectors, axis=0)) == 6


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_vector_does_not_depend_on_neighbours_place_or_count(dtype, runtime, threads, backbone):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    chosen = Embedder(
        backbone,
        crop="none",
        device="cpu",
        runtime=runtime,
        batch_size=BATCH,
        dtype=dtype,
        threads=threads,
    )
    first, second = (fixed_face(picture, "none").pixels for picture in draw(BATCH))
    expected = chosen.vectors(np.stack([first, second]))
    other = np.random.default_rng(1).integers(0, 256, first.shape, dtype=np.uint8)
    # Few calls: where other programs hold the CPUs, two threads wait for each other at every layer.
    assert np.array_equal(chosen.vectors(np.stack([other, first]))[1], expected[0])
    assert np.array_equal(chosen.vectors(second[None])[0], expected[1])
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_openvinos_vectors_do_not_depend_on_threads_streams_or_batch_size(dtype, backbone):
    pixels = np.stack([fixed_face(picture, "none").pixels for picture in draw(5)])
    found = [
        CpuNetwork(backbone, dtype=dtype, batch_size=size, streams=streams, threads=threads)
        for size, streams, threads in ((2, 1, 1), (2, 1, 2), (2, 2, 1), (5, 1, 2))
    ]
    expected = found[0].vectors(pixels)
    for each in found:
        with ThreadPoolExecutor(2) as pool:
            assert all(np.array_equal(rows, expected) for rows in pool.map(each.vectors, [pixels] * 2))


def test_torchs_threads_move_the_last_bits_at_most(backbone):
    # oneDNN cuts some float32 convolutions of small batches by the threads at hand; 1e-7 is rounding.
    network = TorchNetwork(backbone, "cpu", dtype="float32", batch_size=BATCH)
    pixels = np.stack([fixed_face(picture, "none").pixels for picture in draw(2)])
    before, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(network.vectors(pixels))
    torch.set_num_threads(before)
    np.testing.assert_allclose(found[0], found[1], atol=5e-7)


def test_faces_that_may_not_be_written_to_are_embedded_and_other_arrays_refused(backbone):
    network = CpuNetwork(backbone, batch_size=2)
    pixels = np.stack([fixed_face(picture, "none").pixels for picture in draw(2)])
    expected = network.vectors(pixels)
    pixels.setflags(write=False)
    assert np.array_equal(network.vectors(pixels), expected)
    for other in (pixels.astype(np.float32), pixels[:, :100]):
        with pytest.raises(UsageError, match=r"faces must be \(N, 160, 160, 3\) uint8"):
            network.vectors(other)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"repeat_9": 1.0}, "activation ranges for 'repeat_9', which is no layer of InceptionResnetV1"),
        ({"repeat_1.0": 0.0}, r"the activation range of 'repeat_1.0' is 0.0 to 0.0, not about zero"),
        ({"repeat_1.0": [1, 2]}, r"the activation range of 'repeat_1.0' is 1.0 to 2.0, not about zero"),
        ({"repeat_1.0": [-1e999, 2]}, r"the activation range of 'repeat_1.0' is -inf to 2.0, not about zero"),
        ({"repeat_1.0": [-1, 2, 3]}, "its batchverify metadata is damaged"),
        ({"repeat_1.0": "x"}, "its batchverify metadata is damaged"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(ranges, message, tmp_path):
    tensors = load_file(packaged_weights())
    metadata = {METADATA_KEY: json.dumps({RANGES_KEY: ranges})}
    save_file(tensors, tmp_path / "own.safetensors", metadata=metadata)
    with pytest.raises(ArtifactError, match=message):
        Embedder(tmp_path / "own.safetensors", crop="none", device="cpu", runtime="openvino", dtype="int8")


def test_both_runtimes_agree_in_float32(backbone):
    pictures = draw(6)
    found = [
        Embedder(backbone, crop="none", device="cpu", runtime=runtime, dtype="float32", batch_size=BATCH)(
            pictures
        ).vectors
        for runtime in ("openvino", "torch")
    ]
    assert cosines(*found).min() >= 0.9999
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


@pytest.mark.weights
def test_number_types_agree(backbone, shared):
    """One number class: 8-bit and 16-bit vectors serve the caches and heads of float32."""
    people = sorted((shared / "data" / "lfw" / "lfw-deepfunneled").iterdir())[::26]
    pictures = [np.asarray(Image.open(min(person.iterdir()))) for person in people]
    exact = Embedder(backbone, crop="center", device="cpu", dtype="float32")
    expected = exact(pictures).vectors
    ways = [("openvino", "int8"), ("torch", "bfloat16")]
    ways += [("openvino", "bfloat16")] if "BF16" in capabilities() else []
    for runtime, dtype in ways:
        # Torch's bfloat16 is slow where a CPU has none.
        count, size = (len(pictures), None) if runtime == "openvino" else (4, 4)
        other = Embedder(backbone, crop="center", device="cpu", runtime=runtime, dtype=dtype, batch_size=size)
        found = cosines(other(pictures[:count]).vectors, expected[:count])
        assert found.mean() >= 0.999 and found.min() >= 0.995, (runtime, dtype)
        assert other.fingerprint.id == exact.fingerprint.id


@pytest.mark.weights
def test_the_float32_path_is_facenet_pytorchs_own_network(faces, shared):
    weights = shared / "weights" / "20180402-114759-vggface2.pt"
    network = InceptionResnetV1(pretrained=None, classify=False).eval()
    network.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    ours = Embedder("vggface2-float", weights=weights, crop="center", device="cpu", batch_size=BATCH, dtype="float32")
    crops = np.stack([fixed_face(face, "center").pixels for face in faces])
    inputs = (torch.from_numpy(crops).permute(0, 3, 1, 2).float() - 127.5) / 128
    with torch.inference_mode():
        theirs = network(inputs).numpy()
    assert cosines(ours(faces).vectors, theirs).min() > 0.99999


@pytest.mark.weights
def test_the_detected_crop_and_no_face_keep_their_places(faces, backbone):
    embedder = Embedder(backbone, device="cpu", batch_size=BATCH)
    empty = np.full((80, 90, 3), 200, np.uint8)
    found = embedder([empty, faces[0], empty, faces[1]])
    assert [skipped.reason if skipped else None for skipped in found.skipped] == [
        Reason.NO_FACE,
        None,
        Reason.NO_FACE,
        None,
    ]
    for row in (0, 2):
        assert not found.vectors[row].any() and not found.boxes[row].any() and found.faces[row] == 0
        assert np.isnan(found.confidence[row])
    for row, picture in ((1, faces[0]), (3, faces[1])):
        detected = FaceDetector.on(runtime=embedder.runtime)([picture])[0]
        best = choose_face(detected, *picture.shape[:2])
        assert np.array_equal(found.boxes[row], detected.boxes[best])
        assert found.confidence[row] == detected.scores[best] > 0.9
        assert found.faces[row] == len(detected)
        crop = box_pixels(picture, tuple(detected.boxes[best].tolist()), 44)
        assert np.array_equal(embedder.vectors(crop[None])[0], found.vectors[row])


@pytest.mark.weights
def test_faces_in_large_pictures_are_cut_from_all_their_pixels(faces, backbone):
    """A small face in a picture of 4,000 pixels: found in a reduced copy, embedded as sharp as it is."""
    embedder = Embedder(backbone, device="cpu", batch_size=BATCH)
    alone = embedder([faces[0]])
    large = np.full((3000, 4000, 3), 127, np.uint8)
    large[1300:1550, 1800:2050] = faces[0]
    found = embedder([large, large])
    assert found.skipped == [None, None]
    np.testing.assert_allclose(found.boxes[0] - [1800, 1300, 1800, 1300], alone.boxes[0], atol=8)
    assert cosines(found.vectors[:1], alone.vectors).min() > 0.95
    half = np.asarray(Image.fromarray(large).resize((2000, 1500)))
    assert cosines(found.vectors[:1], alone.vectors) > cosines(embedder([half]).vectors, alone.vectors)
    assert np.array_equal(found.vectors[0], found.vectors[1])


@pytest.mark.weights
def test_another_face_can_be_meant(faces, backbone):
    """A small face in the middle, a larger one beside it."""
    picture = np.full((500, 800, 3), 127, np.uint8)
    picture[125:375, 275:525] = faces[0]
    picture[0:400, 0:400] = np.asarray(Image.fromarray(faces[1]).resize((400, 400)))
    picture[125:375, 275:525] = faces[0]
    middle, large = (
        Embedder(backbone, device="cpu", batch_size=BATCH, face=face)([picture]).boxes[0]
        for face in ("center", "largest")
    )
    assert middle[0] > 300 and large[0] < 300
    nobody = Embedder(backbone, device="cpu", batch_size=BATCH, min_face=450)([picture])
    assert nobody.skipped[0].reason is Reason.NO_FACE


def test_fixed_crops_are_those_of_crops(backbone, embedder):
    pictures = draw(3)
    center = Embedder(backbone, crop="center", device="cpu", batch_size=BATCH)
    for chosen, crop in ((center, "center"), (embedder, "none")):
        cut = [fixed_face(picture, crop) for picture in pictures]
        found = chosen(pictures)
        assert np.array_equal(found.vectors, chosen.vectors(np.stack([face.pixels for face in cut])))
        assert found.boxes.tolist() == [list(map(float, face.box)) for face in cut]
        assert np.isnan(found.confidence).all() and not found.faces.any()


def test_flip_averaging_is_the_unit_mean_of_both_views(backbone, embedder):
    pictures = draw(3)
    both = Embedder(backbone, crop="none", tta="flip", device="cpu", batch_size=BATCH)
    mirrored = [picture[:, ::-1] for picture in pictures]
    mean = embedder(pictures).vectors + embedder(mirrored).vectors
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    assert cosines(both(pictures).vectors, mean).min() > 0.9999
    assert np.array_equal(both(pictures).vectors, both(mirrored).vectors)
    assert both.fingerprint.id != embedder.fingerprint.id


def test_faces_and_reasons_in_one_call(embedder):
    reason = Skipped(Reason.NO_FACE, "none here")
    face = fixed_face(draw(1)[0], "none")
    found = embedder.embed_faces([reason, face, reason])
    assert found.skipped == [reason, None, reason]
    assert found.vectors.any(axis=1).tolist() == [False, True, False]
    assert embedder.embed_faces([reason]).skipped == [reason]


def test_blocks_are_halved_where_memory_is_too_small_to_find_faces(backbone, faces):
    embedder: Any = Embedder(backbone, device="cpu", runtime="torch", batch_size=BATCH)
    wanted, detector = embedder.find_faces(faces), embedder._detector

    class Small:
        blocks, group = GPU_BATCH_SIZES, 16

        def __call__(self, pictures, blocks):
            if blocks.refine > 100:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return detector(pictures, blocks)

    embedder._detector = Small()
    for ours, theirs in zip(embedder.find_faces(faces), wanted, strict=True):
        np.testing.assert_allclose(ours.box, theirs.box, atol=1e-3)
    Small.blocks = BatchSizes(1, 1, 1)
    embedder._detector = lambda pictures, blocks: Small()(pictures, GPU_BATCH_SIZES)
    embedder._detector.blocks, embedder._detector.group = BatchSizes(1, 1, 1), 16
    with pytest.raises(BatchverifyError, match="no memory to find a face"):
        embedder.find_faces(faces)


def test_nothing_in_nothing_out(embedder):
    found = embedder([])
    assert isinstance(found, Embedded) and len(found) == 0
    assert found.vectors.shape == (0, 512) and found.boxes.shape == (0, 4)
    assert embedder.vectors(np.zeros((0, 160, 160, 3), np.uint8)).shape == (0, 512)


def test_the_smallest_pictures(backbone, embedder):
    shapes = [(1, 1), (1, 300), (300, 1), (2, 2)]
    pictures = [np.full((*shape, 3), 90, np.uint8) for shape in shapes]
    center = Embedder(backbone, crop="center", device="cpu", batch_size=BATCH)
    for chosen in (embedder, center):
        found = chosen(pictures)
        assert found.skipped == [None] * 4
        np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-6)
        # Every picture is the same colour, and so is every crop.
        assert (found.vectors == found.vectors[0]).all()
    detecting = Embedder(backbone, device="cpu", batch_size=BATCH)
    assert [skipped.reason for skipped in detecting(pictures).skipped] == [Reason.NO_FACE] * 4


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((9, 9), np.uint8),
        np.zeros((9, 9, 4), np.uint8),
        np.zeros((3, 9, 9), np.uint8),
        np.zeros((9, 9, 3), np.float32),
        np.zeros((0, 9, 3), np.uint8),
    ],
    ids=lambda each: f"{each.shape}-{each.dtype}",
)
def test_other_arrays_are_refused(picture, embedder):
    with pytest.raises(UsageError, match=r"image 1: must be \(H, W, 3\) uint8 RGB, got \("):
        embedder([*draw(1), picture])


@pytest.mark.parametrize("given", [Image.new("RGB", (9, 9)), "a.jpg", b"\xff\xd8", None])
def test_what_is_no_array_is_refused_by_its_type(given, embedder):
    kind = type(given).__name__
    with pytest.raises(UsageError, match=rf"image 1: must be \(H, W, 3\) uint8 RGB, got {kind}$"):
        embedder([*draw(1), given])
    with pytest.raises(UsageError, match=rf"images must be a list of \(H, W, 3\) uint8 RGB arrays, got {kind}$"):
        embedder(given)


def test_a_generator_and_one_array_of_all_pictures_are_embedded_too(embedder):
    pictures = draw(1) * 2
    expected = embedder(pictures).vectors
    assert np.array_equal(embedder(iter(pictures)).vectors, expected)
    assert np.array_equal(embedder(np.stack(pictures)).vectors, expected)


def test_settings_that_make_no_sense(backbone):
    for settings, message in (
        ({"crop": "face"}, "crop must be one of detect, align, center, none"),
        ({"tta": "rotate"}, "tta must be"),
        ({"margin": -1}, "margin must be"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"dtype": "int4", "device": "cpu", "runtime": "openvino"}, "--dtype must be auto, float32"),
        ({"dtype": "float16", "device": "cpu", "runtime": "openvino"}, "--dtype must be auto, float32"),
        ({"runtime": "onnx"}, r"--runtime or \$BATCHVERIFY_RUNTIME must be one of auto, openvino, torch"),
        ({"device": "tpu"}, "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "cuda:99"}, "--device cuda:99: this machine has no such CUDA device"),
    ):
        with pytest.raises(UsageError, match=message):
            Embedder(backbone, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu():
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="--device cuda: this machine has no such CUDA device"):
        resolve_device("cuda")


def test_the_compute_path_is_told(backbone, exact):
    assert str(exact.compute_path) == f"cpu float32 {exact.runtime}, batches of 2"
    plain = Embedder(backbone, crop="none", device="cpu", runtime="openvino")
    floats = "bfloat16" if "BF16" in capabilities() else "float32"
    dtype = f"int8_{floats}" if platform.machine() == "x86_64" else floats
    assert str(plain.compute_path) == f"cpu {dtype} openvino, batches of {CPU_BATCH}"


def test_weights_without_ranges_are_not_rounded(backbone):
    own = replace(backbone, ranges={})
    dtype = Embedder(own, crop="none", device="cpu", runtime="openvino")._network.dtype
    assert dtype == ("bfloat16" if "BF16" in capabilities() else "float32")
    with pytest.raises(UsageError, match="--dtype int8: the weights of vggface2 state no activation ranges"):
        Embedder(own, crop="none", device="cpu", runtime="openvino", dtype="int8")


def test_openvinos_path_imports_no_torch_and_torchs_no_openvino():
    program = (
        "import sys; import numpy as np; from batchverify.embedding.embedder import Embedder; "
        "embedder = Embedder(device='cpu', runtime='{}'); embedder([np.zeros((40, 40, 3), np.uint8)]); "
        "assert '{}' not in sys.modules"
    )
    for runtime, other in (("openvino", "torch"), ("torch", "openvino")):
        subprocess.run([sys.executable, "-c", program.format(runtime, other)], check=True, timeout=120)


def test_without_openvino_torch_computes():
    program = (
        "import sys; sys.modules['openvino'] = None; from batchverify.embedding.embedder import Embedder; "
        "assert Embedder(device='cpu').runtime == 'torch'; Embedder(device='cpu', runtime='openvino')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "UsageError: --runtime openvino: OpenVINO cannot be used here: " in done.stderr


def test_the_environment_says_what_auto_means(monkeypatch):
    monkeypatch.setenv("BATCHVERIFY_RUNTIME", "torch")
    assert resolve_runtime("auto", "cpu") == "torch"
    assert resolve_runtime("openvino", "cpu") == "openvino"
    monkeypatch.setenv("BATCHVERIFY_RUNTIME", "onnx")
    with pytest.raises(UsageError, match="got 'onnx'"):
        resolve_runtime("auto", "cpu")
    with pytest.raises(UsageError, match="--runtime openvino computes on the CPU, not on cuda"):
        resolve_runtime("openvino", "cuda")


def test_vectors_that_are_no_numbers_never_come_out(backbone):
    # The bias of the last batch-norm is beyond float16, within float32.
    tensors = {**backbone.tensors, "last_bn.bias": np.full(512, 1e6, np.float32)}
    broken = Embedder(
        Backbone("broken", tensors, "00"),
        crop="none",
        device="cpu",
        batch_size=1,
        runtime="torch",
        dtype="float16",
    )
    with pytest.raises(BatchverifyError, match=r"vectors that are not finite .*float16"):
        broken(draw(1))


def test_an_embedder_takes_a_path(tmp_path):
    with pytest.raises(BatchverifyError, match=r"nothing.pt: no such weights file"):
        Embedder(tmp_path / "nothing.pt")
