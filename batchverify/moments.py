"""Mean and spread of columns whose rows come a block at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def moments(blocks: Iterable[torch.Tensor]) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(rows, mean, spread) of blocks (B, W) float64: mean and standard deviation (W,) float64 by column.

    Counted from the first row, so that rows which are all alike have a spread of zero and not of rounding.
    """
    origin, total, squares, count = torch.zeros(0), torch.zeros(()), torch.zeros(()), 0
    for block in blocks:
        origin = origin if count else block[0]
        moved = block - origin
        total, squares = total + moved.sum(dim=0), squares + moved.square().sum(dim=0)
        count += len(block)
    spread = (squares / count - (total / count).square()).clamp(min=0).sqrt()
    return count, origin + total / count, spread
