"""The embedder: order, crops, views, and vectors that depend on their picture alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from facenet_pytorch import InceptionResnetV1
from PIL import Image

from batchverify.backbones import Backbone, load_backbone
from batchverify.crops import box_face, center_face, whole_face
from batchverify.detection import GPU_BLOCKS, Blocks, FaceDetector, choose_face
from batchverify.devices import cpu_has_bf16, resolve_device
from batchverify.embedder import CPU_BATCH, GPU_BATCHES, Embedded, Embedder
from batchverify.engine import GPU_CHUNK
from batchverify.errors import BatchverifyError, UsageError
from batchverify.fused import kind_of_network
from batchverify.records import Reason, Skipped

BATCH = 2


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone()


@pytest.fixture(scope="module")
def embedder(backbone) -> Embedder:
    """The whole picture, in the fastest number format of this machine."""
    return Embedder(backbone, crop="none", device="cpu", batch_size=BATCH)


@pytest.fixture(scope="module")
def exact(backbone) -> Embedder:
    """The whole picture in float32."""
    return Embedder(backbone, crop="none", device="cpu", batch_size=BATCH, numbers="float32")


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


@pytest.fixture(params=[1, 2])
def threads(request):
    """The number of threads that torch may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("numbers", ["fastest", "float32"])
def test_a_vector_does_not_depend_on_neighbours_place_or_count(numbers, threads, embedder, exact):
    chosen = embedder if numbers == "fastest" else exact
    first, second = (whole_face(picture).pixels for picture in draw(BATCH))
    expected = chosen.vectors(np.stack([first, second]))
    other = np.random.default_rng(1).integers(0, 256, first.shape, dtype=np.uint8)
    # Few calls: where other programs hold the CPUs, two threads wait for each other at every layer.
    assert np.array_equal(chosen.vectors(np.stack([other, first]))[1], expected[0])
    assert np.array_equal(chosen.vectors(second[None])[0], expected[1])


def test_the_number_of_threads_moves_the_last_bits_at_most(exact):
    # oneDNN cuts some float32 convolutions of small batches by the threads at hand; 1e-7 is rounding.
    pixels = np.stack([whole_face(picture).pixels for picture in draw(2)])
    before, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(exact.vectors(pixels))
    torch.set_num_threads(before)
    np.testing.assert_allclose(found[0], found[1], atol=5e-7)


@pytest.mark.weights
def test_number_formats_agree(faces, backbone, exact):
    expected = exact(faces).vectors
    for numbers in ("bfloat16", "float16"):
        other = Embedder(backbone, crop="none", device="cpu", batch_size=BATCH, numbers=numbers)
        assert cosines(other(faces).vectors, expected).min() >= 0.999
        assert other.fingerprint.id == exact.fingerprint.id


@pytest.mark.weights
def test_the_float32_path_is_facenet_pytorchs_own_network(faces, shared):
    weights = shared / "weights" / "20180402-114759-vggface2.pt"
    network = InceptionResnetV1(pretrained=None, classify=False).eval()
    network.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    ours = Embedder(
        "vggface2-float", weights=weights, crop="center", device="cpu", batch_size=BATCH, numbers="float32"
    )
    crops = np.stack([center_face(face).pixels for face in faces])
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
        detected = FaceDetector()([picture])[0]
        best = choose_face(detected, *picture.shape[:2])
        assert np.array_equal(found.boxes[row], detected.boxes[best])
        assert found.confidence[row] == detected.scores[best] > 0.9
        assert found.faces[row] == len(detected)
        crop = box_face(picture, tuple(detected.boxes[best].tolist()), 44, 1.0, 1)
        assert np.array_equal(embedder.vectors(crop.pixels[None])[0], found.vectors[row])


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
    for chosen, crop in ((center, center_face), (embedder, whole_face)):
        cut = [crop(picture) for picture in pictures]
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
    face = whole_face(draw(1)[0])
    found = embedder.embed_faces([reason, face, reason])
    assert found.skipped == [reason, None, reason]
    assert found.vectors.any(axis=1).tolist() == [False, True, False]
    assert embedder.embed_faces([reason]).skipped == [reason]


class Crowded(torch.nn.Module):
    """A network whose memory is full beyond so many faces."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        if len(faces) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return faces.flatten(1)[:, :512]


def test_batches_are_halved_where_memory_is_short(backbone, caplog):
    embedder = Embedder(backbone, crop="none", device="cpu", batch_size=32, numbers="float32")
    pixels = np.random.default_rng(1).integers(0, 256, (50, 160, 160, 3), dtype=np.uint8)
    embedder._network = Crowded(9)
    vectors = embedder.vectors(pixels)
    assert embedder.batch_size == 8
    assert [each.message for each in caplog.records if "batches of 8" in each.message]
    embedder._network = Crowded(50)
    assert np.array_equal(embedder.vectors(pixels), vectors)
    embedder._network = Crowded(0)
    with pytest.raises(BatchverifyError, match="no memory for a single face"):
        embedder.vectors(pixels)


def test_threads_that_run_out_of_memory_at_once_halve_the_batch_once(backbone):
    embedder = Embedder(backbone, crop="none", device="cpu", batch_size=32, numbers="float32")
    barrier = threading.Barrier(4)
    pixels = np.random.default_rng(1).integers(0, 256, (70, 160, 160, 3), dtype=np.uint8)

    class Together(Crowded):
        def forward(self, faces: torch.Tensor) -> torch.Tensor:
            if len(faces) > self.most:
                barrier.wait(10)
            return super().forward(faces)

    embedder._network = Together(16)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(embedder.vectors, [pixels] * 4))
    assert embedder.batch_size == 16
    assert all(np.array_equal(each, found[0]) for each in found)


def test_a_library_without_memory_is_known_by_its_words(backbone):
    class Library(Crowded):
        def forward(self, faces: torch.Tensor) -> torch.Tensor:
            if len(faces) > self.most:
                raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
            if len(faces) == 1:
                raise RuntimeError("something else")
            return super().forward(faces)

    embedder = Embedder(backbone, crop="none", device="cpu", batch_size=4, numbers="float32")
    embedder._network = Library(1)
    with pytest.raises(RuntimeError, match="something else"):
        embedder.vectors(np.zeros((3, 160, 160, 3), np.uint8))
    assert embedder.batch_size == 1


def test_blocks_are_halved_where_memory_is_too_small_to_find_faces(backbone, faces):
    embedder = Embedder(backbone, device="cpu", batch_size=BATCH)
    wanted, detector = embedder.find_faces(faces), embedder._detector

    class Small:
        blocks = GPU_BLOCKS

        def __call__(self, pictures, blocks):
            if blocks.refine > 100:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return detector(pictures, blocks)

    embedder._detector = Small()
    for ours, theirs in zip(embedder.find_faces(faces), wanted, strict=True):
        np.testing.assert_allclose(ours.box, theirs.box, atol=1e-3)
    Small.blocks = Blocks(1, 1, 1)
    embedder._detector = lambda pictures, blocks: Small()(pictures, GPU_BLOCKS)
    embedder._detector.blocks = Blocks(1, 1, 1)
    with pytest.raises(BatchverifyError, match="no memory to find a face"):
        embedder.find_faces(faces)


def test_the_largest_batch_tried_is_a_chunk():
    assert GPU_BATCHES[-1] == GPU_CHUNK


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
    with pytest.raises(UsageError, match=r"picture 1: must be \(H, W, 3\) uint8 RGB, got \("):
        embedder([*draw(1), picture])


def test_settings_that_make_no_sense(backbone):
    for settings, message in (
        ({"crop": "face"}, "crop must be one of detect, center, none"),
        ({"tta": "rotate"}, "tta must be"),
        ({"margin": -1}, "margin must be"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"numbers": "int8"}, "numbers must be auto, float32"),
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
    assert exact.compute_path == "cpu float32 winograd, batches of 2"
    fastest = "bfloat16" if cpu_has_bf16() else "float32"
    plain = Embedder(backbone, crop="none", device="cpu")
    assert (
        plain.compute_path == f"cpu {fastest} {kind_of_network('cpu', plain._dtype)}, batches of {CPU_BATCH}"
    )


def test_vectors_that_are_no_numbers_never_come_out(backbone):
    # The bias of the last batch-norm is beyond float16, within float32.
    tensors = {**backbone.tensors, "last_bn.bias": np.full(512, 1e6, np.float32)}
    broken = Embedder(
        Backbone("broken", tensors, "00"), crop="none", device="cpu", batch_size=1, numbers="float16"
    )
    with pytest.raises(BatchverifyError, match=r"vectors that are not finite .*float16"):
        broken(draw(1))


def test_an_embedder_takes_a_path(tmp_path):
    with pytest.raises(BatchverifyError, match=r"nothing.pt: no such weights file"):
        Embedder(tmp_path / "nothing.pt")
