"""The three networks of MTCNN with facenet-pytorch's weights, rearranged for speed; the functions are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import conv2d, linear, prelu

from batchverify.pyramid import CHANNELS, Pyramid

# Channels are padded to a multiple of this: half-filled vectors cost as much.
LANES = 16


class Convolution:
    """Convolutions without padding, their outputs side by side; channels that pad have weight zero."""

    def __init__(self, layers: Sequence[Any], inputs: int, device: str) -> None:
        used = sum(layer.out_channels for layer in layers)
        self.outputs = -(-used // LANES) * LANES
        weight = torch.zeros(self.outputs, inputs, *layers[0].kernel_size)
        weight[:used, : layers[0].in_channels] = torch.cat([layer.weight for layer in layers])
        bias = torch.zeros(self.outputs)
        bias[:used] = torch.cat([layer.bias for layer in layers])
        self.weight = weight.to(device, memory_format=torch.channels_last)
        self.bias = bias.to(device)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, D, h - k + 1, w - k + 1), channels last."""
        return conv2d(values, self.weight, self.bias)


class _Stack:
    """The convolutions of a network, each followed by its slope for negative values."""

    def __init__(self, network: nn.Module, names: tuple[int, ...], device: str) -> None:
        self.layers: list[Convolution] = []
        self.slopes: list[torch.Tensor] = []
        channels = CHANNELS
        for number in names:
            self.layers.append(Convolution([getattr(network, f"conv{number}")], channels, device))
            channels = self.layers[-1].outputs
            slope = getattr(network, f"prelu{number}").weight
            self.slopes.append(nn.functional.pad(slope, (0, channels - len(slope))).to(device))

    def __call__(self, values: torch.Tensor, number: int) -> torch.Tensor:
        """One convolution, counted from 0, and its slope."""
        return prelu(self.layers[number](values), self.slopes[number])


class ProposalNetwork:
    """P-Net over a whole canvas of scales: shifts (4, h, w) and face probabilities (h, w) of its cells."""

    def __init__(self, device: str) -> None:
        from facenet_pytorch.models.mtcnn import PNet

        network = PNet().eval().requires_grad_(False)
        self._stack = _Stack(network, (1, 2, 3), device)
        self._heads = Convolution([network.conv4_1, network.conv4_2], self._stack.layers[-1].outputs, device)

    def __call__(self, canvas: torch.Tensor, pyramid: Pyramid) -> tuple[torch.Tensor, torch.Tensor]:
        """canvas: (1, 4, H, W) float32 from `Pyramid.canvas`."""
        values = self._stack(canvas, 0)
        pyramid.leave_out_edges(values)
        values = self._stack(self._stack(halved(values), 1), 2)
        answers = self._heads(values)[0]
        return answers[2:6], torch.softmax(answers[:2], dim=0)[1]


class RefineNetwork:
    """R-Net: (B, 4, 24, 24) patches to shifts (B, 4) and face probabilities (B,)."""

    size = 24
    flat = (3, 3)

    def __init__(self, device: str) -> None:
        from facenet_pytorch.models.mtcnn import RNet

        network = RNet().eval().requires_grad_(False).to(device)
        self._stack = _Stack(network, (1, 2, 3), device)
        self._dense, self._slope = network.dense4, network.prelu4.weight
        self._heads = [network.dense5_1, network.dense5_2]

    def __call__(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        return _answers(self._values(patches), self._dense, self._slope, self._heads)

    def _values(self, patches: torch.Tensor) -> torch.Tensor:
        values = thinned(self._stack(patches, 0))
        return self._stack(thinned(self._stack(values, 1)), 2)


class OutputNetwork(RefineNetwork):
    """O-Net: (B, 4, 48, 48) patches to shifts (B, 4) and face probabilities (B,); its landmarks are left out."""

    size = 48

    def __init__(self, device: str) -> None:
        from facenet_pytorch.models.mtcnn import ONet

        network = ONet().eval().requires_grad_(False).to(device)
        self._stack = _Stack(network, (1, 2, 3, 4), device)
        self._dense, self._slope = network.dense5, network.prelu5.weight
        self._heads = [network.dense6_1, network.dense6_2]

    def _values(self, patches: torch.Tensor) -> torch.Tensor:
        values = super()._values(patches)
        return self._stack(halved(values), 3)


def _answers(
    values: torch.Tensor, dense: Any, slope: torch.Tensor, heads: list[Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shifts and face probabilities; the dense layer takes columns before rows, as facenet-pytorch's does."""
    rows = values.permute(0, 3, 2, 1).flatten(1)
    hidden = prelu(linear(rows, dense.weight, dense.bias), slope)
    faces, shifts = (linear(hidden, head.weight, head.bias) for head in heads)
    return shifts, torch.softmax(faces, dim=1)[:, 1]


def halved(values: torch.Tensor) -> torch.Tensor:
    """`max_pool2d(2, 2, ceil_mode=True)` of (B, C, h, w), by maxima of whole rows, then of columns."""
    return _pooled(_pooled(values, 2, 2), 3, 2)


def thinned(values: torch.Tensor) -> torch.Tensor:
    """`max_pool2d(3, 2, ceil_mode=True)` of (B, C, h, w), h and w at least 3."""
    return _pooled(_pooled(values, 2, 3), 3, 3)


def _pooled(values: torch.Tensor, axis: int, window: int) -> torch.Tensor:
    """Maxima of windows, two apart, along one axis; the last may reach beyond the edge."""
    length = values.shape[axis]
    count = -(-(length - window) // 2) + 1

    def every_second(start: int) -> torch.Tensor:
        index: list[slice] = [slice(None)] * 4
        index[axis] = slice(start, start + 2 * count - 1, 2)
        return values[tuple(index)]

    parts = [every_second(start) for start in range(window)]
    # Beyond an odd edge the last window is one short; before it none is.
    full = parts[1].shape[axis] == count
    highest = torch.maximum(parts[0], parts[1]) if full else parts[0].clone()
    for part in parts[2:] if full else parts[1:]:
        target = highest.narrow(axis, 0, part.shape[axis])
        torch.maximum(target, part, out=target)
    return highest
