"""RetinaFace: the published network, faces of all sizes, places and turns, and no neighbours' influence."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from repository import REPOSITORY
from torch import nn
from torch.nn.functional import interpolate, relu
from torch_threads import one_torch_thread

from batchverify.embedding.embedder import Embedder
from batchverify.faces.detection import BatchSizes, Detections, choose_face
from batchverify.faces.detectors import build_detector
from batchverify.faces.retinaface import RetinaFaceDetector
from batchverify.faces.retinaface_network import ANCHORS, STRIDES, OpenvinoNetwork, weights_path
from batchverify.faces.retinaface_torch import TorchNetwork
from batchverify.fingerprint import EmbeddingSettings
from batchverify.records import Reason, Skipped
from batchverify.runtime.compiled_network import capabilities

sys.path.insert(0, str(REPOSITORY / "jobs"))

from make_retinaface import EPSILON, retinaface_bytes

SAMPLES = sorted((REPOSITORY / "sample_manifests" / "faces").glob("*.jpg"))
needs_bfloat16 = pytest.mark.skipif("BF16" not in capabilities(), reason="this CPU does not multiply bfloat16")
PUBLISHED = "weights/compact/retinaface-m025/mobilenet0.25_Final.pth"


@pytest.fixture(scope="module")
def detector() -> RetinaFaceDetector:
    return RetinaFaceDetector.on()


@pytest.fixture(scope="module")
def drawn() -> list[np.ndarray]:
    """Six drawn faces of different people, about 230 pixels high."""
    return [np.asarray(Image.open(path).convert("RGB")) for path in SAMPLES[::4]]


@pytest.fixture(scope="module")
def found(detector, drawn) -> list[Detections]:
    return detector(drawn)


def resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def pasted(image: np.ndarray, width: int, height: int, left: int, top: int) -> np.ndarray:
    """The image on grey; what does not fit is cut off."""
    canvas = Image.new("RGB", (width, height), (120, 125, 130))
    canvas.paste(Image.fromarray(image), (left, top))
    return np.asarray(canvas)


def equal(one: Detections, other: Detections) -> bool:
    arrays = [(getattr(one, name), getattr(other, name)) for name in ("boxes", "scores", "landmarks", "rotation")]
    return all(np.array_equal(*pair) for pair in arrays)


def near(one: Detections, other: Detections, pixels: float) -> bool:
    """Whether both hold the same faces to so many pixels."""
    return (
        len(one) == len(other)
        and np.abs(one.boxes - other.boxes).max() <= pixels
        and np.abs(one.landmarks - other.landmarks).max() <= pixels
    )


class Published(nn.Module):
    """The published network, module by module, under the names of its state dict."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((8, 16, 32, 32, 64, 64), (128,) * 6, (256, 256))
        self.body, self.fpn, channels = nn.ModuleDict(), nn.ModuleDict(), 3
        for stage, outputs in enumerate(sizes, 1):
            layers = []
            for number, output in enumerate(outputs):
                stride = 2 if number == 0 or (stage == 1 and number in (2, 4)) else 1
                if channels == 3:
                    layers.append(self.normalised(3, output, 3, stride, 0.1))
                else:
                    depthwise = self.normalised(channels, channels, 3, stride, 0.1, channels)
                    pointwise = self.normalised(channels, output, 1, 1, 0.1)
                    layers.append(nn.Sequential(*depthwise, *pointwise))
                channels = output
            self.body[f"stage{stage}"] = nn.Sequential(*layers)
            self.fpn[f"output{stage}"] = self.normalised(channels, 64, 1, 1, 0.1)
        self.fpn["merge1"], self.fpn["merge2"] = (self.normalised(64, 64, 3, 1, 0.1) for _ in range(2))
        for level in (1, 2, 3):
            parts = {
                "conv3X3": self.normalised(64, 32, 3, 1),
                "conv5X5_1": self.normalised(64, 16, 3, 1, 0.1),
                "conv5X5_2": self.normalised(16, 16, 3, 1),
                "conv7X7_2": self.normalised(16, 16, 3, 1, 0.1),
                "conv7x7_3": self.normalised(16, 16, 3, 1),
            }
            setattr(self, f"ssh{level}", nn.ModuleDict(parts))
        for name, count in (("Class", 4), ("Bbox", 8), ("Landmark", 20)):
            heads = [nn.ModuleDict({"conv1x1": nn.Conv2d(64, count, 1)}) for _ in range(3)]
            setattr(self, f"{name}Head", nn.ModuleList(heads))

    @staticmethod
    def normalised(
        inputs: int, outputs: int, side: int, stride: int, slope: float = 1.0, groups: int = 1
    ) -> nn.Sequential:
        convolution = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
        layers = [convolution, nn.BatchNorm2d(outputs, EPSILON)]
        return nn.Sequential(*layers, *([nn.LeakyReLU(slope)] if slope < 1 else []))

    def forward(self, values: torch.Tensor) -> list[torch.Tensor]:
        """(B, A, 2) logits of no face and of a face, (B, A, 4) boxes, (B, A, 10) landmarks."""
        stages = []
        for stage in (1, 2, 3):
            values = self.body[f"stage{stage}"](values)
            stages.append(self.fpn[f"output{stage}"](values))
        for level in (1, 0):
            above = interpolate(stages[level + 1], size=stages[level].shape[2:], mode="nearest")
            stages[level] = self.fpn[f"merge{level + 1}"](stages[level] + above)
        outputs: list[list[torch.Tensor]] = [[], [], []]
        for level, stage in enumerate(stages):
            ssh = getattr(self, f"ssh{level + 1}")
            middle = ssh["conv5X5_1"](stage)
            far = ssh["conv7x7_3"](ssh["conv7X7_2"](middle))
            joined = relu(torch.cat([ssh["conv3X3"](stage), ssh["conv5X5_2"](middle), far], 1))
            for output, head, width in zip(outputs, ("Class", "Bbox", "Landmark"), (2, 4, 10), strict=True):
                values = getattr(self, f"{head}Head")[level]["conv1x1"](joined)
                output.append(values.permute(0, 2, 3, 1).reshape(len(values), -1, width))
        return [torch.cat(output, 1) for output in outputs]


class PublishedNetwork:
    """The published network in the place of ours."""

    def __init__(self, path: Path) -> None:
        self.network = Published().eval()
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})

    @torch.inference_mode()
    def __call__(self, canvases: np.ndarray) -> np.ndarray:
        blue_first = torch.from_numpy(canvases[..., ::-1].astype(np.float32)) - torch.tensor([104.0, 117, 123])
        classes, boxes, landmarks = self.network(blue_first.permute(0, 3, 1, 2))
        return torch.cat([classes[..., 1:] - classes[..., :1], boxes, landmarks], 2).numpy()


@pytest.mark.weights
def test_sixteen_bits_and_folding_move_no_face_by_a_twentieth_of_a_pixel(shared, drawn):
    paths = sorted((shared / "data/lfw/lfw-deepfunneled").glob("*/*.jpg"))[::600]
    images = [*drawn, *(np.asarray(Image.open(path).convert("RGB")) for path in paths)]
    published = RetinaFaceDetector(PublishedNetwork(shared / PUBLISHED), BatchSizes())
    for ours, theirs in zip(RetinaFaceDetector.on()(images), published(images), strict=True):
        # Bystanders that are hardly seen move more than the face itself.
        assert near(ours, theirs, 0.25)
        assert np.abs(ours.landmarks[0] - theirs.landmarks[0]).max() < 0.05
        assert abs(ours.scores[0] - theirs.scores[0]) < 1e-3


@pytest.mark.weights
def test_faces_upside_down_are_seldom_taken_for_upright_ones(shared, detector):
    paths = sorted((shared / "data/lfw/lfw-deepfunneled").glob("*/*.jpg"))[::25]
    found = detector([np.asarray(Image.open(path).convert("RGB"))[::-1, ::-1] for path in paths])
    assert len(found) >= 200
    assert sum(faces.rotation != 180 for faces in found) <= 5


@pytest.mark.weights
def test_the_job_still_makes_the_packaged_bytes(shared):
    assert retinaface_bytes(shared / PUBLISHED) == weights_path().read_bytes()


one_thread = pytest.fixture(scope="module", autouse=True)(one_torch_thread)


def test_openvino_and_torch_find_the_same(drawn, found):
    canvases = np.random.default_rng(1).integers(0, 256, (2, 192, 128, 3), dtype=np.uint8)
    np.testing.assert_allclose(OpenvinoNetwork()(canvases), TorchNetwork("cpu")(canvases), atol=2e-3)
    for ours, theirs in zip(found, RetinaFaceDetector.on("cpu", "torch")(drawn), strict=True):
        assert near(ours, theirs, 1e-3)


class Altered:
    """The network with other logits; counts its images."""

    def __init__(self, change):
        self.network, self.change, self.images = OpenvinoNetwork(), change, 0

    def __call__(self, canvases: np.ndarray) -> np.ndarray:
        values = self.network(canvases)
        self.images += int(canvases.any(axis=(1, 2, 3)).sum())
        values[..., 0] = self.change(values[..., 0])
        return values


def test_clear_faces_are_taken_from_the_quick_network(drawn, found):
    exact, quick = Altered(lambda logits: logits), Altered(lambda logits: logits + np.float32(0.04))
    detector = RetinaFaceDetector(exact, BatchSizes(), quick=quick)
    for image, wanted in zip(drawn, found, strict=True):
        before = exact.images
        faces = detector([image])[0]
        if exact.images > before:
            assert equal(faces, wanted)
        else:
            assert np.array_equal(faces.boxes, wanted.boxes) and faces.scores[0] > wanted.scores[0]
    # Of six faces some are clear, whichever machine this is.
    assert quick.images == len(drawn) and exact.images < len(drawn)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits - 100,
        lambda logits: np.minimum(logits, np.float32(3.4)),
        lambda logits: logits - logits.max(axis=1, keepdims=True) + np.float32(0.1),
        lambda logits: logits - logits.max(axis=1, keepdims=True) - np.float32(0.1),
        lambda logits: np.minimum(logits, np.sort(logits, axis=1)[:, -2:-1]),
    ],
    ids=["no face", "doubtful", "hardly a face", "nearly a face", "two boxes alike"],
)
def test_all_other_images_go_through_the_exact_network(change, drawn, found):
    exact = Altered(lambda logits: logits)
    detector = RetinaFaceDetector(exact, BatchSizes(), quick=Altered(change))
    assert all(equal(*each) for each in zip(detector(drawn), found, strict=True))
    assert exact.images == len(drawn)


@pytest.mark.parametrize(("sides", "searched_again"), [((230, 120), False), ((120, 230), True), ((200, 200), True)])
def test_a_doubtful_bystander_counts_if_it_might_be_chosen(sides, searched_again, drawn):
    """Two faces, the right one hardly a face to the quick network."""
    image = np.full((256, 512, 3), 127, np.uint8)
    for number, side in enumerate(sides):
        left = 256 * number + (256 - side) // 2
        image[:side, left : left + side] = resized(drawn[number], side, side)
    columns = [
        np.broadcast_to(np.arange(512 // stride)[:, None] * stride, (256 // stride, 512 // stride, len(each)))
        for stride, each in zip(STRIDES, ANCHORS, strict=True)
    ]
    right = np.concatenate([each.ravel() for each in columns]) >= 256

    def doubted(logits: np.ndarray) -> np.ndarray:
        return np.where(right, logits - logits[:, right].max(axis=1, keepdims=True) + np.float32(0.1), logits)

    exact = Altered(lambda logits: logits)
    faces = RetinaFaceDetector(exact, BatchSizes(), quick=Altered(doubted))([image])[0]
    assert len(faces) == 2 and exact.images == searched_again


class Stated:
    """A network that finds upright faces: their logits, and their boxes in canvases of 256 x 512. Counts calls."""

    def __init__(self, *faces: tuple[float, tuple[int, int, int, int]]) -> None:
        count = sum(
            256 // stride * 512 // stride * len(sides) for stride, sides in zip(STRIDES, ANCHORS, strict=True)
        )
        self.values, self.calls, side = np.full((1, count, 15), -100, np.float32), 0, ANCHORS[0][0]
        for number, (logit, (x0, y0, x1, y1)) in enumerate(faces):
            anchor = np.array([(number + 0.5) * STRIDES[0], STRIDES[0] / 2])
            centre, extent = np.array([x0 + x1, y0 + y1]) / 2, np.array([x1 - x0, y1 - y0])
            points = centre - anchor + np.outer((-0.2, -0.2, 0, 0.2, 0.2), (0, y1 - y0))
            shifts = np.concatenate([[centre - anchor], points]) / (0.1 * side)
            row = [logit, *shifts[0], *(np.log(extent / side) / 0.2), *shifts[1:].ravel()]
            self.values[0, number * len(ANCHORS[0])] = row

    def __call__(self, canvases: np.ndarray) -> np.ndarray:
        self.calls += 1
        return self.values


MIDDLE = (6.0, (196, 68, 316, 188))


@pytest.mark.parametrize(
    ("faces", "exactly", "rule"),
    [
        ((MIDDLE,), None, None),
        ((MIDDLE, (5.0, (400, 100, 460, 160))), None, None),
        ((MIDDLE, (5.0, (390, 80, 480, 170)), (4.98, (392, 82, 482, 172))), None, None),
        ((MIDDLE, (5.9, (400, 100, 460, 160))), (MIDDLE, (6.05, (400, 100, 460, 160))), "probable"),
        ((MIDDLE, (5.0, (380, 60, 498, 178))), (MIDDLE, (5.0, (379, 59, 500, 180))), "largest"),
        (
            (MIDDLE, (5.0, (390, 80, 480, 170)), (4.98, (360, 65, 500, 175))),
            (MIDDLE, (4.98, (390, 80, 480, 170)), (5.0, (360, 65, 500, 175))),
            "largest",
        ),
        (
            ((6.0, (236, 108, 276, 148)), (5.0, (295, 28, 495, 228))),
            ((6.0, (236, 108, 276, 148)), (5.0, (294, 27, 496, 229))),
            "center",
        ),
    ],
    ids=["alone", "small", "doubtful", "as probable", "as large", "doubtful, and may be large", "large, far off"],
)
def test_a_bystander_that_exact_numbers_might_choose_is_searched_again(faces, exactly, rule):
    """exactly, rule: what more exact numbers might find, and the rule that then chooses another face."""
    quick, exact = Stated(*faces), Stated(*(exactly or faces))
    image = np.zeros((256, 512, 3), np.uint8)
    RetinaFaceDetector(exact, BatchSizes(), quick=quick)([image])
    assert (quick.calls, exact.calls) == (1, int(exactly is not None))
    if rule is not None:
        found = [RetinaFaceDetector(each, BatchSizes())([image])[0] for each in (quick, exact)]
        chosen = [each.boxes[choose_face(each, 256, 512, rule)] for each in found]
        assert np.abs(chosen[0] - chosen[1]).max() > 50


def test_the_quick_network_is_bfloat16_where_the_backbone_is():
    settings = EmbeddingSettings("align", detector="retinaface")
    for dtype in ("float32", "int8_float32", "float16"):
        assert build_detector(settings, "cpu", "openvino", dtype=dtype).quick is None
    for dtype in ("bfloat16", "int8_bfloat16"):
        assert build_detector(settings, "cpu", "openvino", dtype=dtype).quick is not None
        assert build_detector(settings, "cpu", "torch", dtype=dtype).quick is None


@needs_bfloat16
def test_bfloat16_finds_the_same_faces(detector, drawn):
    images = [*drawn, *(pasted(each, 320, 300, 30, 40) for each in drawn), np.zeros((90, 70, 3), np.uint8)]
    quick = RetinaFaceDetector.on(bfloat16=True)
    found = quick(images)
    for ours, theirs in zip(found, detector(images), strict=True):
        assert len(ours) == len(theirs) and (not len(theirs) or near(ours, theirs, 1))
    for image, faces in zip(images, found, strict=True):
        assert equal(quick([image])[0], faces)


@needs_bfloat16
@pytest.mark.weights
def test_bfloat16_moves_no_face_far(shared):
    paths = sorted((shared / "data/lfw/lfw-deepfunneled").glob("*/*.jpg"))[::25]
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    vectors = []
    for bfloat16 in (False, True):
        embedder = Embedder("compact", device="cpu", dtype="float32")
        embedder._detector = RetinaFaceDetector.on(bfloat16=bfloat16)
        vectors.append(embedder(images).vectors)
    cosines = (vectors[0] * vectors[1]).sum(axis=1)
    assert len(cosines) >= 200 and cosines.mean() > 0.9995 and cosines.min() > 0.995


def test_every_face_has_a_box_and_five_points_inside_it(drawn, found):
    for image, faces in zip(drawn, found, strict=True):
        assert len(faces) == 1 and faces.rotation == 0 and faces.scores[0] > 0.9
        assert (faces.boxes.dtype, faces.landmarks.dtype, faces.scores.dtype) == (np.float32,) * 3
        (x0, y0, x1, y1), points = faces.boxes[0], faces.landmarks[0]
        assert 0 < x0 < x1 < image.shape[1] and 0 < y0 < y1 < image.shape[0]
        assert ((points > (x0, y0)) & (points < (x1, y1))).all()
        left, right, nose, mouth, corner = points
        assert left[0] < nose[0] < right[0] and mouth[0] < corner[0] and left[1] < nose[1] < mouth[1]


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
def test_an_image_does_not_depend_on_its_neighbours(runtime, drawn):
    detector = RetinaFaceDetector.on("cpu", runtime)
    blank = np.zeros((90, 70, 3), np.uint8)
    images = [
        drawn[0],
        blank,
        np.rot90(drawn[1]),
        resized(drawn[2], 100, 90),
        drawn[3],
        np.zeros((1, 1, 3), np.uint8),
    ]
    together = detector(images)
    assert [len(each) for each in together] == [1, 0, 1, 1, 1, 0]
    for image, faces in zip(images, together, strict=True):
        assert equal(detector([image])[0], faces)
    for faces, backwards in zip(together, detector(images[::-1])[::-1], strict=True):
        assert equal(faces, backwards)
    assert detector([]) == []


@pytest.mark.parametrize("block", [3, 4])
def test_the_size_of_batches_moves_no_box(block, drawn, found):
    batched = RetinaFaceDetector(TorchNetwork("cpu"), BatchSizes(block, 1, 1))
    for ours, theirs in zip(batched(drawn), found, strict=True):
        assert near(ours, theirs, 1e-3)
    halved = batched(drawn, batched.blocks.halved())
    assert all(near(ours, theirs, 1e-3) for ours, theirs in zip(halved, found, strict=True))


@pytest.mark.parametrize("size", [(300, 640), (640, 300), (257, 1000), (1500, 1100), (2048, 600), (130, 120)])
def test_letter_boxing_moves_no_face(size, detector, drawn, found):
    """Images of all sizes and shapes; those that are reduced are a little less exact."""
    width, height = size
    side = round(min(width, height) * 0.8)
    image = pasted(resized(drawn[0], side, side), width, height, width - side - 5, height - side - 8)
    faces = detector([image])[0]
    scale = side / drawn[0].shape[0]
    wanted = found[0].landmarks[0] * scale + (width - side - 5, height - side - 8)
    assert np.abs(faces.landmarks[0] - wanted).max() < 0.04 * side


@pytest.mark.parametrize("place", ["left", "right", "top", "bottom", "corner"])
def test_faces_at_the_border(place, detector, drawn, found):
    x0, y0, x1, y1 = found[0].boxes[0].round().astype(int)
    tall, wide = y1 - y0, x1 - x0
    cut = {
        "left": drawn[0][:, x0 + wide // 5 :],
        "right": drawn[0][:, : x1 - wide // 5],
        "top": drawn[0][y0 + tall // 5 :],
        "bottom": drawn[0][: y1 - tall // 6],
        "corner": drawn[0][y0:, x0:],
    }[place]
    shift = {"left": (x0 + wide // 5, 0), "top": (0, y0 + tall // 5), "corner": (x0, y0)}.get(place, (0, 0))
    faces = detector([np.ascontiguousarray(cut)])[0]
    assert len(faces) == 1 and faces.rotation == 0
    assert np.abs(faces.landmarks[0] + shift - found[0].landmarks[0]).max() < 0.12 * wide


def test_several_faces_and_the_choice_among_them(detector, drawn):
    collage = np.full((250, 760, 3), 127, np.uint8)
    for number in range(3):
        side = (240, 200, 160)[number]
        collage[:side, number * 255 : number * 255 + side] = resized(drawn[number], side, side)
    faces = detector([collage])[0]
    assert len(faces) == 3
    assert list(faces.scores) == sorted(faces.scores, reverse=True)
    centres = (faces.boxes[:, 0] + faces.boxes[:, 2]) / 2
    assert 255 < centres[choose_face(faces, 250, 760)] < 500
    assert centres[choose_face(faces, 250, 760, "largest")] < 255


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_sideways_images_are_turned(turns, detector, drawn, found):
    for image, upright in zip(drawn, found, strict=True):
        faces = detector([np.rot90(image, turns)])[0]
        assert (len(faces), faces.rotation) == (1, 360 - 90 * turns)
        assert near(faces.turned_back(turns, *image.shape[:2]), upright, 1e-3)


@pytest.mark.parametrize("pixels", [36, 22, 16])
def test_the_smallest_faces(pixels, drawn, found):
    """Faces so many pixels high, alone in an image; below 20 they are searched for on demand."""
    height = found[0].boxes[0, 3] - found[0].boxes[0, 1]
    side = round(drawn[0].shape[0] * pixels / height)
    image = pasted(resized(drawn[0], side, side), 250, 200, 100, 90)
    default, small = RetinaFaceDetector.on(), RetinaFaceDetector.on(min_face=12)
    assert len(default([image])[0]) == (1 if pixels > 20 else 0)
    faces = small([image])[0]
    assert len(faces) == 1
    wanted = found[0].landmarks[0] * side / drawn[0].shape[0] + (100, 90)
    assert np.abs(faces.landmarks[0] - wanted).max() < 0.2 * pixels


def test_faces_below_the_smallest_are_left_out(drawn, found):
    height = float(found[0].boxes[0, 3] - found[0].boxes[0, 1])
    for least in (round(height * 0.9), round(height * 1.1)):
        faces = RetinaFaceDetector.on(min_face=least)([drawn[0]])[0]
        assert len(faces) == (least < height)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (20, 20), (90, 3000), (64, 64)])
def test_images_without_a_face(size, detector):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for image in (noise, np.zeros_like(noise), np.full_like(noise, 255)):
        faces = detector([image])[0]
        assert len(faces) == 0 and faces.rotation == 0
        assert (faces.boxes.shape, faces.landmarks.shape) == ((0, 4), (0, 5, 2))


def test_few_compiled_sizes_are_kept(drawn, found):
    network = OpenvinoNetwork(sizes_kept=2)
    detector = RetinaFaceDetector(network, BatchSizes())
    for side in (100, 180, 300):
        detector([resized(drawn[0], side, side)])
        assert len(network._of_thread.networks) <= 2
    assert equal(detector([drawn[0]])[0], found[0])


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(crop="align", detector="retinaface", device="cpu", dtype="float32", batch_size=1)


@pytest.mark.parametrize(
    "settings", [{"crop": "detect"}, {"crop": "align"}, {"crop": "align", "template": "reid-0095"}]
)
def test_sideways_images_give_upright_faces(settings, embedder, drawn):
    embedder.settings = EmbeddingSettings(detector="retinaface", **settings)
    upright = embedder.find_faces(drawn[:2])
    for turns in (1, 2, 3):
        sideways = embedder.find_faces([np.rot90(each, turns) for each in drawn[:2]])
        for face, wanted in zip(sideways, upright, strict=True):
            assert face.pixels.shape == (160, 160, 3)
            assert (face.rotation, wanted.rotation) == (360 - 90 * turns, 0)
            assert face.landmarks.shape == (5, 2) and face.faces == 1 and face.confidence > 0.9
            # A box ends at whole pixels, which may be others once it is turned.
            difference = np.abs(face.pixels.astype(int) - wanted.pixels).mean()
            assert difference < (0.05 if settings["crop"] == "align" else 8)


def test_faces_are_cut_from_the_large_image(embedder, drawn, found):
    """Detected in a copy of 2,048 pixels, aligned from the image itself."""
    large = resized(drawn[0], 3000, 3000)
    embedder.settings = EmbeddingSettings("align", detector="retinaface")
    face = embedder.find_faces([large])[0]
    wanted = found[0].landmarks[0] * 3000 / drawn[0].shape[0]
    assert np.abs(face.landmarks - wanted).max() < 0.02 * 3000
    assert face.scaled(0.5).landmarks[2].tolist() == (face.landmarks[2] * 0.5).tolist()


def test_points_that_are_no_face_are_no_face(embedder, drawn):
    embedder.settings = EmbeddingSettings("align", detector="retinaface")
    box, score = np.array([[10, 10, 90, 120]], np.float32), np.array([0.9], np.float32)
    nowhere = Detections(box, score, np.full((1, 5, 2), 30, np.float32))
    skipped = embedder._crop(drawn[0], drawn[0], nowhere)
    assert isinstance(skipped, Skipped) and skipped.reason == Reason.NO_FACE
