"""A backbone in two parts: a frozen one, whose output is computed once, and the part after it, which learns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from batchverify.embedding import compact, inception
from batchverify.embedding.backbone import AnyBackbone, Backbone
from batchverify.embedding.forward import input_of
from batchverify.embedding.layers import (
    DROPOUT,
    NormalisedConvolution,
    compact_layers,
    fill,
    inception_layers,
)
from batchverify.errors import UsageError

# The name that unfreezes the whole network.
ALL = "all"
_BUILDERS: dict[str, Callable[[float], nn.Sequential]] = {
    inception.ARCHITECTURE: inception_layers,
    compact.ARCHITECTURE: compact_layers,
}
# The values of `--unfreeze`: the layers that blocks begin with, nearest the output first; each stands for all that
# follows it, too. `all` begins with the pixels.
BLOCKS = {
    inception.ARCHITECTURE: (
        *("last_linear", "block8", "repeat_3", "mixed_7a", "repeat_2", "mixed_6a", "repeat_1"),
        ALL,
    ),
    compact.ARCHITECTURE: ("embedding", "head_depthwise", "head", "stage2", "stage1", "stage0", ALL),
}


def trainable(backbone: AnyBackbone) -> Backbone:
    """The backbone as it is. Raises `UsageError` for one of another project."""
    if not isinstance(backbone, Backbone):
        raise UsageError(
            f"--backbone {backbone.name}: only vggface2, compact and weights of their networks can be trained, not "
            "ONNX files and plug-ins; --teacher takes those"
        )
    return backbone


class FrozenPart:
    """What does not learn: faces, (B, S, S, 3) uint8 RGB on any device, to activations (B, ...), float32.

    Of a network that learns as a whole it only scales pixels. fingerprint: of the backbone. unfreeze: the block after
    it. size: side of a face in pixels. Activations are on `device`, the CPU until `to` is called. mixed: whether
    products are computed in bfloat16.
    """

    def __init__(self, backbone: Backbone, unfreeze: str, layers: nn.Sequential) -> None:
        self.fingerprint, self.unfreeze, self.size = backbone.fingerprint, unfreeze, backbone.spec.size
        self.device, self.mixed = torch.device("cpu"), False
        self._layers = layers.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        for module in self._layers.modules():
            if isinstance(module, NormalisedConvolution):
                module.fold()
        self._backbone, self._scaled = backbone, input_of(backbone, "cpu")

    @property
    def is_empty(self) -> bool:
        """Whether the whole network learns, so that activations are scaled pixels."""
        return self.unfreeze == ALL

    def to(self, device: str | torch.device, *, mixed: bool = False) -> FrozenPart:
        """Move it to a device; returns itself. mixed: see the class."""
        self.device, self.mixed = torch.device(device), mixed
        self._layers.to(self.device)
        self._scaled = input_of(self._backbone, str(device))
        return self

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """See the class."""
        values = self._scaled(pixels.to(self.device).permute(0, 3, 1, 2), torch.float32)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            return self._layers(values).float()


class TrainedPart(nn.Module):
    """The part of a backbone that learns: activations of `frozen` (B, ...) to (B, D) float32, not normalised.

    unfreeze: the block that it begins with, one of `BLOCKS`. dropout: share of values dropped before the last linear
    layer. train_statistics: batch normalisation uses the statistics of each batch and learns them; otherwise the
    stored ones, which stay. Its parameters are float32. Raises `UsageError` for an unknown block and for statistics
    of a network without any, `ArtifactError` for tensors of another network.
    """

    def __init__(
        self,
        backbone: Backbone,
        unfreeze: str,
        *,
        dropout: float = 0.0,
        train_statistics: bool = False,
    ) -> None:
        super().__init__()
        _check(backbone, unfreeze, train_statistics)
        self._backbone = backbone
        self.train_statistics = train_statistics
        network = _BUILDERS[self._backbone.architecture](dropout)
        fill(network, backbone.tensors)
        start = _start(network, unfreeze)
        self.frozen = FrozenPart(self._backbone, unfreeze, network[:start])
        self.layers = network[start:].to(memory_format=torch.channels_last)
        self.train()

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.layers(activations).float()

    def train(self, mode: bool = True) -> TrainedPart:
        """As in torch, but batch normalisation keeps its statistics unless they are to be trained."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and not self.train_statistics:
                module.eval()
        return self

    def groups(self) -> list[tuple[str, list[nn.Parameter]]]:
        """The parameters by block, nearest the output first."""
        grouped: dict[str, list[nn.Parameter]] = {}
        block, names = self.frozen.unfreeze, BLOCKS[self._backbone.architecture]
        for name, layer in self.layers.named_children():
            block = name if name in names else block
            grouped.setdefault(block, []).extend(layer.parameters())
        return list(reversed(grouped.items()))

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors of the whole backbone, float32, by the names of weights files; those of `frozen` unchanged."""
        learnt = {
            name: tensor.detach().cpu().contiguous().numpy().copy()
            for name, tensor in self.layers.state_dict().items()
            if name in self._backbone.tensors
        }
        return {**self._backbone.tensors, **learnt}


def _check(backbone: Backbone, unfreeze: str, train_statistics: bool) -> None:
    """Raise an error unless the backbone can be fine-tuned in this way."""
    known = BLOCKS[backbone.architecture]
    if unfreeze not in known:
        raise UsageError(f"--unfreeze must be one of {', '.join(known)} for {backbone.name}, got '{unfreeze}'")
    if train_statistics and backbone.is_compact:
        raise UsageError(f"--train-statistics: {backbone.name} has no batch normalisation")
    backbone.check_tensors()


def _start(network: nn.Sequential, unfreeze: str) -> int:
    """The number of the first layer that learns."""
    names = [name for name, _ in network.named_children()]
    start = 0 if unfreeze == ALL else names.index(unfreeze)
    return start - 1 if start and names[start - 1] == DROPOUT else start
