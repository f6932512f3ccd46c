"""What fine-tuning minimises: losses of a batch of vectors, by name, and distillation from a teacher's vectors.

Vectors come as the network gives them and count by their direction alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize, relu

from batchverify.errors import UsageError
from batchverify.options import MARGINS
from batchverify.training.calibration import platt_scaling
from batchverify.training.finetuning.sets import Batch, LabelledImages

# Deng et al. 2019 take 64 for millions of images; smaller sets do better with less (their section 3.1).
ARCFACE_SCALE = 30.0
# Of the supervised contrastive loss; its authors took 0.07 and 0.1 for photographs of things.
TEMPERATURE = 0.05
# Below this sine, the gradient of an angle is cut off.
LEAST_SINE = 1e-4
TOLERANCE = 1e-3
# Pairs of each label that a pair loss starts from, and the limits of its scale then.
START_PAIRS = 4096
LEAST_SCALE, MOST_SCALE = 1.0, 50.0


class PairLoss(nn.Module):
    """Cross-entropy of the labels, by a logistic head on the cosine that learns with the network.

    The logit of different is offset - exp(log_scale) * cosine.
    """

    def __init__(self, scale: float = 10.0, offset: float = 5.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.offset = nn.Parameter(torch.tensor(float(offset)))

    @torch.no_grad()
    def start_from(self, vectors: np.ndarray, pairs: LabelledImages) -> None:
        """Start as the logistic head of the frozen backbone. vectors: (M, D) unit rows, by image."""
        few = pairs.few(START_PAIRS, 0)
        cosines = np.einsum("nd,nd->n", vectors[few.a], vectors[few.b])
        slope, offset = platt_scaling(cosines, few.labels)
        scale = min(max(-slope, LEAST_SCALE), MOST_SCALE)
        self.log_scale.fill_(math.log(scale))
        self.offset.fill_(offset * scale / -slope if slope < 0 else 0.0)

    def forward(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The mean over the batch's pairs. vectors: (B, D)."""
        logits = self.offset - self.log_scale.exp() * pair_cosines(vectors, batch)
        return binary_cross_entropy_with_logits(logits, _labels(batch, vectors))


class MarginLoss(nn.Module):
    """A loss with a margin."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin


class ContrastiveLoss(MarginLoss):
    """Squared distance of same pairs, squared shortfall below the margin of different ones (Hadsell et al. 2006).

    Distances are those of unit vectors, so from 0 to 2.
    """

    def forward(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The mean over the batch's pairs. vectors: (B, D)."""
        # The root of zero has no gradient.
        squares = (2 - 2 * pair_cosines(vectors, batch)).clamp_min(1e-12)
        different = _labels(batch, vectors)
        shortfalls = relu(self.margin - squares.sqrt()).square()
        return ((1 - different) * squares + different * shortfalls).mean()


class TripletLoss(MarginLoss):
    """Anchor, positive and a semi-hard negative on squared distances of unit vectors (Schroff et al. 2015).

    Every ordered pair of one person is anchor and positive. Its negative is the nearest image of another person that
    is farther from the anchor than the positive; the farthest one if none is farther.
    """

    def forward(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The mean over all (anchor, positive); 0 if there are none or there is one person. vectors: (B, D)."""
        units = normalize(vectors)
        cosines = units @ units.T
        anchors, positives, negatives = (index.to(vectors.device) for index in self.mine(cosines, batch.people))
        flat, size = cosines.flatten(), len(vectors)
        difference = flat.index_select(0, anchors * size + negatives) - flat.index_select(
            0, anchors * size + positives
        )
        # The sum of no triplets is 0 and has a gradient.
        return relu(2 * difference + self.margin).sum() / max(1, len(anchors))

    @staticmethod
    def mine(cosines: torch.Tensor, people: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(anchors, positives, negatives): int64 positions (T,) each. cosines: (B, B). people: (B,)."""
        who = torch.from_numpy(people)
        same = who[:, None] == who
        known = (who >= 0)[:, None] & (who >= 0)
        anchors, positives = (same & known & ~torch.eye(len(who), dtype=torch.bool)).nonzero(as_tuple=True)
        others = (~same & known)[anchors]
        kept = others.any(dim=1)
        anchors, positives, others = anchors[kept], positives[kept], others[kept]
        values = cosines.detach().float().cpu()
        to_all, to_positive = values[anchors], values[anchors, positives]
        farther = others & (to_all < to_positive[:, None])
        nearest = to_all.masked_fill(~farther, -math.inf).argmax(dim=1)
        farthest = to_all.masked_fill(~others, math.inf).argmin(dim=1)
        return anchors, positives, torch.where(farther.any(dim=1), nearest, farthest)


class SupConLoss(MarginLoss):
    """Supervised contrastive loss: each image among its batch finds those of its person (Khosla et al. 2020).

    The mean over an image's positives of their cross-entropy against all other images of the batch, by cosines over
    `TEMPERATURE`. The margin is taken off the cosines of one person (as in CosFace, Wang et al. 2018).
    """

    def forward(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The mean over images with a positive in the batch; 0 if there are none. vectors: (B, D)."""
        units = normalize(vectors)
        people = torch.from_numpy(batch.people).to(units.device)
        own = torch.eye(len(units), dtype=torch.bool, device=units.device)
        same = (people[:, None] == people) & (people >= 0) & ~own
        logits = ((units @ units.T - self.margin * same) / TEMPERATURE).masked_fill(own, -math.inf)
        losses = (logits.logsumexp(dim=1, keepdim=True) - logits).masked_fill(~same, 0.0)
        positives = same.sum(dim=1)
        return (losses.sum(dim=1) / positives.clamp_min(1)).sum() / (positives > 0).sum().clamp_min(1)


class ArcFaceLoss(nn.Module):
    """Cross-entropy over all people of the cosines to a vector of each, with a margin on angles (Deng et al. 2019).

    centres: (C, D) float32, the vectors to start from, one a person.
    """

    def __init__(self, centres: torch.Tensor, margin: float = MARGINS["arcface"]) -> None:
        super().__init__()
        self.centres = nn.Parameter(centres.clone())
        self.margin = margin

    @torch.no_grad()
    def start_from(self, vectors: np.ndarray, pairs: LabelledImages) -> None:
        """Start each person's vector as the mean of its images'. vectors: (M, D) unit rows, by image."""
        known = np.flatnonzero(pairs.classes >= 0)
        sums = np.zeros(tuple(self.centres.shape), np.float32)
        np.add.at(sums, pairs.classes[known], vectors[known])
        self.centres.copy_(normalize(torch.from_numpy(sums)))

    def forward(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The mean over the batch's images with a person; 0 if there are none. vectors: (B, D)."""
        known = torch.from_numpy(np.flatnonzero(batch.people >= 0)).to(vectors.device)
        people = torch.from_numpy(batch.people).to(vectors.device)[known]
        cosines = normalize(vectors.index_select(0, known)) @ normalize(self.centres).T
        own = people[:, None]
        logits = ARCFACE_SCALE * cosines.scatter(1, own, self._moved(cosines.gather(1, own)))
        return cross_entropy(logits, people, reduction="sum") / max(1, len(people))

    def _moved(self, cosines: torch.Tensor) -> torch.Tensor:
        """The cosines of the angles plus the margin; beyond 180 degrees a line that goes on falling."""
        sines = (1 - cosines.square()).clamp_min(LEAST_SINE**2).sqrt()
        moved = cosines * math.cos(self.margin) - sines * math.sin(self.margin)
        beyond = cosines - self.margin * math.sin(self.margin)
        return torch.where(cosines > -math.cos(self.margin), moved, beyond)


class Distillation(nn.Module):
    """How far a batch's vectors are from a teacher's.

    Mean squared difference of all cosines between two of the batch's images; and, if the teacher has as many
    dimensions, 1 less the cosine of each vector with its teacher's. teacher: (M, T) float32 unit rows, by image; the
    plain image's for augmented views, too. Images with a zero row (no face) are left out.
    """

    def __init__(self, teacher: np.ndarray) -> None:
        super().__init__()
        self.teacher = torch.from_numpy(np.ascontiguousarray(teacher, np.float32))

    def forward(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """vectors: (B, D)."""
        images = torch.from_numpy(batch.images)
        known = self.teacher[images].any(dim=1).nonzero().squeeze(1)
        teacher = self.teacher[images[known]].to(vectors.device)
        units = normalize(vectors.index_select(0, known.to(vectors.device)))
        off_diagonal = max(1, len(units) * (len(units) - 1))
        # Both diagonals are 1.
        loss = (units @ units.T - teacher @ teacher.T).square().sum() / off_diagonal
        if teacher.shape[1] == units.shape[1]:
            loss = loss + (1 - (units * teacher).sum(dim=1)).sum() / max(1, len(units))
        return loss


class WeightedSum(nn.Module):
    """A loss and distillation, weighted."""

    def __init__(self, loss: nn.Module, distillation: Distillation, weight: float) -> None:
        super().__init__()
        self.loss, self.distillation, self.weight = loss, distillation, weight

    def start_from(self, vectors: np.ndarray, pairs: LabelledImages) -> None:
        """See the losses' own."""
        if isinstance(self.loss, PairLoss | ArcFaceLoss):
            self.loss.start_from(vectors, pairs)

    def forward(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """vectors: (B, D)."""
        return self.loss(vectors, batch) + self.weight * self.distillation(vectors, batch)


def pair_cosines(vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(P,) cosines of the batch's pairs. vectors: (B, D)."""
    units = normalize(vectors)
    # `index_select` has a gradient whose sums keep their order; that of indexing need not.
    a, b = (units.index_select(0, torch.from_numpy(side).to(units.device)) for side in (batch.a, batch.b))
    return (a * b).sum(dim=1)


def joined_teacher(members: Sequence[np.ndarray]) -> np.ndarray:
    """(M, T) unit rows of a fusion: its members' unit vectors (M, Di) joined, over the root of their number.

    The cosine of two rows is the mean of the members' cosines.
    """
    joined = np.concatenate([np.asarray(member, np.float32) for member in members], axis=1)
    return joined / np.float32(math.sqrt(len(members)))


def check_teacher(teacher: np.ndarray, images: int) -> None:
    """Raise `UsageError` unless a teacher has a finite unit vector, or zeros, for each of `images` images."""
    if teacher.ndim != 2 or len(teacher) != images:
        raise UsageError(f"--teacher: vectors of shape {teacher.shape} do not fit {images:,} training images")
    bad = np.flatnonzero(~np.isfinite(teacher).all(axis=1))
    if len(bad):
        raise UsageError(
            f"--teacher: the vectors of {len(bad):,} training images are not finite (first: image {bad[0]})"
        )
    lengths = np.linalg.norm(teacher.astype(np.float64), axis=1)
    bad = np.flatnonzero((np.abs(lengths - 1) > TOLERANCE) & (lengths > 0))
    if len(bad):
        raise UsageError(f"--teacher: the vector of image {bad[0]} has the length {lengths[bad[0]]:.4g}, not 1")


def _labels(batch: Batch, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(batch.labels).to(like)
