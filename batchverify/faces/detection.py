"""Face detection: facenet-pytorch's three networks around batched resampling, and the choice of one face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from batchverify.faces.mtcnn import OUTPUT_SIZE, REFINE_SIZE, Judged, Networks, OpenvinoNetworks
from batchverify.faces.pyramid import CELL, CHANNELS, STRIDE, Pyramid, integral, pyramid, regions
from batchverify.fingerprint import DETECT_SIDE
from batchverify.kernels.loops import resample, suppress

SMALLEST_FACE = 20
# The smallest face searched for, as a share of the image's shorter side: the pyramid's first level then never
# has a shorter side above 12 * 24 = 288 pixels, whatever the camera.
SMALLEST_SHARE = 1 / 24
THRESHOLDS = (0.6, 0.7, 0.7)
# A little below the first threshold's own.
LEAST_LOGIT = 0.4


@dataclass(frozen=True)
class BatchSizes:
    """How much goes through the networks at a time, padded to it: a face's box does not depend on its neighbours.

    pictures: of one size, through the first. refine, output: candidates, through the second and third.
    """

    pictures: int = 1
    refine: int = 32
    output: int = 16

    @property
    def smallest(self) -> bool:
        """Whether they cannot be halved."""
        return max(vars(self).values()) == 1

    def halved(self) -> BatchSizes:
        """Batch sizes that take half of the memory."""
        return BatchSizes(*(max(1, size // 2) for size in vars(self).values()))


# A GPU's time goes into calls, not into what is padded.
GPU_BATCH_SIZES = BatchSizes(8, 512, 128)


@dataclass(frozen=True)
class Detections:
    """All faces of one image.

    boxes: (K, 4) float32, x0 y0 x1 y1 in pixels, may reach beyond the image. scores: (K,) float32 in 0..1.
    """

    boxes: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)


def smallest_face(height: int, width: int) -> int:
    """The default smallest face searched for, in pixels: 20, more in images above 480 pixels."""
    return max(SMALLEST_FACE, round(min(height, width) * SMALLEST_SHARE))


def reduced(picture: np.ndarray) -> np.ndarray:
    """The picture that faces are searched for in: (H, W, 3), the longer side at most `DETECT_SIDE`."""
    height, width = picture.shape[:2]
    shrink = DETECT_SIDE / max(height, width)
    if shrink >= 1:
        return picture
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))


def choose_face(found: Detections, height: int, width: int, rule: str = "center") -> int:
    """The index of the face meant, among one or more.

    rule: `center` is box area less twice the squared distance of its centre to the image's (facenet-pytorch's
    `center_weighted_size`; the largest face alone picks bystanders), `largest` the area alone, `probable` the
    score.
    """
    x0, y0, x1, y1 = found.boxes.astype(np.float64).T
    area = (x1 - x0) * (y1 - y0)
    distance = ((x0 + x1) / 2 - width / 2) ** 2 + ((y0 + y1) / 2 - height / 2) ** 2
    return int(np.argmax({"center": area - 2 * distance, "largest": area, "probable": found.scores}[rule]))


class FaceDetector:
    """MTCNN (Zhang et al. 2016, arXiv 1604.02878) with the networks and weights of facenet-pytorch.

    Call it with a sequence of (H, W, 3) uint8 RGB images of any sizes; it returns one `Detections` each.
    The boxes are those of `facenet_pytorch.MTCNN` at the same settings, to rounding. An image's result
    does not depend on the other images of the call. blocks: what goes through the networks at a time.
    """

    def __init__(self, networks: Networks, blocks: BatchSizes, *, min_face: int | None = None) -> None:
        self.networks, self.blocks, self.min_face = networks, blocks, min_face

    @classmethod
    def on(
        cls,
        device: str = "cpu",
        runtime: str = "openvino",
        *,
        min_face: int | None = None,
        threads: int = 1,
    ) -> FaceDetector:
        """The detector on a resolved device and runtime; threads: CPUs for each thread that calls, in OpenVINO."""
        blocks = BatchSizes() if device == "cpu" else GPU_BATCH_SIZES
        if runtime == "openvino":
            networks: Networks = OpenvinoNetworks(blocks.refine, blocks.output, threads)
        else:
            from batchverify.faces.mtcnn_torch import TorchNetworks

            networks = TorchNetworks(device)
        return cls(networks, blocks, min_face=min_face)

    def __call__(self, images: Sequence[np.ndarray], blocks: BatchSizes | None = None) -> list[Detections]:
        """Detect the faces of each image; images without a face give `Detections` of length 0."""
        if not len(images):
            return []
        blocks = blocks or self.blocks
        sums = [integral(image) for image in images]
        boxes = self._propose(sums, blocks.pictures)
        refined = _classify(self.networks.refine, REFINE_SIZE, blocks.refine, sums, boxes)
        boxes = [
            _refined(found, *outputs, *image.shape[:2])
            for image, found, outputs in zip(images, boxes, refined, strict=True)
        ]
        final = _classify(self.networks.output, OUTPUT_SIZE, blocks.output, sums, boxes)
        return [_final(found, *outputs) for found, outputs in zip(boxes, final, strict=True)]

    def _propose(self, sums: Sequence[np.ndarray], block: int) -> list[np.ndarray]:
        """First stage: per image (K, 4) float32 square boxes of candidates over all scales of its pyramid."""
        found = [np.zeros((0, 4), np.float32) for _ in sums]
        sizes: dict[tuple[int, int], list[int]] = {}
        for place, table in enumerate(sums):
            sizes.setdefault((table.shape[0] - 1, table.shape[1] - 1), []).append(place)
        for (height, width), places in sizes.items():
            scales = pyramid(height, width, self.min_face or smallest_face(height, width))
            if scales is None:
                continue
            for start in range(0, len(places), block):
                some = places[start : start + block]
                canvases = [scales.canvas(sums[place]) for place in some]
                canvases += [np.zeros_like(canvases[0])] * (block - len(some))
                together = np.concatenate(canvases) if block > 1 else canvases[0]
                answers = self.networks.propose(together, scales)
                for place, answer in zip(some, answers, strict=False):
                    found[place] = _candidates(answer, scales, height, width)
        return found


def _classify(
    judge: Callable[[np.ndarray], Judged],
    size: int,
    block: int,
    sums: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
) -> list[Judged]:
    """Judge all candidates in patches of `size` pixels: per image (K, 4) shifts and (K,) face probabilities.

    The candidates of all images fill blocks of one fixed shape; no more than a block is in memory.
    """
    ends = np.cumsum([len(found) for found in boxes])
    whole = [
        regions(found, table.shape[0] - 1, table.shape[1] - 1)
        for found, table in zip(boxes, sums, strict=True)
    ]
    cut = np.concatenate(whole)
    shifts, scores = np.empty((len(cut), 4), np.float32), np.empty(len(cut), np.float32)
    for start in range(0, len(cut), block):
        patches = np.empty((block, size, size, CHANNELS), np.float32)
        patches[len(cut) - start :] = 0
        _fill(patches, sums, ends, cut[start : start + block], start)
        here = slice(start, min(start + block, len(cut)))
        shifts[here], scores[here] = (each[: here.stop - start] for each in judge(patches))
    return list(zip(np.split(shifts, ends[:-1]), np.split(scores, ends[:-1]), strict=True))


def _fill(
    patches: np.ndarray, sums: Sequence[np.ndarray], ends: np.ndarray, cut: np.ndarray, start: int
) -> None:
    """Write the candidates of a block, image by image. cut: (K, 4) their regions, the first is number `start`."""
    places = np.zeros((len(cut), 5), np.int64)
    places[:, 0] = np.arange(len(cut))
    places[:, 3:] = patches.shape[1]
    done = 0
    while done < len(cut):
        owner = int(np.searchsorted(ends, start + done, side="right"))
        last = min(int(ends[owner]) - start, len(cut))
        resample(sums[owner], cut[done:last], places[done:last], False, patches)
        done = last


def _candidates(answers: np.ndarray, scales: Pyramid, height: int, width: int) -> np.ndarray:
    """(K, 4) float32 square boxes of one image's candidates, from the first network's answers to its canvas."""
    boxes, shifts, scores = _cells(answers, scales)
    kept = suppress(boxes, _best_first(scores), 0.7)
    boxes, shifts = boxes[kept], shifts[kept]
    extent = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return _clipped(_square(boxes + shifts * extent), height, width)


def _cells(answers: np.ndarray, scales: Pyramid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells above the threshold, after suppression within each level: (K, 4) boxes, (K, 4) shifts, (K,) scores."""
    levels = enumerate(zip(scales.cells, scales.scales, strict=True))
    rows = np.concatenate([_likely(answers, *level) for level in levels])
    # Rounded to float32 as in facenet-pytorch: near 1 many probabilities are equal, and then the order counts.
    scores = (1 / (1 + np.exp(rows[:, 4].astype(np.float64) - rows[:, 5]))).astype(np.float32)
    rows, scores = rows[scores >= THRESHOLDS[0]], scores[scores >= THRESHOLDS[0]]
    boxes, level = rows[:, :4], rows[:, 10]
    # Boxes of whole numbers, moved apart by whole numbers: levels do not touch and nothing is rounded.
    apart = boxes + level[:, None] * (boxes.max(initial=0) + 1)
    kept = suppress(apart, _best_first(scores), 0.5)
    kept = kept[np.argsort(level[kept], kind="stable")]
    return boxes[kept], rows[kept, 6:10], scores[kept]


def _likely(answers: np.ndarray, number: int, level: tuple[np.ndarray, np.float32]) -> np.ndarray:
    """A level's cells that may hold a face: (K, 11) float32 box, both logits, shifts, the level's number.

    The boxes are in whole pixels of the picture, x0 y0 x1 y1.
    """
    (top, left, height, width), scale = level
    cells = answers[top : top + height, left : left + width]
    y, x = np.nonzero(cells[..., 1] - cells[..., 0] >= LEAST_LOGIT)
    corners = np.stack([x, y, x, y], axis=1) * STRIDE + (1, 1, CELL, CELL)
    boxes = np.floor(corners.astype(np.float32) / scale)
    return np.concatenate([boxes, cells[y, x], np.full((len(y), 1), number, np.float32)], axis=1)


def _best_first(scores: np.ndarray) -> np.ndarray:
    """Indices by falling score; equal scores keep their order, as in torchvision's suppression."""
    return np.argsort(-scores, kind="stable")


def _square(boxes: np.ndarray) -> np.ndarray:
    """Grow the shorter side, the centre kept."""
    extent = boxes[:, 2:] - boxes[:, :2]
    side = extent.max(axis=1, keepdims=True)
    low = boxes[:, :2] + extent * np.float32(0.5) - side * np.float32(0.5)
    return np.concatenate([low, low + side], axis=1)


def _clipped(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Without the boxes that hold no pixel of the image."""
    whole = np.trunc(boxes)
    low, high = np.maximum(whole[:, :2], 1), np.minimum(whole[:, 2:], (width, height))
    return boxes[(high >= low).all(axis=1)]


def _regress(boxes: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    extent = np.tile(boxes[:, 2:] - boxes[:, :2] + 1, 2)
    return boxes + shifts * extent


def _refined(
    boxes: np.ndarray, shifts: np.ndarray, scores: np.ndarray, height: int, width: int
) -> np.ndarray:
    """Second stage's outcome for one image: (K, 4) square boxes, each with a pixel of the image at least."""
    kept = scores > THRESHOLDS[1]
    boxes, shifts, scores = boxes[kept], shifts[kept], scores[kept]
    picked = suppress(boxes, _best_first(scores), 0.7)
    return _clipped(_square(_regress(boxes[picked], shifts[picked])), height, width)


def _final(boxes: np.ndarray, shifts: np.ndarray, scores: np.ndarray) -> Detections:
    """Third stage's outcome for one image, best score first."""
    kept = scores > THRESHOLDS[2]
    found, probabilities = _regress(boxes[kept], shifts[kept]), scores[kept]
    picked = suppress_contained(found, probabilities)
    return Detections(found[picked], probabilities[picked])


def suppress_contained(boxes: np.ndarray, scores: np.ndarray, threshold: float = 0.7) -> np.ndarray:
    """Indices kept by suppression with intersection over the *smaller* area, best score first."""
    x0, y0, x1, y1 = boxes.T
    area = (x1 - x0 + 1) * (y1 - y0 + 1)
    order = np.argsort(scores)[::-1]
    picked = []
    while order.size:
        best, rest = order[0], order[1:]
        picked.append(best)
        across = np.maximum(0, np.minimum(x1[best], x1[rest]) - np.maximum(x0[best], x0[rest]) + 1)
        down = np.maximum(0, np.minimum(y1[best], y1[rest]) - np.maximum(y0[best], y0[rest]) + 1)
        order = rest[across * down / np.minimum(area[best], area[rest]) <= threshold]
    return np.array(picked, dtype=np.int64)
