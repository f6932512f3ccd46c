"""Face detection with RetinaFace: boxes and five landmarks, in one pass over an image of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image

from batchverify.faces.detection import BatchSizes, Detections, face_values, smallest_face
from batchverify.faces.retinaface_network import ANCHORS, STRIDES, Network, OpenvinoNetwork
from batchverify.kernels.loops import suppress

# A face of the smallest size that is searched for has this many pixels in the canvas; more where nothing is found: of
# 200 faces of LFW reduced to 21 pixels the network found 125, and all once they were enlarged to 35 (measured).
SMALLEST_IN_CANVAS, SMALLEST_ENLARGED = 20, 32
# Sides of canvases: few, since the network is compiled for each size.
SIDES = (128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
# The network also finds faces that lie on their side or upside down, but crowds their points together. On upright
# faces the mouth is a quarter of the box's height below the eyes, or more (all 3,199 of LFW; 196 of 200 that were
# tilted by 30 degrees, 145 by 45). Of 1,800 faces that were turned, 1,757 were found, 57 of these with the mouth
# below the eyes and a probability as of upright ones, and a quarter of these with the mouth that far below. Of four
# turns the upright one was the most probable every time. A probability of .99 would leave almost none, but doubt 18 %
# of the upright faces of Families in the Wild, where .97 doubts 3 %.
LEAST_DOWN, LEAST_PROBABLE = 0.25, 0.97
# Of a face's probability (0.5), as a logit, and of two boxes' intersection over union.
LEAST_LOGIT = 0.0
OVERLAP = 0.4
# Logits in bfloat16 are off by up to 0.1, 1 in 100 by more, 1 in 1,000 by 0.25, but those of boxes on one face by
# about the same: of 1,999 training faces 37 had another most probable box than in float32, all by less than this.
LEAST_LEAD = 0.05
LARGEST_ERROR = 0.2
# Of the larger of two areas, and of distances from the image's centre beside it: sides are off by up to a fiftieth.
LARGEST_CHANGE = 0.1
# Below it, exact numbers might doubt a face.
_CLEAR_LOGIT = math.log(LEAST_PROBABLE / (1 - LEAST_PROBABLE)) + LARGEST_ERROR
# Candidates of an image that are compared with one another, the most probable first.
MOST_CANDIDATES = 2000
# Of the offsets of centres, and of the logarithms of sides (Liu et al. 2016, SSD).
VARIANCES = (0.1, 0.2)
# Images that go through the network together. On a CPU that makes small ones faster (a tenth at 256 pixels, a sixth
# at 128), and larger ones not.
GPU_IMAGES, CPU_IMAGES = 32, 4
CPU_PIXELS = 256 * 256
# Images that are best given at once: of mixed sizes, the last batch of each size is not full.
GROUP = 128


class RetinaFaceDetector:
    """RetinaFace (Deng et al. 2019, arXiv 1905.00641) on MobileNet 0.25, in a packaged form.

    Call it with a sequence of (H, W, 3) uint8 RGB images of any size; it returns one `Detections`, with landmarks,
    for each. Where it finds nothing, it enlarges the image. Where there is still nothing, or the most probable face
    may lie on its side, it turns the image by 90, 180 and 270 degrees and takes the turn with the most probable face.
    The result for an image does not depend on the other images of the call: batches are filled up with black ones.
    most_pixels: of a canvas; images that need a larger one go through the network alone. quick: the same network in
    numbers that are less exact. Where it finds clear faces, they are taken; all other images go through `network`.
    """

    group = GROUP

    def __init__(
        self,
        network: Network,
        blocks: BatchSizes,
        *,
        min_face: int | None = None,
        most_pixels: int = SIDES[-1] ** 2,
        quick: Network | None = None,
    ) -> None:
        self.network, self.quick, self.blocks = network, quick, blocks
        self.min_face, self.most_pixels = min_face, most_pixels

    @classmethod
    def on(
        cls,
        device: str = "cpu",
        runtime: str = "openvino",
        *,
        min_face: int | None = None,
        threads: int = 1,
        bfloat16: bool = False,
    ) -> RetinaFaceDetector:
        """The detector for a resolved device and runtime.

        With OpenVINO, threads: CPUs for each calling thread; bfloat16: look for clear faces in this type.
        """
        quick = None
        if runtime == "openvino":
            network: Network = OpenvinoNetwork(threads)
            quick = OpenvinoNetwork(threads, float_type="bfloat16") if bfloat16 else None
        else:
            from batchverify.faces.retinaface_torch import TorchNetwork

            network = TorchNetwork(device)
        if device == "cpu":
            blocks = BatchSizes(CPU_IMAGES, 1, 1)
            return cls(network, blocks, min_face=min_face, most_pixels=CPU_PIXELS, quick=quick)
        return cls(network, BatchSizes(GPU_IMAGES, 1, 1), min_face=min_face)

    def __call__(self, images: Sequence[np.ndarray], blocks: BatchSizes | None = None) -> list[Detections]:
        """Detect the faces of each image; an image without a face gives `Detections` of length 0."""
        block = (blocks or self.blocks).images
        found = self._look(images, block)
        lost = [number for number, faces in enumerate(found) if not len(faces)]
        enlarged = self._detect([images[number] for number in lost], block, enlarge=True)
        for number, faces in zip(lost, enlarged, strict=True):
            found[number] = faces
        doubtful = [number for number, faces in enumerate(found) if not _is_upright(faces)]
        for turns in (1, 2, 3):
            turned = [np.rot90(images[number], turns) for number in doubtful]
            for number, faces in zip(doubtful, self._detect(turned, block), strict=True):
                if faces.scores.max(initial=0) > found[number].scores.max(initial=0):
                    found[number] = faces.turned_back(turns, *images[number].shape[:2])
        return found

    def _look(self, images: Sequence[np.ndarray], block: int) -> list[Detections]:
        """The faces of images as they are, by the quick network where its results are clear."""
        if self.quick is None:
            return self._detect(images, block)
        candidates = self._search(self.quick, images, block)
        found = [each.faces() for each in candidates]
        unclear = [number for number, each in enumerate(candidates) if not each.clear]
        searched_again = self._detect([images[number] for number in unclear], block)
        for number, faces in zip(unclear, searched_again, strict=True):
            found[number] = faces
        return found

    def _detect(self, images: Sequence[np.ndarray], block: int, enlarge: bool = False) -> list[Detections]:
        """The faces of images as they are, or enlarged so that small faces are found, too."""
        return [candidates.faces() for candidates in self._search(self.network, images, block, enlarge)]

    def _search(
        self, network: Network, images: Sequence[np.ndarray], block: int, enlarge: bool = False
    ) -> list[_Candidates]:
        """What may be a face in each image, by one of the networks."""
        found: dict[int, _Candidates] = {}
        smallest = [self.min_face or smallest_face(*image.shape[:2]) for image in images]
        sizes = [
            _fitted((image.shape[0], image.shape[1]), least, enlarge)
            for image, least in zip(images, smallest, strict=True)
        ]
        canvases: dict[tuple[int, int], list[int]] = {}
        for number, size in enumerate(sizes):
            canvases.setdefault((_side(size[0]), _side(size[1])), []).append(number)
        for canvas, numbers in canvases.items():
            together = block if canvas[0] * canvas[1] <= self.most_pixels else 1
            for start in range(0, len(numbers), together):
                batch = numbers[start : start + together]
                boxed = np.zeros((together, *canvas, 3), np.uint8)
                for row, number in enumerate(batch):
                    height, width = sizes[number]
                    boxed[row, :height, :width] = _resized(images[number], height, width)
                for number, values in zip(batch, network(boxed), strict=False):
                    size = (images[number].shape[0], images[number].shape[1])
                    scale = np.divide(size, sizes[number])[::-1].astype(np.float32)
                    found[number] = _candidates(values, _anchors(*canvas), scale, smallest[number], size)
        return [found[number] for number in range(len(images))]


def _is_upright(faces: Detections) -> bool:
    """Whether there is a face, and the most probable one certainly does not lie on its side or upside down."""
    if not len(faces) or faces.landmarks is None or faces.scores[0] < LEAST_PROBABLE:
        return False
    left_eye, right_eye, _, left_corner, right_corner = faces.landmarks[0][:, 1]
    _, top, _, bottom = faces.boxes[0]
    return bool((left_corner + right_corner) - (left_eye + right_eye) >= 2 * LEAST_DOWN * (bottom - top))


def _fitted(size: tuple[int, int], smallest: int, enlarge: bool) -> tuple[int, int]:
    """The size at which an image is searched: the smallest face has enough pixels, and it fits into a canvas."""
    scale = SMALLEST_ENLARGED / smallest if enlarge else min(1.0, SMALLEST_IN_CANVAS / smallest)
    scale = min(scale, SIDES[-1] / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _side(length: int) -> int:
    """The side of the canvas for an image's side."""
    return next(side for side in SIDES if side >= length)


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0))


@lru_cache(maxsize=64)
def _anchors(height: int, width: int) -> np.ndarray:
    """The anchors of a canvas in the network's order: (A, 3) float32 centre x, centre y and side, in pixels."""
    levels = []
    for stride, sides in zip(STRIDES, ANCHORS, strict=True):
        y, x, side = np.meshgrid(
            (np.arange(height // stride) + 0.5) * stride,
            (np.arange(width // stride) + 0.5) * stride,
            sides,
            indexing="ij",
        )
        levels.append(np.stack([x, y, side], axis=-1).reshape(-1, 3))
    return np.concatenate(levels).astype(np.float32)


def _candidates(
    values: np.ndarray, anchors: np.ndarray, scale: np.ndarray, smallest: int, size: tuple[int, int]
) -> _Candidates:
    """What may be a face in one image.

    values: (A, 15) float32 of its canvas. scale: (2,) pixels of the image per pixel of the canvas, across and down.
    smallest: faces with a shorter longer side are dropped. size: height and width of the image.
    """
    # `take` for few rows: indexing costs several times as much.
    likely = np.flatnonzero(values[:, 0] >= LEAST_LOGIT - LARGEST_ERROR)
    likely = likely[np.argsort(-values[likely, 0], kind="stable")][:MOST_CANDIDATES]
    values, anchors = values.take(likely, axis=0), anchors.take(likely, axis=0)
    centres, sides = anchors[:, :2], anchors[:, 2:]
    middles = centres + values[:, 1:3] * (VARIANCES[0] * sides)
    halves = sides * np.exp(values[:, 3:5] * VARIANCES[1]) / 2
    boxes = np.concatenate([(middles - halves) * scale, (middles + halves) * scale], axis=1)
    large = np.flatnonzero((boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0) >= smallest)
    values, anchors, boxes = (rows.take(large, axis=0) for rows in (values, anchors, boxes))
    return _Candidates(values, anchors, boxes, scale, size)


@dataclass(frozen=True)
class _Candidates:
    """What may be a face in one image, the most probable first, down to a little below `LEAST_LOGIT`.

    values: (K, 15) float32. anchors: (K, 3) float32. boxes: (K, 4) float32, in pixels of the image. scale: (2,)
    pixels of the image per pixel of the canvas. size: height and width of the image.
    """

    values: np.ndarray
    anchors: np.ndarray
    boxes: np.ndarray
    scale: np.ndarray
    size: tuple[int, int]

    @cached_property
    def _kept(self) -> np.ndarray:
        """The indices that remain after suppression."""
        return suppress(self.boxes, np.arange(len(self.boxes)), OVERLAP)

    def faces(self) -> Detections:
        """The faces, best score first."""
        kept = self._kept[self.values[self._kept, 0] >= LEAST_LOGIT]
        values, anchors = self.values.take(kept, axis=0), self.anchors.take(kept, axis=0)
        centres, sides = anchors[:, None, :2], anchors[:, None, 2:]
        landmarks = centres + values[:, 5:].reshape(-1, 5, 2) * (VARIANCES[0] * sides)
        scores = 1 / (1 + np.exp(-values[:, 0]))
        return Detections(self.boxes.take(kept, axis=0), scores, landmarks * self.scale)

    @property
    def clear(self) -> bool:
        """Whether more exact numbers would choose the same face by the same box, and not doubt it.

        By any rule of `choose_face`. Other faces may be doubtful if none of them might be chosen.
        """
        logits = self.values.take(self._kept, axis=0)[:, 0]
        if not len(logits) or logits[0] < _CLEAR_LOGIT:
            return False
        rivals = self._rivals(logits)
        is_sure = ~rivals.any(axis=1) & (np.abs(logits - LEAST_LOGIT) >= LARGEST_ERROR)
        if not is_sure[0] or len(logits) == 1:
            return bool(is_sure[0])
        # A doubtful face may get the box of a rival.
        others = np.flatnonzero(rivals.any(axis=0))
        rows = np.concatenate([self._kept, others])
        rules = face_values(self.boxes.take(rows, axis=0), self.values.take(rows, axis=0)[:, 0], *self.size)
        return all(_leads(rule, rules, is_sure) for rule in rules)

    def _rivals(self, logits: np.ndarray) -> np.ndarray:
        """(F, K) bool for the (F,) logits of the faces: boxes that may be more probable by more exact numbers."""
        leads = np.where(logits >= _CLEAR_LOGIT, LEAST_LEAD, LARGEST_ERROR)
        rivals = self.values[:, 0] > (logits - leads)[:, None]
        rivals[np.arange(len(logits)), self._kept] = False
        return rivals & (_overlaps(self.boxes.take(self._kept, axis=0), self.boxes) > OVERLAP)


def _leads(rule: str, rules: dict[str, np.ndarray], is_sure: np.ndarray) -> bool:
    """Whether a face is the best by a rule, also by more exact numbers.

    rules: (N,) values of F faces and then of boxes that may replace some of theirs, by `face_values`. is_sure: (F,)
    bool, the face keeps its box.
    """
    values, areas = rules[rule], rules["largest"]
    best = int(np.argmax(values))
    margins = LARGEST_ERROR if rule == "probable" else LARGEST_CHANGE * np.maximum(areas, areas[best])
    rivals = int((values > values[best] - margins).sum()) - 1
    return best < len(is_sure) and bool(is_sure[best]) and not rivals


def _overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(F, 4) and (K, 4) boxes to the (F, K) intersections over unions."""
    low = np.maximum(first[:, None, :2], second[:, :2])
    high = np.minimum(first[:, None, 2:], second[:, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas, others = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second))
    return shared / (areas[:, None] + others - shared)
