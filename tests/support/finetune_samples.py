"""A small network, activations and people that `finetune` learns in a second."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from batchverify.options import FinetuneOptions
from batchverify.training.finetuning.checkpoint import Checkpoint
from batchverify.training.finetuning.fit import Progress
from batchverify.training.finetuning.sets import LabelledImages

CHANNELS, SIZE, DIMENSION = 4, 4, 12
# Of the noise's 16 directions.
NOISE = 2.0


class SmallNetwork(nn.Module):
    """A convolution with batch norm, then a linear layer: two blocks."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.convolution = nn.Conv2d(CHANNELS, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.linear = nn.Linear(8 * SIZE * SIZE, DIMENSION)
        self.dropout = nn.Dropout(dropout)

    def train(self, mode: bool = True) -> SmallNetwork:
        """Batch norm keeps its stored statistics."""
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """(B, D) of (B, C, S, S)."""
        values = torch.relu(self.norm(self.convolution(activations)))
        return self.linear(self.dropout(values.flatten(1)))

    def groups(self) -> list[tuple[str, list[nn.Parameter]]]:
        """The linear layer, then the convolution with its norm."""
        inner = [*self.convolution.parameters(), *self.norm.parameters()]
        return [("linear", list(self.linear.parameters())), ("convolution", inner)]


class Kept:
    """Activations in memory; an augmented view is the face itself with noise that its number decides."""

    def __init__(self, values: np.ndarray, views: int = 0) -> None:
        self.values, self.views = values.astype(np.float32), views

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, images: np.ndarray, views: np.ndarray) -> torch.Tensor:
        """As `Activations.batch`."""
        values = self.values[images].copy()
        for row, (image, view) in enumerate(zip(images.tolist(), views.tolist(), strict=True)):
            if view:
                rng = np.random.default_rng((image, view))
                values[row] += 0.1 * rng.normal(size=values[row].shape)
        return torch.from_numpy(values)


class Deadly(Kept):
    """The first process that asks for so many batches is killed (SIGKILL); a file in a folder says that it was."""

    def __init__(self, kept: Kept, folder: Path, batches: int) -> None:
        super().__init__(kept.values, kept.views)
        self.folder, self.left = folder, batches

    def batch(self, images: np.ndarray, views: np.ndarray) -> torch.Tensor:
        """As `Kept`, but for death."""
        self.left -= 1
        if self.left == 0:
            with suppress(FileExistsError):
                (self.folder / "died").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(images, views)


def people_set(people: int, seed: int, name: str = "training", *, each: int = 4, views: int = 0) -> Any:
    """(activations, labelled images): so many people with `each` images, all same pairs and as many different ones.

    A few directions of noise, the same for every seed, hide the people: what a network can learn to leave out.
    """
    rng, shape = np.random.default_rng(seed), (CHANNELS, SIZE, SIZE)
    directions = np.random.default_rng(99).normal(size=(16, *shape))
    images = people * each
    values = np.repeat(rng.normal(size=(people, *shape)), each, axis=0)
    values += NOISE * np.tensordot(rng.normal(size=(images, 16)), directions, axes=1) / 4
    who = np.repeat(np.arange(people), each)
    a, b = np.triu_indices(images, 1)
    labels = (who[a] != who[b]).astype(np.int8)
    same = np.flatnonzero(labels == 0)
    rows = rng.permutation(np.concatenate([same, rng.permutation(np.flatnonzero(labels == 1))[: len(same)]]))
    pairs = LabelledImages(
        a[rows].astype(np.int32), b[rows].astype(np.int32), labels[rows], who.astype(np.int32), name
    )
    return Kept(values, views), pairs


def quick(**changes: Any) -> FinetuneOptions:
    """Options of a fast training."""
    settings: dict[str, Any] = {
        "loss": "pair",
        "epochs": 3,
        "patience": 9,
        "max_lr": 3e-3,
        "batch_images": 32,
        "dtype": "float32",
        "device": "cpu",
    }
    return FinetuneOptions(**settings | changes)


def steps_of(folder: Path) -> tuple[int, int]:
    """The steps done and all steps, as the checkpoint in a folder says."""
    progress = Progress.of_json(Checkpoint.peek(folder) or {})
    return progress.done, progress.total
