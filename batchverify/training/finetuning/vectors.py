"""Vectors of stored images during a training, and how well their cosines tell labelled pairs apart."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import normalize

from batchverify.evaluation.figures import Curve
from batchverify.training.finetuning.learner import Learner
from batchverify.training.finetuning.sets import Batch, LabelledImages
from batchverify.training.finetuning.team import Team


class Stored(Protocol):
    """What training needs of the frozen blocks' output: `Activations`."""

    @property
    def views(self) -> int:
        """Augmented views of each image that may be asked for, besides the face itself."""

    def __len__(self) -> int:
        """The number of images."""

    def batch(self, images: np.ndarray, views: np.ndarray) -> torch.Tensor:
        """(B, ...) float32 of (B,) images, each as the view of that number, 0 the face itself."""


def activations(stored: Stored, images: np.ndarray, views: np.ndarray, device: torch.device) -> torch.Tensor:
    """(B, ...) float32 on a device, in memory of torch's own: products may round by where a row lies in memory."""
    tensor = stored.batch(images, views)
    return torch.empty_like(tensor, device=device).copy_(tensor)


def of_batch(stored: Stored, batch: Batch, device: torch.device) -> torch.Tensor:
    """The activations of a batch's images."""
    return activations(stored, batch.images, batch.views, device)


@torch.no_grad()
def embedded(learner: Learner, stored: Stored, images: np.ndarray, size: int, team: Team) -> np.ndarray:
    """(M, D) float32 unit rows by image; zero for those that are not among (U,) `images`.

    In float32 and without dropout, whatever the training does. The team shares the blocks of `size` images, which
    are cut the same for any team.
    """
    learner.eval()
    rows: torch.Tensor | None = None
    for number, start in enumerate(range(0, len(images), size)):
        # All members compute the first block, which tells the dimension.
        if number and number % team.size != team.rank:
            continue
        block = images[start : start + size]
        values = activations(stored, block, np.zeros(len(block), np.int64), team.device)
        vectors = normalize(learner.network(values).float())
        if rows is None:
            rows = torch.zeros(len(images), vectors.shape[1], device=team.device)
        if number or team.rank == 0:
            rows[start : start + size] = vectors
    learner.train()
    table: np.ndarray = np.zeros((len(stored), 0 if rows is None else rows.shape[1]), np.float32)
    if rows is not None:
        table[images] = team.total(rows).cpu().numpy()
    return table


def auc_of(vectors: np.ndarray, pairs: LabelledImages) -> float:
    """Area under the ROC curve of the pairs' cosines. vectors: (M, D) unit rows."""
    return Curve.of(pairs.labels, -cosines_of(vectors, pairs)).auc()


def cosines_of(vectors: np.ndarray, pairs: LabelledImages | Batch) -> np.ndarray:
    """(N,) cosines of N pairs. vectors: (M, D) unit rows."""
    return np.einsum("nd,nd->n", vectors[pairs.a], vectors[pairs.b])
