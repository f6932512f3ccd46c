"""The processes that train together: this one alone, unless `distributed` says otherwise."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Team:
    """One process. Methods are called by all members, in the same order.

    device: where this member computes. rank: its number from 0. size: the number of members.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    def joined(self, module: nn.Module) -> nn.Module:
        """A module whose gradients, after a backward pass, are the means over the team."""
        return module

    def apart(self, _joined: nn.Module) -> AbstractContextManager[None]:
        """While entered, backward passes add up each member's own gradients."""
        return nullcontext()

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the team of each member's tensor, of one shape and type."""
        return tensor

    def level(self, module: nn.Module) -> None:
        """Give all members the first one's buffers: each has gathered statistics of its own batches."""

    def of_first(self, value: float) -> float:
        """The first member's number, for all."""
        number = torch.tensor(value if self.rank == 0 else 0.0, dtype=torch.float64, device=self.device)
        return float(self.total(number))
