"""The three networks of MTCNN with facenet-pytorch's weights, rearranged for speed; the functions are the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import conv2d, linear, max_pool2d, pad, prelu

from batchverify.facenet import mtcnn_weights
from batchverify.kernels import slope
from batchverify.pyramid import CHANNELS, Pyramid
from batchverify.strips import PooledConvolution, maxima
from batchverify.vectors import LANES
from batchverify.winograd import WinogradConvolution

Tensors = dict[str, torch.Tensor]


class Convolution:
    """Convolutions without padding, their outputs side by side; channels that pad have weight zero."""

    def __init__(self, tensors: Tensors, names: Sequence[str], inputs: int, device: str) -> None:
        weights = torch.cat([tensors[f"{name}.weight"] for name in names])
        used, given, *kernel = weights.shape
        # Half-filled vectors cost as much.
        self.outputs = -(-used // LANES) * LANES
        weight = torch.zeros(self.outputs, inputs, *kernel)
        weight[:used, :given] = weights
        bias = torch.zeros(self.outputs)
        bias[:used] = torch.cat([tensors[f"{name}.bias"] for name in names])
        self.weight = weight.to(device, memory_format=torch.channels_last)
        self.bias = bias.to(device)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, D, h - k + 1, w - k + 1), channels last."""
        return conv2d(values, self.weight, self.bias)


class Layer:
    """A convolution and PReLU, then maxima of windows two apart where there is a window."""

    def __init__(self, tensors: Tensors, number: int, inputs: int, window: int, device: str) -> None:
        self._window = window
        self._convolution = convolution = Convolution(tensors, [f"conv{number}"], inputs, device)
        self.outputs = convolution.outputs
        slopes = tensors[f"prelu{number}.weight"]
        self._slopes = pad(slopes, (0, self.outputs - len(slopes))).to(device)
        self._compiled: PooledConvolution | WinogradConvolution | None = None
        if device == "cpu" and convolution.weight.shape[2:] == (3, 3):
            arrays = convolution.weight.numpy(), convolution.bias.numpy(), self._slopes.numpy()
            if inputs == CHANNELS:
                self._compiled = PooledConvolution(*arrays, window)
            else:
                self._compiled = WinogradConvolution(*arrays)

    def __call__(self, values: torch.Tensor, areas: np.ndarray | None = None) -> torch.Tensor:
        """(B, C, h, w) to (B, D, h', w'), channels last; areas: as `PooledConvolution` takes them."""
        if self._compiled is None:
            return _pooled(sloped(self._convolution(values), self._slopes), self._window, areas)
        rows = values.permute(0, 2, 3, 1).numpy()
        if isinstance(self._compiled, PooledConvolution):
            found = self._compiled(rows, areas)
        else:
            found = self._compiled(rows)
            found = maxima(found, self._window) if self._window else found
        return torch.from_numpy(found).permute(0, 3, 1, 2)


def sloped(values: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """PReLU of (B, C) or of (B, C, h, w) channels last; on a CPU in place."""
    if values.is_cuda:
        return prelu(values, slopes)
    rows = values.permute(0, 2, 3, 1).view(-1, values.shape[1]) if values.ndim == 4 else values
    slope(rows.numpy(), slopes.numpy())
    return values


def _pooled(values: torch.Tensor, window: int, areas: np.ndarray | None = None) -> torch.Tensor:
    """Maxima of windows, of each area by itself, by calls that GPUs have, too; no window: the values."""
    if not window:
        return values
    if areas is None:
        return max_pool2d(values, window, 2, ceil_mode=True)
    rows, columns = (-(-(length - window) // 2) + 1 for length in values.shape[2:])
    shape = len(values), values.shape[1], rows, columns
    target = torch.empty(shape, device=values.device, memory_format=torch.channels_last).zero_()
    for top, left, height, width in areas.tolist():
        area = values[:, :, top : top + height, left : left + width]
        found = max_pool2d(area, window, 2, ceil_mode=True)
        bottom, right = top // 2 + found.shape[2], left // 2 + found.shape[3]
        target[:, :, top // 2 : bottom, left // 2 : right] = found
    return target


def _layers(tensors: Tensors, windows: Sequence[int], device: str) -> list[Layer]:
    """Convolutions one after the other, each with the window of its maxima, 0 for none."""
    layers: list[Layer] = []
    for number, window in enumerate(windows, 1):
        inputs = layers[-1].outputs if layers else CHANNELS
        layers.append(Layer(tensors, number, inputs, window, device))
    return layers


class _Dense:
    """The last layers of a network: a dense one with its slope, then face and shifts beside one another."""

    def __init__(self, tensors: Tensors, number: int, device: str) -> None:
        names = (f"dense{number}", f"dense{number + 1}_1", f"dense{number + 1}_2")
        self._layers = [
            (tensors[f"{name}.weight"].to(device), tensors[f"{name}.bias"].to(device)) for name in names
        ]
        self._slopes = tensors[f"prelu{number}.weight"].to(device)

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, h, w) to shifts (B, 4) and face probabilities (B,); columns before rows, as facenet-pytorch."""
        dense, face, shift = self._layers
        hidden = sloped(linear(values.permute(0, 3, 2, 1).flatten(1), *dense), self._slopes)
        return linear(hidden, *shift), torch.softmax(linear(hidden, *face), dim=1)[:, 1]


class ProposalNetwork:
    """P-Net over whole canvases of scales: what it says of every cell, (B, h, w, 16) float32.

    Columns 0 and 1 are its logits of no face and of a face, 2 to 5 the shifts of the box.
    """

    def __init__(self, device: str) -> None:
        tensors = mtcnn_weights("pnet")
        self._layers = _layers(tensors, (2, 0, 0), device)
        self._heads = Convolution(tensors, ["conv4_1", "conv4_2"], self._layers[-1].outputs, device)

    def __call__(self, canvas: torch.Tensor, pyramid: Pyramid) -> np.ndarray:
        """canvas: (B, 3, H, W) float32, one beside another from `Pyramid.canvas`."""
        first, second, third = self._layers
        return self._heads(third(second(first(canvas, pyramid.areas)))).permute(0, 2, 3, 1).cpu().numpy()


class RefineNetwork:
    """R-Net: (B, 3, 24, 24) patches to shifts (B, 4) and face probabilities (B,)."""

    size = 24

    def __init__(self, device: str) -> None:
        tensors = mtcnn_weights("rnet")
        self._layers = _layers(tensors, (3, 3, 0), device)
        self._dense = _Dense(tensors, 4, device)

    def __call__(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        values = patches
        for layer in self._layers:
            values = layer(values)
        return self._dense(values)


class OutputNetwork(RefineNetwork):
    """O-Net: (B, 3, 48, 48) patches to shifts (B, 4) and face probabilities (B,); its landmarks are left out."""

    size = 48

    def __init__(self, device: str) -> None:
        tensors = mtcnn_weights("onet")
        self._layers = _layers(tensors, (3, 3, 2, 0), device)
        self._dense = _Dense(tensors, 5, device)
