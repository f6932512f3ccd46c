"""Detection: facenet-pytorch's boxes on real faces, its parts on random numbers, no neighbours' influence."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from facenet_pytorch import MTCNN
from facenet_pytorch.models.utils.detect_face import nms_numpy
from PIL import Image

from batchverify.faces.detection import (
    GPU_BATCH_SIZES,
    BatchSizes,
    Detections,
    FaceDetector,
    choose_face,
    smallest_face,
    suppress_contained,
)
from batchverify.faces.pyramid import Pyramid

# Sizes to which real pictures are stretched, (width, height); None keeps them.
SIZES = (
    None,
    None,
    None,
    None,
    (333, 187),
    (97, 241),
    (640, 480),
    (61, 60),
    (1200, 301),
    (777, 1031),
    (48, 44),
)


@pytest.fixture(scope="module", params=["openvino", "torch"])
def detector(request) -> FaceDetector:
    return FaceDetector.on(runtime=request.param)


@pytest.fixture(scope="module")
def faces(shared: Path) -> list[np.ndarray]:
    """Real pictures of many sizes and shapes; the last is a collage of six."""
    paths = sorted((shared / "data/lfw/lfw-deepfunneled").glob("*/*.jpg"))[::130][: len(SIZES)]
    originals = [Image.open(path).convert("RGB") for path in paths]
    assert len(originals) == len(SIZES)
    pictures = [image if size is None else image.resize(size) for image, size in zip(originals, SIZES, strict=True)]
    collage = Image.new("RGB", (760, 510), "grey")
    for i in range(6):
        collage.paste(originals[i], (255 * (i % 3), 255 * (i // 3)))
    return [np.asarray(image) for image in [*pictures, collage]]


@pytest.fixture(scope="module")
def found(detector, faces) -> list[Detections]:
    """What the detector finds in all faces, detected together."""
    return detector(faces)


def reference(pixels: np.ndarray, min_face: int) -> tuple[np.ndarray, np.ndarray]:
    """facenet-pytorch's boxes and scores, best score first."""
    return _reference(pixels.tobytes(), pixels.shape, min_face)


@cache
def _reference(data: bytes, shape: tuple[int, ...], min_face: int) -> tuple[np.ndarray, np.ndarray]:
    mtcnn = MTCNN(keep_all=True, select_largest=False, min_face_size=min_face)
    boxes, scores = mtcnn.detect(Image.fromarray(np.frombuffer(data, np.uint8).reshape(shape)))
    if boxes is None:
        return np.zeros((0, 4)), np.zeros(0)
    return boxes.astype(np.float64), scores.astype(np.float64)


def equal(one: Detections, other: Detections) -> bool:
    return np.array_equal(one.boxes, other.boxes) and np.array_equal(one.scores, other.scores)


@pytest.mark.weights
@pytest.mark.parametrize("blocks", [GPU_BATCH_SIZES, BatchSizes(3, 5, 7), BatchSizes(1, 1, 1)])
def test_the_size_of_blocks_moves_no_box(detector, faces, found, blocks):
    upside_down = faces[0][::-1].copy()
    pictures, wanted = [*faces, *faces[:4], upside_down], [*found, *found[:4], *detector([upside_down])]
    if blocks.smallest:  # one patch after the other takes long: the collage and some others are enough
        pictures, wanted = pictures[-6:], wanted[-6:]
    other = FaceDetector(detector.networks, blocks)
    for ours, theirs in zip(other(pictures), wanted, strict=True):
        np.testing.assert_allclose(ours.boxes, theirs.boxes, rtol=0, atol=1e-3)
        np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=1e-5)


def test_blocks_are_halved_down_to_one():
    assert GPU_BATCH_SIZES.halved() == BatchSizes(4, 256, 64)
    assert BatchSizes(1, 3, 2).halved() == BatchSizes(1, 1, 1)
    assert BatchSizes(1, 1, 1).smallest and not BatchSizes(1, 2, 1).smallest


@pytest.mark.weights
def test_boxes_and_scores_are_facenet_pytorchs(faces, found):
    for pixels, ours in zip(faces, found, strict=True):
        boxes, scores = reference(pixels, smallest_face(*pixels.shape[:2]))
        assert len(ours) == len(boxes), pixels.shape
        np.testing.assert_allclose(ours.boxes, boxes, rtol=0, atol=1e-3)
        np.testing.assert_allclose(ours.scores, scores, rtol=0, atol=1e-5)
    assert sum(len(ours) > 0 for ours in found) >= 9
    assert len(found[-1]) >= 6


@pytest.mark.weights
def test_another_smallest_face_is_facenet_pytorchs(detector, faces):
    for min_face in (35, 120):
        ours = FaceDetector(detector.networks, detector.blocks, min_face=min_face)([faces[-1]])[0]
        boxes, scores = reference(faces[-1], min_face)
        np.testing.assert_allclose(ours.boxes, boxes, rtol=0, atol=1e-3)
        np.testing.assert_allclose(ours.scores, scores, rtol=0, atol=1e-5)
        assert len(ours) >= 6


@pytest.mark.weights
def test_an_images_faces_do_not_depend_on_its_neighbours(detector, faces, found):
    backwards = detector(faces[::-1])[::-1]
    beside_nothing = detector([np.zeros((1, 1, 3), np.uint8), faces[0], np.zeros((90, 90, 3), np.uint8)])
    for pixels, first, second in zip(faces, found, backwards, strict=True):
        assert equal(first, second)
        assert equal(first, detector([pixels])[0])
    assert [len(each) > 0 for each in beside_nothing] == [False, True, False]
    assert equal(beside_nothing[1], found[0])


@pytest.mark.weights
def test_pictures_that_are_views_give_the_same_faces(detector, faces):
    mirrored = faces[0][:, ::-1]
    assert equal(detector([mirrored])[0], detector([np.ascontiguousarray(mirrored)])[0])


@pytest.mark.weights
def test_the_chosen_face_is_the_middle_one(detector, faces):
    collage = faces[-1]
    found = detector([collage])[0]
    chosen = found.boxes[choose_face(found, *collage.shape[:2])]
    assert 255 < (chosen[0] + chosen[2]) / 2 < 505


@pytest.mark.parametrize(
    "size", [(1, 1), (5, 5), (11, 300), (300, 11), (12, 12), (19, 500), (20, 20), (21, 900), (60, 60)]
)
def test_pictures_without_a_face(detector, size):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for pixels in (noise, np.zeros_like(noise), np.full_like(noise, 255)):
        found = detector([pixels])[0]
        assert len(found) == 0
        assert found.boxes.shape == (0, 4)
        assert found.scores.shape == (0,)


def test_no_pictures_no_results(detector):
    assert detector([]) == []


class Stubborn:
    """Networks that see a face in the first cell of the largest level, and shift every box alike."""

    def __init__(self, shift: tuple[float, float, float, float]) -> None:
        self.shift = shift

    def propose(self, canvases: np.ndarray, scales: Pyramid) -> np.ndarray:
        rows, columns = ((side - 1) // 2 - 4 for side in canvases.shape[1:3])
        answers = np.zeros((len(canvases), rows, columns, 6), np.float32)
        answers[:, 0, 0, 1] = 9
        return answers

    def refine(self, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full((len(patches), 4), self.shift, np.float32), np.full(len(patches), 0.99, np.float32)

    def output(self, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((len(patches), 4), np.float32), np.full(len(patches), 0.99, np.float32)


@pytest.mark.parametrize("shift", [(-3.0, 0.0, -3.0, 0.0), (0.0, 9.0, 0.0, 9.0), (9.0, 9.0, 9.0, 9.0)])
def test_candidates_that_the_second_network_moves_out_of_the_image_are_dropped(shift):
    pixels = np.zeros((60, 60, 3), np.uint8)
    assert len(FaceDetector(Stubborn((0, 0, 0, 0)), BatchSizes())([pixels])[0]) > 0
    assert len(FaceDetector(Stubborn(shift), BatchSizes())([pixels])[0]) == 0


def random_boxes(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    dice = np.random.default_rng(seed)
    low = dice.uniform(-20, 200, (count, 2))
    boxes = np.concatenate([low, low + dice.uniform(5, 120, (count, 2))], axis=1).astype(np.float32)
    return boxes, dice.uniform(0.7, 1, count).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_suppression_is_facenet_pytorchs(count):
    suppressed = 0
    for seed in range(30):
        boxes, scores = random_boxes(seed, count)
        kept = suppress_contained(boxes, scores)
        assert kept.tolist() == nms_numpy(boxes, scores, 0.7, "Min").tolist()
        suppressed += count - len(kept)
    assert (suppressed > 0) == (count > 1)


def test_suppression_of_nothing():
    assert suppress_contained(np.zeros((0, 4), np.float32), np.zeros(0, np.float32)).shape == (0,)


def test_the_choice_is_facenet_pytorchs():
    mtcnn = MTCNN(selection_method="center_weighted_size")
    other_than_largest = 0
    for seed in range(40):
        boxes, scores = random_boxes(seed, 6)
        found = Detections(boxes, scores)
        image = Image.new("RGB", (260, 190))
        box, _, _ = mtcnn.select_boxes(boxes, scores, np.zeros((6, 5, 2)), image, method="center_weighted_size")
        index = choose_face(found, image.height, image.width)
        assert np.array_equal(boxes[index], box[0])
        for rule, method in (("largest", "largest"), ("probable", "probability")):
            box, _, _ = mtcnn.select_boxes(boxes, scores, np.zeros((6, 5, 2)), image, method=method)
            assert np.array_equal(boxes[choose_face(found, image.height, image.width, rule)], box[0])
        other_than_largest += index != choose_face(found, image.height, image.width, "largest")
    assert other_than_largest > 10


@pytest.mark.parametrize(
    ("height", "width", "wanted"),
    [
        (1, 1, 20),
        (250, 250, 20),
        (480, 9000, 20),
        (491, 491, 20),
        (493, 9000, 21),
        (2048, 1536, 64),
        (4000, 3000, 125),
    ],
)
def test_the_smallest_face_follows_the_shorter_side(height, width, wanted):
    assert smallest_face(height, width) == wanted == smallest_face(width, height)
