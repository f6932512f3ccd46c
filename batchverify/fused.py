"""The backbone on CPUs with each convolution, its bias, sum and ReLU as one oneDNN call, weights packed once."""

from __future__ import annotations

from threading import Lock
from typing import Any

import torch
from torch import nn

from batchverify.facenet import inception

# Workers are threads that share a network.
_PACKING = Lock()
# The calls that torch.compile itself makes for frozen networks; without a compiler they serve as well.
_CALLS = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")


def can_fuse(device: str, dtype: torch.dtype) -> bool:
    """Whether there are such calls for this device and number format; a network stays as it is where not."""
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in _CALLS)


def fuse(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put fused calls in place of facenet-pytorch's blocks; the network's batch-norms must be folded.

    Takes and gives what the network does, in `dtype` and channels last: `network` itself, changed.
    """
    parts = inception()
    for name, child in list(network.named_children()):
        if isinstance(child, parts.BasicConv2d):
            setattr(network, name, _Convolution(child.conv, dtype))
            continue
        fuse(child, dtype)
        if isinstance(child, parts.Block8 | parts.Block17 | parts.Block35):
            setattr(network, name, _Residual(child, dtype))
    return network


class _Packed(nn.Module):
    """A convolution's weights in `dtype`, packed for the first input's shape: that of all."""

    def __init__(self, layer: Any, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.padding, self.stride = list(layer.padding), list(layer.stride)
        self.weight = (layer.weight * scale).to(dtype, memory_format=torch.channels_last)
        self.bias = (layer.bias * scale).to(dtype)
        self.is_packed = False

    def packed(self, values: torch.Tensor) -> torch.Tensor:
        """The weights in the order that oneDNN wants for inputs like `values`, the first that come."""
        if not self.is_packed:
            with _PACKING:
                self._pack(list(values.shape))
        return self.weight

    def _pack(self, shape: list[int]) -> None:
        if not self.is_packed:
            call: Any = torch.ops.mkldnn._reorder_convolution_weight
            self.weight = call(self.weight, self.padding, self.stride, [1, 1], 1, shape)
            self.is_packed = True


class _Convolution(_Packed):
    """Convolution, bias and ReLU."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) channels last to (B, D, h', w')."""
        call: Any = torch.ops.mkldnn._convolution_pointwise
        weight = self.packed(values)
        return call(values, weight, self.bias, self.padding, self.stride, [1, 1], 1, "relu", [], "")


class _Residual(nn.Module):
    """An inception block: branches, their convolution back, scaled, added to the input, ReLU."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        names = [name for name in ("branch0", "branch1", "branch2") if hasattr(block, name)]
        self.branches = nn.ModuleList([getattr(block, name) for name in names])
        self.back = _Packed(block.conv2d, dtype, block.scale)
        self.last = None if getattr(block, "noReLU", False) else "relu"

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) channels last to the same shape; `values` is overwritten."""
        joined = torch.cat([branch(values) for branch in self.branches], dim=1)
        call: Any = torch.ops.mkldnn._convolution_pointwise_.binary
        back = self.back
        weight = back.packed(joined)
        shape = (back.padding, back.stride, [1, 1], 1)
        return call(values, joined, weight, back.bias, *shape, "add", 1.0, self.last, [], None)
