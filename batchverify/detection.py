"""Face detection: facenet-pytorch's three networks around batched resampling, and the choice of one face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchvision.ops import nms

SMALLEST_FACE = 20
# The smallest face searched for, as a share of the image's shorter side: the pyramid's first level then never
# has a shorter side above 12 * 24 = 288 pixels, whatever the camera.
SMALLEST_SHARE = 1 / 24
THRESHOLDS = (0.6, 0.7, 0.7)
FACTOR = 0.709
CELL = 12
STRIDE = 2
# Fixed shapes of the second and third network, so that a face's box does not depend on its neighbours.
REFINE_BLOCK = 128
OUTPUT_BLOCK = 32


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


def choose_face(found: Detections, height: int, width: int) -> int:
    """The index of the face meant: box area less twice the squared distance of its centre to the image's.

    The rule is facenet-pytorch's `center_weighted_size`; the largest face alone picks bystanders.
    """
    x0, y0, x1, y1 = found.boxes.astype(np.float64).T
    area = (x1 - x0) * (y1 - y0)
    distance = ((x0 + x1) / 2 - width / 2) ** 2 + ((y0 + y1) / 2 - height / 2) ** 2
    return int(np.argmax(area - 2 * distance))


class FaceDetector:
    """MTCNN (Zhang et al. 2016, arXiv 1604.02878) with the networks and weights of facenet-pytorch.

    Call it with a sequence of (H, W, 3) uint8 RGB images of any sizes; it returns one `Detections` each.
    The boxes are those of `facenet_pytorch.MTCNN` at the same settings, to rounding. An image's result
    does not depend on the other images of the call.
    """

    def __init__(self, *, min_face: int | None = None, device: str = "cpu") -> None:
        from facenet_pytorch.models.mtcnn import ONet, PNet, RNet

        self.min_face = min_face
        self.device = device
        self.proposal, self.refine, self.output = (
            network().eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
            for network in (PNet, RNet, ONet)
        )

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detect the faces of each image; images without a face give `Detections` of length 0."""
        boxes = [self._propose(image) for image in images]
        sums = [integral(image) if len(found) else None for image, found in zip(images, boxes, strict=True)]
        refined = self._classify(self.refine, 24, REFINE_BLOCK, sums, boxes)
        boxes = [
            _refined(found, *outputs, *image.shape[:2])
            for image, found, outputs in zip(images, boxes, refined, strict=True)
        ]
        final = self._classify(self.output, 48, OUTPUT_BLOCK, sums, boxes)
        return [_final(found, *outputs) for found, outputs in zip(boxes, final, strict=True)]

    def _propose(self, image: np.ndarray) -> torch.Tensor:
        """First stage: (K, 4) float32 square boxes of candidates over all scales of the pyramid."""
        height, width = image.shape[:2]
        pixels = torch.from_numpy(image.astype(np.float32)).to(self.device)
        pixels = pixels.permute(2, 0, 1)[None]  # (1, 3, H, W), channels last
        scale = CELL / (self.min_face or smallest_face(height, width))
        found = []
        while min(height, width) * scale >= CELL:
            size = (int(height * scale + 1), int(width * scale + 1))
            level = (interpolate(pixels, size=size, mode="area") - 127.5) * 0.0078125
            shifts, scores = self.proposal(level)
            found.append(_cells(shifts[0], scores[0, 1], scale))
            scale *= FACTOR
        rows = torch.cat(found) if found else torch.zeros(0, 9)
        rows = rows[nms(rows[:, :4], rows[:, 4], 0.7)]
        extent = (rows[:, 2:4] - rows[:, :2]).repeat(1, 2)
        return _clipped(_square(rows[:, :4] + rows[:, 5:9] * extent), height, width)

    def _classify(
        self,
        network: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
        size: int,
        block: int,
        sums: Sequence[np.ndarray | None],
        boxes: Sequence[torch.Tensor],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Run a network on all candidates: per image (K, 4) shifts and (K,) face probabilities.

        The candidates of all images fill blocks of one fixed shape; no more than a block is in memory.
        """
        owners = np.repeat(np.arange(len(boxes)), [len(found) for found in boxes])
        if not len(owners):
            return [(torch.zeros(0, 4), torch.zeros(0))] * len(boxes)
        corners = torch.cat(list(boxes)).numpy()
        shifts, scores = [], []
        for start in range(0, len(owners), block):
            rows = slice(start, start + block)
            patches = np.zeros((block, size, size, 3), np.float32)
            _fill(patches, sums, owners[rows], corners[rows])
            inputs = torch.from_numpy(patches).to(self.device).permute(0, 3, 1, 2)
            outputs = network((inputs - 127.5) * 0.0078125)
            shifts.append(outputs[0].cpu())
            scores.append(outputs[-1][:, 1].cpu())
        lengths = [len(found) for found in boxes]
        total = len(owners)
        split = (torch.cat(shifts)[:total].split(lengths), torch.cat(scores)[:total].split(lengths))
        return list(zip(*split, strict=True))


def integral(image: np.ndarray) -> np.ndarray:
    """Summed-area table of an image: (H + 1, W + 1, 3) int32 or int64, its first row and column zero."""
    height, width = image.shape[:2]
    kind = np.int32 if height * width * 255 < 2**31 else np.int64
    sums = np.zeros((height + 1, width + 1, 3), kind)
    np.cumsum(image, axis=0, out=sums[1:, 1:], dtype=kind)
    np.cumsum(sums[1:, 1:], axis=1, out=sums[1:, 1:])
    return sums


def area_patches(sums: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """Resample K regions at once by area: (K, size, size, 3) float32 means.

    `boxes` (K, 4) float32 are MTCNN's one-based corners; as in facenet-pytorch they are truncated and
    clipped to the image. Equal to `interpolate(mode="area")` of each region, by four look-ups a pixel.
    """
    height, width = sums.shape[0] - 1, sums.shape[1] - 1
    whole = np.trunc(boxes).astype(np.int64)
    top, bottom = np.maximum(whole[:, 1], 1) - 1, np.minimum(whole[:, 3], height)
    left, right = np.maximum(whole[:, 0], 1) - 1, np.minimum(whole[:, 2], width)
    y0, y1 = _bins(top, bottom, size)
    x0, x1 = _bins(left, right, size)
    y0, y1, x0, x1 = y0[:, :, None], y1[:, :, None], x0[:, None, :], x1[:, None, :]
    total = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return (total / ((y1 - y0) * (x1 - x0))[..., None]).astype(np.float32)


def _bins(low: np.ndarray, high: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges (K, size) of adaptive average pooling from [low, high) to `size` cells."""
    extent = (high - low)[:, None]
    cell = np.arange(size)[None, :]
    return low[:, None] + cell * extent // size, low[:, None] - (-(cell + 1) * extent // size)


def _fill(
    patches: np.ndarray, sums: Sequence[np.ndarray | None], owners: np.ndarray, boxes: np.ndarray
) -> None:
    """Write the candidates of a block, image by image (owners are sorted)."""
    for owner in np.unique(owners):
        table = sums[owner]
        if table is not None:
            first, last = np.searchsorted(owners, [owner, owner + 1])
            patches[first:last] = area_patches(table, boxes[first:last], patches.shape[1])


def _cells(shifts: torch.Tensor, scores: torch.Tensor, scale: float) -> torch.Tensor:
    """Cells above the threshold, after suppression: (4, h, w), (h, w) to (K, 9) box, score, shifts."""
    shifts, scores = shifts.cpu(), scores.cpu()
    mask = scores >= THRESHOLDS[0]
    corner = mask.nonzero().float().flip(1)  # (K, 2) x y
    low = ((STRIDE * corner + 1) / scale).floor()
    high = ((STRIDE * corner + CELL) / scale).floor()
    rows = torch.cat([low, high, scores[mask][:, None], shifts[:, mask].T], dim=1)
    return rows[nms(rows[:, :4], rows[:, 4], 0.5)]


def _square(boxes: torch.Tensor) -> torch.Tensor:
    """Grow the shorter side, the centre kept."""
    extent = boxes[:, 2:4] - boxes[:, :2]
    side = extent.max(dim=1, keepdim=True).values
    low = boxes[:, :2] + extent * 0.5 - side * 0.5
    return torch.cat([low, low + side], dim=1)


def _clipped(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Without the boxes that hold no pixel of the image."""
    whole = boxes.trunc()
    low, high = whole[:, :2].clamp(min=1), torch.minimum(whole[:, 2:], torch.tensor([width, height]))
    return boxes[(high >= low).all(dim=1)]


def _regress(boxes: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    extent = (boxes[:, 2:] - boxes[:, :2] + 1).repeat(1, 2)
    return boxes + shifts * extent


def _refined(
    boxes: torch.Tensor, shifts: torch.Tensor, scores: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Second stage's outcome for one image: (K, 4) square boxes, each with a pixel of the image at least."""
    kept = scores > THRESHOLDS[1]
    boxes, shifts, scores = boxes[kept], shifts[kept], scores[kept]
    picked = nms(boxes, scores, 0.7)
    return _clipped(_square(_regress(boxes[picked], shifts[picked])), height, width)


def _final(boxes: torch.Tensor, shifts: torch.Tensor, scores: torch.Tensor) -> Detections:
    """Third stage's outcome for one image, best score first."""
    kept = scores > THRESHOLDS[2]
    found = _regress(boxes[kept], shifts[kept]).numpy()
    probabilities = scores[kept].numpy()
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
