"""The backbone on CPUs: convolutions as loops made for the CPU at hand, where that is faster.

3 x 3 with fewer multiplications; in bfloat16 1 x 1 and along a line, too. The others are one oneDNN call each, with
bias, sum and ReLU, weights packed once.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import nn

from batchverify.facenet import inception
from batchverify.lines import LineConvolution
from batchverify.products import PixelProduct
from batchverify.strips import maxima
from batchverify.tiles import PANEL, multiplies_bfloat16
from batchverify.vectors import LANES
from batchverify.winograd import WinogradConvolution

# Workers are threads that share a network.
_PACKING = Lock()
# The first part of InceptionResnetV1 that leaves 3 x 3.
_SMALL = "mixed_7a"
# The calls that torch.compile itself makes for frozen networks; without a compiler they serve as well.
_CALLS = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")


def kind_of_network(device: str, dtype: torch.dtype) -> str:
    """How a device computes in a number format: `winograd`, `fused` (oneDNN's calls alone) or, as torch, `eager`."""
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return "eager"
    if not torch.backends.mkldnn.is_available() or not all(
        hasattr(torch.ops.mkldnn, name) for name in _CALLS
    ):
        return "eager"
    return "winograd" if dtype == torch.float32 or multiplies_bfloat16() else "fused"


def fuse(network: nn.Module, dtype: torch.dtype, small: bool = False) -> nn.Module:
    """Put fused calls in place of facenet-pytorch's blocks; the network's batch-norms must be folded.

    Takes and gives what the network does, in `dtype` and channels last: `network` itself, changed. small: whether its
    outputs are 3 x 3.
    """
    parts, compiled = inception(), kind_of_network("cpu", dtype) == "winograd"
    for name, child in list(network.named_children()):
        # From there on: children stand in the order of the pass.
        small = small or name == _SMALL
        if isinstance(child, parts.BasicConv2d):
            setattr(network, name, _convolution(child.conv, dtype, compiled, small))
            continue
        if name == "maxpool_3a" and compiled:
            setattr(network, name, _Compiled(partial(maxima, window=3)))
        if isinstance(child, parts.Block8 | parts.Block17 | parts.Block35):
            kind = _Joined if compiled and dtype == torch.bfloat16 else _Residual
            setattr(network, name, kind(child, dtype, small))
            continue
        fuse(child, dtype, small)
    return network


def _convolution(layer: Any, dtype: torch.dtype, compiled: bool, small: bool) -> nn.Module:
    """Convolution, bias and ReLU in the fastest form there is for it."""
    short = compiled and dtype == torch.bfloat16
    if compiled and _saves(layer, small):
        options = {"stride": layer.stride[0], "padding": layer.padding[0], "pairs": short}
        return _Compiled(WinogradConvolution(*_numbers(layer), **options))
    if short and _is_product(layer):
        product = _product([layer])
        return _Compiled(lambda values: product(values)[0])
    if short and _is_line(layer) and not small:
        return _Compiled(LineConvolution(*_numbers(layer)))
    return _Convolution(layer, dtype)


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


def _saves(layer: Any, small: bool) -> bool:
    """Whether a convolution has a faster form; in small images the tiles of every other output are half empty."""
    strides = ((1, 1),) if small else ((1, 1), (2, 2))
    square = layer.kernel_size == (3, 3) and len(set(layer.padding)) == 1
    return square and layer.stride in strides and _is_plain(layer, LANES)


def _is_product(layer: Any) -> bool:
    """Whether a convolution looks at single pixels, at all of them."""
    return layer.kernel_size == (1, 1) == layer.stride and not any(layer.padding) and _is_plain(layer, PANEL)


def _is_line(layer: Any) -> bool:
    """Whether a convolution runs along one side of the image and keeps its size."""
    sizes = layer.kernel_size
    line = min(sizes) == 1 == max(sizes) % 2 and layer.padding == tuple(size // 2 for size in sizes)
    return line and layer.stride == (1, 1) and _is_plain(layer, PANEL)


def _is_plain(layer: Any, outputs: int) -> bool:
    """Whether a convolution has no groups nor gaps, and fills vectors, its outputs several at once."""
    plain = layer.dilation == (1, 1) and layer.groups == 1
    return plain and layer.in_channels % LANES == 0 == layer.out_channels % outputs


def _numbers(layer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight, bias and the slopes of ReLU."""
    bias = layer.bias.float().numpy()
    return layer.weight.float().numpy(), bias, 0 * bias


class _Compiled(nn.Module):
    """A layer that is a compiled loop: `work` takes and gives arrays as `_array` makes them."""

    def __init__(self, work: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.work = work

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) channels last to (B, D, h', w')."""
        return _tensor(_shared(lambda part: [self.work(part)], [_array(values)])[0])


def _array(values: torch.Tensor) -> np.ndarray:
    """(B, C, h, w) channels last as (B, h, w, C): float32, or the bits of bfloat16 as int16."""
    rows = values.permute(0, 2, 3, 1).contiguous()
    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()


def _tensor(rows: np.ndarray) -> torch.Tensor:
    """The way back."""
    found = torch.from_numpy(rows)
    return (found.view(torch.bfloat16) if rows.dtype == np.int16 else found).permute(0, 3, 1, 2)


def _shared(work: Callable[..., list[np.ndarray]], arrays: list[np.ndarray]) -> list[np.ndarray]:
    """What is made of arrays of B images, of B images each; as many threads as torch has share the images."""
    threads = max(1, min(torch.get_num_threads(), len(arrays[0])))
    if threads == 1:
        return work(*arrays)
    parts = deque(enumerate(zip(*(np.array_split(each, threads) for each in arrays), strict=True)))
    jobs: list[Future[list[np.ndarray]]] = [Future() for _ in parts]

    def take() -> None:
        with suppress(IndexError):
            while True:
                number, part = parts.popleft()
                _settle(jobs[number], work, part)

    # Each part is done once, by whoever takes it first: where the process ends or has no more threads, by this one.
    for _ in range(threads - 1):
        with suppress(RuntimeError):
            _helpers().submit(take)
    take()
    return [np.concatenate(each) for each in zip(*(job.result() for job in jobs), strict=True)]


def _settle(job: Future[list[np.ndarray]], work: Callable[..., list[np.ndarray]], part: Any) -> None:
    try:
        job.set_result(work(*part))
    except Exception as exc:  # noqa: BLE001  whoever waits raises it
        job.set_exception(exc)


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


class _Residual(nn.Module):
    """An inception block: branches, their convolution back, scaled, added to the input, ReLU."""

    def __init__(self, block: Any, dtype: torch.dtype, small: bool) -> None:
        super().__init__()
        fuse(block, dtype, small)
        self.branches = nn.ModuleList(_branches(block))
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


class _Joined(nn.Module):
    """The same in bfloat16: the convolutions that read the input are one, what they make is added in place."""

    def __init__(self, block: Any, dtype: torch.dtype, small: bool) -> None:
        super().__init__()
        branches = [list(each) if isinstance(each, nn.Sequential) else [each] for each in _branches(block)]
        self.heads = _product([first.conv for first, *_ in branches])
        self.tails = nn.ModuleList([fuse(nn.Sequential(*others), dtype, small) for _, *others in branches])
        self.back = _product([block.conv2d], block.scale, relu=not getattr(block, "noReLU", False))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) channels last to the same shape; `values` is overwritten."""
        whole = _array(values)
        found = _shared(self.heads, [whole])
        ends = [_array(tail(_tensor(each))) for tail, each in zip(self.tails, found, strict=True)]
        _shared(self._add, [whole, *ends])
        return _tensor(whole)

    def _add(self, onto: np.ndarray, *parts: np.ndarray) -> list[np.ndarray]:
        self.back(*parts, onto=onto)
        return []


def _branches(block: Any) -> list[Any]:
    return [getattr(block, name) for name in ("branch0", "branch1", "branch2") if hasattr(block, name)]


def _product(layers: list[Any], scale: float = 1.0, relu: bool = True) -> PixelProduct:
    """Convolutions of 1 x 1 that read the same pixels, as one."""
    weight = torch.cat([layer.weight.flatten(1).float() for layer in layers]) * scale
    bias = torch.cat([layer.bias.float() for layer in layers]) * scale
    slopes = np.full(len(bias), 0 if relu else 1, np.float32)
    return PixelProduct(weight.numpy(), bias.numpy(), slopes, [layer.out_channels for layer in layers])
