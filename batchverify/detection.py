"""Face detection: facenet-pytorch's three networks around batched resampling, and the choice of one face."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import nms

from batchverify.mtcnn import OutputNetwork, ProposalNetwork, RefineNetwork
from batchverify.pyramid import CELL, CHANNELS, STRIDE, Pyramid, area_patches, integral, normalised, pyramid

SMALLEST_FACE = 20
# The smallest face searched for, as a share of the image's shorter side: the pyramid's first level then never
# has a shorter side above 12 * 24 = 288 pixels, whatever the camera.
SMALLEST_SHARE = 1 / 24
THRESHOLDS = (0.6, 0.7, 0.7)
# Fixed shapes of the second and third network, so that a face's box does not depend on its neighbours.
REFINE_BLOCK = 32
OUTPUT_BLOCK = 16


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
    does not depend on the other images of the call.
    """

    def __init__(self, *, min_face: int | None = None, device: str = "cpu") -> None:
        self.min_face = min_face
        self.device = device
        self._proposal = ProposalNetwork(device)
        self._refine, self._output = RefineNetwork(device), OutputNetwork(device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detect the faces of each image; images without a face give `Detections` of length 0."""
        sums = [integral(image) for image in images]
        boxes = [self._propose(table, *image.shape[:2]) for image, table in zip(images, sums, strict=True)]
        refined = self._classify(self._refine, REFINE_BLOCK, sums, boxes)
        boxes = [
            _refined(found, *outputs, *image.shape[:2])
            for image, found, outputs in zip(images, boxes, refined, strict=True)
        ]
        final = self._classify(self._output, OUTPUT_BLOCK, sums, boxes)
        return [_final(found, *outputs) for found, outputs in zip(boxes, final, strict=True)]

    def _propose(self, sums: np.ndarray, height: int, width: int) -> torch.Tensor:
        """First stage: (K, 4) float32 square boxes of candidates over all scales of the pyramid."""
        scales = pyramid(height, width, self.min_face or smallest_face(height, width))
        if scales is None:
            return torch.zeros(0, 4)
        shifts, scores = self._proposal(scales.canvas(sums).to(self.device), scales)
        rows = _cells(shifts.cpu(), scores.cpu(), scales)
        rows = rows[nms(rows[:, :4], rows[:, 4], 0.7)]
        extent = (rows[:, 2:4] - rows[:, :2]).repeat(1, 2)
        return _clipped(_square(rows[:, :4] + rows[:, 5:9] * extent), height, width)

    def _classify(
        self,
        network: RefineNetwork,
        block: int,
        sums: Sequence[np.ndarray],
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
            patches = torch.zeros(block, network.size, network.size, CHANNELS)
            _fill(patches, sums, owners[rows], corners[rows])
            found = network(normalised(patches).to(self.device))
            shifts.append(found[0].cpu())
            scores.append(found[1].cpu())
        lengths = [len(found) for found in boxes]
        total = len(owners)
        split = (torch.cat(shifts)[:total].split(lengths), torch.cat(scores)[:total].split(lengths))
        return list(zip(*split, strict=True))


def _fill(patches: torch.Tensor, sums: Sequence[np.ndarray], owners: np.ndarray, boxes: np.ndarray) -> None:
    """Write the candidates of a block, image by image (owners are sorted)."""
    for owner in np.unique(owners):
        first, last = np.searchsorted(owners, [owner, owner + 1])
        patches[first:last] = area_patches(sums[owner], boxes[first:last], patches.shape[1])


def _cells(shifts: torch.Tensor, scores: torch.Tensor, scales: Pyramid) -> torch.Tensor:
    """Cells above the threshold, after suppression within each level: (K, 9) box, score, shifts.

    shifts: (4, h, w), scores: (h, w), over the whole canvas.
    """
    mask = (scores >= THRESHOLDS[0]) & (scales.owner >= 0)
    places = mask.nonzero()  # (K, 2) y x
    owner = scales.owner[mask].long()
    levels = scales.levels
    origin = torch.tensor([[level.top // STRIDE, level.left // STRIDE] for level in levels])
    scale = torch.tensor([level.scale for level in levels])[owner][:, None]
    corner = (places - origin[owner]).float().flip(1)  # (K, 2) x y
    low = ((STRIDE * corner + 1) / scale).floor()
    high = ((STRIDE * corner + CELL) / scale).floor()
    found = torch.cat([low, high, scores[mask][:, None], shifts[:, mask].T], dim=1)
    # Boxes of whole numbers, moved apart by whole numbers: levels do not touch and nothing is rounded.
    apart = found[:, :4] + owner[:, None] * (high.max() + 1 if len(high) else 0)
    kept = nms(apart, found[:, 4], 0.5)
    return found[kept[owner[kept].argsort(stable=True)]]


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
