"""RetinaFace's network in torch: for GPUs, and for CPUs without OpenVINO."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import conv2d, interpolate, leaky_relu, relu

from batchverify.faces.retinaface_network import MEANS, VALUES, network, retinaface_weights
from batchverify.runtime.devices import full_float32, on_device


class TorchNetwork:
    """The network on a device, in float32; see `retinaface_network.Network`."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._tensors = {name: on_device(array, device) for name, array in retinaface_weights().items()}
        self._means = torch.tensor(MEANS, device=device).reshape(1, 3, 1, 1)
        if device != "cpu":
            full_float32()
            # Threads use their own streams, which do not wait for the copies of the weights.
            torch.cuda.synchronize(device)

    @torch.inference_mode()
    def __call__(self, canvases: np.ndarray) -> np.ndarray:
        """See `retinaface_network.Network`."""
        pixels = torch.from_numpy(canvases).to(self._device).permute(0, 3, 1, 2)
        levels = network(self, pixels.float() - self._means)
        rows = [level.permute(0, 2, 3, 1).reshape(len(canvases), -1, VALUES) for level in levels]
        return torch.cat(rows, dim=1).cpu().numpy()

    def convolution(self, values: torch.Tensor, name: str, stride: int = 1, slope: float = 1.0) -> torch.Tensor:
        """See `retinaface_network.Operations`."""
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        groups = len(weight) if name.endswith("depthwise") else 1
        total = conv2d(values, weight, bias, stride, weight.shape[-1] // 2, groups=groups)
        return total if slope == 1 else leaky_relu(total, slope, inplace=True)

    def doubled(self, values: torch.Tensor) -> torch.Tensor:
        """See `retinaface_network.Operations`."""
        return interpolate(values, scale_factor=2.0)

    def add(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """See `retinaface_network.Operations`."""
        return first + second

    def join(self, values: list[torch.Tensor]) -> torch.Tensor:
        """See `retinaface_network.Operations`."""
        return relu(torch.cat(values, dim=1))
