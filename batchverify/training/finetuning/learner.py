"""What is trained: a network with its loss, in groups that learn at their own rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from batchverify.errors import UsageError
from batchverify.options import MARGINS, FinetuneOptions
from batchverify.runtime.devices import cpu_has_bf16
from batchverify.training.finetuning.losses import (
    ArcFaceLoss,
    ContrastiveLoss,
    Distillation,
    PairLoss,
    SupConLoss,
    TripletLoss,
    WeightedSum,
    check_teacher,
)
from batchverify.training.finetuning.sets import (
    IMAGES_PER_PERSON,
    Batch,
    Batches,
    LabelledImages,
    PairBatches,
    PeopleBatches,
)
from batchverify.training.finetuning.trainable import TrainedPart


class Learner(nn.Module):
    """A network and its loss. mixed: multiply in bfloat16 where that is safe, the loss in float32."""

    def __init__(self, network: nn.Module, loss: nn.Module, *, mixed: bool = False) -> None:
        super().__init__()
        self.network, self.loss, self.mixed = network, loss, mixed

    def forward(self, activations: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss of a batch. activations: (B, ...) float32."""
        return self.loss(self.vectors(activations), batch)

    def vectors(self, activations: torch.Tensor) -> torch.Tensor:
        """(B, D) float32 of (B, ...) activations, not normalised."""
        with torch.autocast(activations.device.type, torch.bfloat16, enabled=self.mixed):
            vectors: torch.Tensor = self.network(activations)
        return vectors.float()

    def optimiser(self, options: FinetuneOptions, *, weight_decay: float | None = None) -> torch.optim.AdamW:
        """AdamW on all parameters; `set_rate` sets the rates. Biases and other vectors are not decayed."""
        decay = options.weight_decay if weight_decay is None else weight_decay
        blocks = [parameters for _, parameters in cast(TrainedPart, self.network).groups()]
        parts = [(1.0, list(self.loss.parameters()))]
        parts += [(options.lr_decay**depth, block) for depth, block in enumerate(blocks)]
        groups: list[dict[str, Any]] = []
        for part, parameters in parts:
            for is_matrix in (True, False):
                chosen = [each for each in parameters if (each.ndim >= 2) == is_matrix]
                if chosen:
                    groups.append({"params": chosen, "part": part, "weight_decay": decay * is_matrix})
        return torch.optim.AdamW(groups, lr=1.0)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give the block nearest the output this rate and the others their parts of it."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["part"]


def untrained_loss(
    options: FinetuneOptions, pairs: LabelledImages, teacher: np.ndarray | None, dimension: int
) -> nn.Module:
    """The loss that the options name, for vectors of `dimension` numbers. Raises `UsageError` for a wrong teacher."""
    distillation = None
    if options.loss == "distillation" or options.teacher is not None:
        if teacher is None:
            raise UsageError("the teacher's vectors are missing: fit needs teacher with options.teacher")
        check_teacher(teacher, len(pairs.people))
        distillation = Distillation(teacher)
        if options.loss == "distillation":
            return distillation
    margin = options.margin_loss or MARGINS.get(options.loss, 0.0)
    losses: dict[str, Callable[[], nn.Module]] = {
        "pair": PairLoss,
        "contrastive": lambda: ContrastiveLoss(margin),
        "triplet": lambda: TripletLoss(margin),
        "supcon": lambda: SupConLoss(margin),
        "arcface": lambda: ArcFaceLoss(torch.zeros(pairs.class_count, dimension), margin),
    }
    loss = losses[options.loss]()
    return loss if distillation is None else WeightedSum(loss, distillation, options.teacher_weight)


def check_people(options: FinetuneOptions, name: str, *, known: int) -> None:
    """Raise `UsageError` if the loss needs people and none is known. name: of the set."""
    if options.loss == "arcface" and not known:
        raise UsageError(
            f"--loss arcface needs the people of the {name} images: columns person_a and person_b in the manifest"
        )


def batches_of(options: FinetuneOptions, pairs: LabelledImages) -> Batches:
    """The batches that the loss takes. Raises `UsageError` if the set does not have what it needs."""
    if options.loss == "arcface":
        check_people(options, pairs.name, known=pairs.class_count)
        return PeopleBatches(pairs, pairs.classes, options.batch_images // IMAGES_PER_PERSON, options.seed)
    if options.loss in ("triplet", "supcon"):
        return PeopleBatches(pairs, pairs.identities, options.batch_images // IMAGES_PER_PERSON, options.seed)
    return PairBatches(pairs, options.batch_images // 2, options.seed)


def multiplies_bfloat16(dtype: str, device: torch.device) -> bool:
    """Whether a value of `--dtype` means bfloat16 on a device: `auto` does where the device multiplies it."""
    if dtype != "auto":
        return dtype == "bfloat16"
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
