"""The three networks of MTCNN in torch: for GPUs, and for CPUs without OpenVINO."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import conv2d, linear, max_pool2d, prelu

from batchverify.faces.mtcnn import (
    OUTPUT_WINDOWS,
    PROPOSAL_WINDOWS,
    REFINE_WINDOWS,
    PatchResults,
    mtcnn_weights,
)
from batchverify.faces.pyramid import Pyramid
from batchverify.runtime.devices import full_float32, on_device

Tensors = dict[str, torch.Tensor]


class TorchNetworks:
    """The networks on a device, in float32; see `mtcnn.Networks`."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._pnet, self._rnet, self._onet = (self._weights(name) for name in ("pnet", "rnet", "onet"))
        if device != "cpu":
            full_float32()
            # Threads use their own streams, which do not wait for the copies of the weights.
            torch.cuda.synchronize(device)

    def _weights(self, network: str) -> Tensors:
        return {name: on_device(array, self._device) for name, array in mtcnn_weights(network).items()}

    @torch.inference_mode()
    def propose(self, canvases: np.ndarray, scales: Pyramid) -> np.ndarray:
        """See `mtcnn.Networks`."""
        tensors, mask = self._pnet, torch.from_numpy(scales.mask()).to(self._device)
        values = _convolved(tensors, self._images(canvases), PROPOSAL_WINDOWS, mask)
        cells = [_convolution(values, tensors, name) for name in ("conv4_1", "conv4_2")]
        return torch.cat(cells, dim=1).permute(0, 2, 3, 1).cpu().numpy()

    @torch.inference_mode()
    def refine(self, patches: np.ndarray) -> PatchResults:
        """See `mtcnn.Networks`."""
        return self._classified(self._rnet, patches, REFINE_WINDOWS)

    @torch.inference_mode()
    def output(self, patches: np.ndarray) -> PatchResults:
        """See `mtcnn.Networks`."""
        return self._classified(self._onet, patches, OUTPUT_WINDOWS)

    def _classified(self, tensors: Tensors, patches: np.ndarray, windows: Sequence[int]) -> PatchResults:
        values, dense = _convolved(tensors, self._images(patches), windows), len(windows) + 1
        # Columns before rows, in the order of facenet-pytorch's dense weights.
        hidden = _dense(values.permute(0, 3, 2, 1).flatten(1), tensors, f"dense{dense}")
        hidden = prelu(hidden, tensors[f"prelu{dense}.weight"])
        faces = torch.softmax(_dense(hidden, tensors, f"dense{dense + 1}_1"), dim=1)[:, 1]
        return _dense(hidden, tensors, f"dense{dense + 1}_2").cpu().numpy(), faces.cpu().numpy()

    def _images(self, images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)


def _convolved(
    tensors: Tensors, values: torch.Tensor, windows: Sequence[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolutions with PReLU and max pooling. mask: added before the first pooling."""
    for number, window in enumerate(windows, 1):
        values = prelu(_convolution(values, tensors, f"conv{number}"), tensors[f"prelu{number}.weight"])
        if mask is not None and number == 1:
            values = values + mask
        if window:
            values = max_pool2d(values, window, 2, ceil_mode=True)
    return values


def _convolution(values: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
    return conv2d(values, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def _dense(values: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
    return linear(values, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
