"""The training of a network's unfrozen blocks: checks, learning rates, epochs, early stopping, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from batchverify.options import FinetuneOptions
from batchverify.training.finetuning.sets import LabelledImages
from batchverify.training.network import RangeTest


class Stored(Protocol):
    """What `fit` needs of the frozen blocks' output: `Activations`."""

    @property
    def views(self) -> int:
        """Augmented views of each image that may be asked for, besides the face itself."""

    def __len__(self) -> int:
        """The number of images."""

    def batch(self, images: np.ndarray, views: np.ndarray) -> torch.Tensor:
        """(B, ...) float32 of (B,) images, each as the view of that number, 0 the face itself."""


class Network(Protocol):
    """What `fit` needs of a network beyond `nn.Module`: `TrainedPart`."""

    def groups(self) -> list[tuple[str, list[nn.Parameter]]]:
        """The parameters of each block, nearest the output first."""


@dataclass(frozen=True)
class FinetuneEpoch:
    """One pass over the training set, and the AUC of cosines on dev after it. Epoch 0 is the frozen backbone.

    loss: the mean over the passes, None for epoch 0. lr: the rate of the last block at the epoch's start.
    """

    epoch: int
    loss: float | None
    dev_auc: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class FinetuneFit:
    """A finished training. The network holds the weights of the best epoch; 0 is the frozen backbone."""

    epochs: list[FinetuneEpoch]
    best_epoch: int
    max_lr: float
    range_test: RangeTest | None

    @property
    def frozen_auc(self) -> float:
        """AUC on dev of the frozen backbone."""
        return self.epochs[0].dev_auc

    @property
    def best_auc(self) -> float:
        """AUC on dev of the best epoch."""
        return self.epochs[self.best_epoch].dev_auc

    @property
    def helped(self) -> bool:
        """Whether an epoch did better on dev than the frozen backbone."""
        return self.best_epoch > 0


Report = Callable[[FinetuneEpoch], None]
# Called with the steps done and all steps.
OnStep = Callable[[int, int], None]


def fit(
    network: nn.Module,
    train: Stored,
    dev: Stored,
    train_set: LabelledImages,
    dev_set: LabelledImages,
    options: FinetuneOptions,
    folder: Path,
    report: Report = lambda _: None,
    teacher: np.ndarray | None = None,
    *,
    on_step: OnStep = lambda *_: None,
) -> FinetuneFit:
    """Train `network` in place and leave it with the weights of the epoch that does best on dev.

    folder: for the checkpoint; a call with the same arguments goes on from there. teacher: (M, T) float32 unit rows
    by training image. Raises `UsageError` for sets that do not fit the loss, the batches or the checkpoint, and
    `TrainingError` if the overfit check fails, a loss is not finite or memory runs out.
    """
    raise NotImplementedError
