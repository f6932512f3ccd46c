"""Face detection with the three networks of MTCNN, and the choice of one face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from batchverify.faces.images import shrink
from batchverify.faces.mtcnn import OUTPUT_SIZE, REFINE_SIZE, Networks, OpenvinoNetworks, PatchResults
from batchverify.faces.pyramid import CELL, CHANNELS, STRIDE, Pyramid, integral, pyramid, regions
from batchverify.fingerprint import DETECT_SIDE
from batchverify.kernels.loops import resample, suppress

SMALLEST_FACE = 20
# The smallest face as a fraction of the image's shorter side: the shorter side of the pyramid's first level is then
# never longer than 12 * 24 = 288 pixels.
SMALLEST_FRACTION = 1 / 24
THRESHOLDS = (0.6, 0.7, 0.7)
# A little below the difference of logits at the first threshold.
LEAST_LOGIT = 0.4
# Images that are best given at once: their summed-area tables stay in the CPU's cache.
GROUP = 16


@dataclass(frozen=True)
class BatchSizes:
    """The sizes to which batches are padded, so that a face's box does not depend on its neighbours.

    images: of one size, for the first network. refine, output: candidates for the second and the third.
    """

    images: int = 1
    refine: int = 32
    output: int = 16

    @property
    def smallest(self) -> bool:
        """Whether they cannot be halved."""
        return max(vars(self).values()) == 1

    def halved(self) -> BatchSizes:
        """Batch sizes that need half of the memory."""
        return BatchSizes(*(max(1, size // 2) for size in vars(self).values()))


# On a GPU the number of calls costs more than padding.
GPU_BATCH_SIZES = BatchSizes(8, 512, 128)


@dataclass(frozen=True)
class Detections:
    """The K faces of one image.

    boxes: (K, 4) float32, x0 y0 x1 y1 in pixels, may extend beyond the image. scores: (K,) float32 in 0..1.
    landmarks: (K, 5, 2) float32, x y in pixels of the left and right eye, the nose, and the left and right corner of
    the mouth, as seen in an upright face; None of a detector without them. rotation: the degrees, 0, 90, 180 or 270,
    by which the image was turned counterclockwise before the faces were found; boxes and landmarks are turned back.
    """

    boxes: np.ndarray
    scores: np.ndarray
    landmarks: np.ndarray | None = None
    rotation: int = 0

    def __len__(self) -> int:
        return len(self.scores)

    def turned_back(self, turns: int, height: int, width: int) -> Detections:
        """The same faces in pixels of an image of this size that was turned counterclockwise so many times."""
        corners = _points_back(self.boxes.reshape(-1, 2, 2), turns, height, width)
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        # Boxes end at the edges of pixels, landmarks count from centre to centre.
        points = self.landmarks
        landmarks = None if points is None else _points_back(points, turns, height - 1, width - 1)
        return Detections(boxes, self.scores, landmarks, 90 * turns)


def _points_back(points: np.ndarray, turns: int, bottom: float, right: float) -> np.ndarray:
    """(..., 2) x y in the turned image to x y in the image, whose last corner is given."""
    x, y = points[..., 0], points[..., 1]
    turned = {1: (right - y, x), 2: (right - x, bottom - y), 3: (y, bottom - x)}[turns]
    return np.stack(turned, axis=-1)


def smallest_face(height: int, width: int) -> int:
    """The default smallest face searched for, in pixels: 20, more in images above 480 pixels."""
    return max(SMALLEST_FACE, round(min(height, width) * SMALLEST_FRACTION))


def reduced(image: np.ndarray) -> np.ndarray:
    """The (H, W, 3) copy that faces are searched for in, whose longer side is at most `DETECT_SIDE`."""
    if max(image.shape[:2]) <= DETECT_SIDE:
        return image
    return np.asarray(shrink(Image.fromarray(image), DETECT_SIDE))


def choose_face(detections: Detections, height: int, width: int, rule: str = "center") -> int:
    """The index of the best of one or more faces.

    rule: what is compared. `center`: box area less twice the squared distance of its centre from the image's
    (facenet-pytorch's `center_weighted_size`, which avoids large bystanders). `largest`: area. `probable`: score.
    """
    return int(np.argmax(face_values(detections.boxes, detections.scores, height, width)[rule]))


def face_values(boxes: np.ndarray, scores: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
    """What each rule of `choose_face` compares: (K,) values of (K, 4) boxes with (K,) scores."""
    x0, y0, x1, y1 = boxes.astype(np.float64).T
    area = (x1 - x0) * (y1 - y0)
    distance = ((x0 + x1) / 2 - width / 2) ** 2 + ((y0 + y1) / 2 - height / 2) ** 2
    return {"center": area - 2 * distance, "largest": area, "probable": scores}


class FaceDetector:
    """MTCNN (Zhang et al. 2016, arXiv 1604.02878) with the networks and weights of facenet-pytorch.

    Call it with a sequence of (H, W, 3) uint8 RGB images of any size; it returns one `Detections` for each.
    The boxes equal those of `facenet_pytorch.MTCNN` with the same settings except for rounding. The result for an
    image does not depend on the other images of the call.
    """

    group = GROUP

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
        """The detector for a resolved device and runtime. threads: CPUs for each calling thread, with OpenVINO."""
        blocks = BatchSizes() if device == "cpu" else GPU_BATCH_SIZES
        if runtime == "openvino":
            networks: Networks = OpenvinoNetworks(threads)
        else:
            from batchverify.faces.mtcnn_torch import TorchNetworks

            networks = TorchNetworks(device)
        return cls(networks, blocks, min_face=min_face)

    def __call__(self, images: Sequence[np.ndarray], blocks: BatchSizes | None = None) -> list[Detections]:
        """Detect the faces of each image; an image without a face gives `Detections` of length 0."""
        if not len(images):
            return []
        blocks = blocks or self.blocks
        sums = [integral(image) for image in images]
        boxes = self._propose(sums, blocks.images)
        refined = _classify(self.networks.refine, REFINE_SIZE, blocks.refine, sums, boxes)
        boxes = [
            _refined(candidates, *results, *image.shape[:2])
            for image, candidates, results in zip(images, boxes, refined, strict=True)
        ]
        final = _classify(self.networks.output, OUTPUT_SIZE, blocks.output, sums, boxes)
        return [_final(candidates, *results) for candidates, results in zip(boxes, final, strict=True)]

    def _propose(self, sums: Sequence[np.ndarray], block: int) -> list[np.ndarray]:
        """First stage: for each image (K, 4) float32 square boxes of candidates, from all scales of its pyramid."""
        boxes = [np.zeros((0, 4), np.float32) for _ in sums]
        sizes: dict[tuple[int, int], list[int]] = {}
        for index, table in enumerate(sums):
            sizes.setdefault((table.shape[0] - 1, table.shape[1] - 1), []).append(index)
        for (height, width), indices in sizes.items():
            scales = pyramid(height, width, self.min_face or smallest_face(height, width))
            if scales is None:
                continue
            for start in range(0, len(indices), block):
                batch = indices[start : start + block]
                canvases = [scales.canvas(sums[index]) for index in batch]
                canvases += [np.zeros_like(canvases[0])] * (block - len(batch))
                together = np.concatenate(canvases) if block > 1 else canvases[0]
                outputs = self.networks.propose(together, scales)
                for index, output in zip(batch, outputs, strict=False):
                    boxes[index] = _candidates(output, scales, height, width)
        return boxes


def _classify(
    network: Callable[[np.ndarray], PatchResults],
    size: int,
    block: int,
    sums: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
) -> list[PatchResults]:
    """Classify the candidates in patches of `size` pixels: for each image (K, 4) shifts and (K,) probabilities.

    The candidates of all images are put into blocks of one shape; only one block is in memory at a time.
    """
    ends = np.cumsum([len(candidates) for candidates in boxes])
    cut = np.concatenate(
        [
            regions(candidates, table.shape[0] - 1, table.shape[1] - 1)
            for candidates, table in zip(boxes, sums, strict=True)
        ]
    )
    shifts, scores = np.empty((len(cut), 4), np.float32), np.empty(len(cut), np.float32)
    for start in range(0, len(cut), block):
        patches = np.empty((block, size, size, CHANNELS), np.float32)
        patches[len(cut) - start :] = 0
        _fill(patches, sums, ends, cut[start : start + block], start)
        rows = slice(start, min(start + block, len(cut)))
        shifts[rows], scores[rows] = (values[: rows.stop - start] for values in network(patches))
    return list(zip(np.split(shifts, ends[:-1]), np.split(scores, ends[:-1]), strict=True))


def _fill(patches: np.ndarray, sums: Sequence[np.ndarray], ends: np.ndarray, cut: np.ndarray, start: int) -> None:
    """Write the patches of a block, image by image. cut: (K, 4) their regions. start: number of the first one."""
    targets = np.zeros((len(cut), 5), np.int64)
    targets[:, 0] = np.arange(len(cut))
    targets[:, 3:] = patches.shape[1]
    done = 0
    while done < len(cut):
        image = int(np.searchsorted(ends, start + done, side="right"))
        end = min(int(ends[image]) - start, len(cut))
        resample(sums[image], cut[done:end], targets[done:end], False, patches)
        done = end


def _candidates(output: np.ndarray, scales: Pyramid, height: int, width: int) -> np.ndarray:
    """(K, 4) float32 square boxes of one image's candidates, from the first network's output for its canvas."""
    boxes, shifts, scores = _cells(output, scales)
    kept = suppress(boxes, _best_first(scores), 0.7)
    boxes, shifts = boxes[kept], shifts[kept]
    extent = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return _clipped(_square(boxes + shifts * extent), height, width)


def _cells(output: np.ndarray, scales: Pyramid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells above the threshold, after suppression within each level: (K, 4) boxes, (K, 4) shifts, (K,) scores."""
    levels = enumerate(zip(scales.cells, scales.scales, strict=True))
    rows = np.concatenate([_likely(output, *level) for level in levels])
    # Rounded to float32 as in facenet-pytorch: near 1 many probabilities are equal, and then the order matters.
    scores = (1 / (1 + np.exp(rows[:, 4].astype(np.float64) - rows[:, 5]))).astype(np.float32)
    rows, scores = rows[scores >= THRESHOLDS[0]], scores[scores >= THRESHOLDS[0]]
    boxes, level = rows[:, :4], rows[:, 10]
    # Levels are moved apart so that their boxes do not overlap; all are whole numbers, so that nothing is rounded.
    apart = boxes + level[:, None] * (boxes.max(initial=0) + 1)
    kept = suppress(apart, _best_first(scores), 0.5)
    kept = kept[np.argsort(level[kept], kind="stable")]
    return boxes[kept], rows[kept, 6:10], scores[kept]


def _likely(output: np.ndarray, number: int, level: tuple[np.ndarray, np.float32]) -> np.ndarray:
    """A level's cells that may hold a face: (K, 11) float32 box, both logits, shifts, the level's number.

    The boxes are x0 y0 x1 y1 in whole pixels of the image.
    """
    (top, left, height, width), scale = level
    cells = output[top : top + height, left : left + width]
    y, x = np.nonzero(cells[..., 1] - cells[..., 0] >= LEAST_LOGIT)
    corners = np.stack([x, y, x, y], axis=1) * STRIDE + (1, 1, CELL, CELL)
    boxes = np.floor(corners.astype(np.float32) / scale)
    return np.concatenate([boxes, cells[y, x], np.full((len(y), 1), number, np.float32)], axis=1)


def _best_first(scores: np.ndarray) -> np.ndarray:
    """Indices by decreasing score; equal scores keep their order, as in torchvision's suppression."""
    return np.argsort(-scores, kind="stable")


def _square(boxes: np.ndarray) -> np.ndarray:
    """Make boxes square: the shorter side grows, the centre stays."""
    extent = boxes[:, 2:] - boxes[:, :2]
    side = extent.max(axis=1, keepdims=True)
    low = boxes[:, :2] + extent * np.float32(0.5) - side * np.float32(0.5)
    return np.concatenate([low, low + side], axis=1)


def _clipped(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """The boxes that contain at least one pixel of the image."""
    whole = np.trunc(boxes)
    low, high = np.maximum(whole[:, :2], 1), np.minimum(whole[:, 2:], (width, height))
    return boxes[(high >= low).all(axis=1)]


def _regress(boxes: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    extent = np.tile(boxes[:, 2:] - boxes[:, :2] + 1, 2)
    return boxes + shifts * extent


def _refined(boxes: np.ndarray, shifts: np.ndarray, scores: np.ndarray, height: int, width: int) -> np.ndarray:
    """Second stage, for one image: (K, 4) square boxes, each with at least one pixel of the image."""
    kept = scores > THRESHOLDS[1]
    boxes, shifts, scores = boxes[kept], shifts[kept], scores[kept]
    picked = suppress(boxes, _best_first(scores), 0.7)
    return _clipped(_square(_regress(boxes[picked], shifts[picked])), height, width)


def _final(boxes: np.ndarray, shifts: np.ndarray, scores: np.ndarray) -> Detections:
    """Third stage, for one image: the faces, best score first."""
    kept = scores > THRESHOLDS[2]
    boxes, scores = _regress(boxes[kept], shifts[kept]), scores[kept]
    picked = suppress_contained(boxes, scores)
    return Detections(boxes[picked], scores[picked])


def suppress_contained(boxes: np.ndarray, scores: np.ndarray, threshold: float = 0.7) -> np.ndarray:
    """Indices that remain after suppression by intersection over the *smaller* area, best score first."""
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
