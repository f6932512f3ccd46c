"""The compact network as data: its layers in the order of the forward pass, and the tensors that belong to it.

Source: face-reidentification-retail-0095 of Intel's Open Model Zoo, a MobileNetV2 (Sandler et al. 2018, arXiv
1801.04381) with squeeze-and-excitation (Hu et al. 2018, arXiv 1709.01507), PReLU, and a depthwise convolution over
the whole of the last feature map in place of a mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from batchverify.fingerprint import EmbeddingSettings

ARCHITECTURE = "face-reidentification-retail-0095"
SIZE = 128
DIMENSION = 256
NORMALISATION = "x, BGR"
# Faces in a batch on CPUs: the first feature maps are a megabyte a face, and more leave its cache. In shorter numbers
# they take half of that.
CPU_BATCH, SHORT_BATCH = 4, 8
SETTINGS = EmbeddingSettings("align", detector="retinaface", template="reid-0095")


@dataclass(frozen=True)
class Convolution:
    """A convolution. depthwise: each channel by itself. activated: PReLU with one slope follows."""

    name: str
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    depthwise: bool = False
    activated: bool = True
    biased: bool = True

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of its weight."""
        return self.outputs, 1 if self.depthwise else self.inputs, self.kernel, self.kernel


@dataclass(frozen=True)
class Bottleneck:
    """Expanded, convolved channel by channel, projected and weighted by channel; added to the input if that fits.

    squeezed: channels between the two layers that find the weights from the mean over the feature map.
    """

    name: str
    inputs: int
    expanded: int
    outputs: int
    stride: int
    squeezed: int

    @property
    def residual(self) -> bool:
        """Whether the input is added."""
        return self.stride == 1 and self.inputs == self.outputs

    @property
    def convolutions(self) -> tuple[Convolution, Convolution, Convolution]:
        """Those over the feature map."""
        return (
            Convolution(f"{self.name}.expand", self.inputs, self.expanded),
            Convolution(f"{self.name}.depthwise", self.expanded, self.expanded, 3, self.stride, 1, True),
            Convolution(f"{self.name}.project", self.expanded, self.outputs, activated=False),
        )

    @property
    def weighting(self) -> tuple[Convolution, Convolution]:
        """Those over the mean; a sigmoid follows the second."""
        return (
            Convolution(f"{self.name}.squeeze", self.outputs, self.squeezed),
            Convolution(f"{self.name}.excite", self.squeezed, self.outputs, activated=False),
        )


Layer = Convolution | Bottleneck


def _layers() -> Iterator[Layer]:
    yield Convolution("stem", 3, 64, 3, 2, 1)
    yield Convolution("stem_depthwise", 64, 64, 3, 1, 1, True)
    for stage, (inputs, outputs, expanded, repeats, squeezed) in enumerate(
        ((64, 64, 128, 5, 8), (64, 128, 256, 7, 16), (128, 128, 512, 3, 16))
    ):
        yield Bottleneck(f"stage{stage}.0", inputs, expanded, outputs, 2, squeezed)
        # The last stage expands less after its first block.
        repeated = min(expanded, 256)
        for block in range(1, repeats):
            yield Bottleneck(f"stage{stage}.{block}", outputs, repeated, outputs, 1, squeezed)
    yield Convolution("head", 128, 512)
    yield Convolution("head_depthwise", 512, 512, 8, depthwise=True, activated=False)
    yield Convolution("embedding", 512, DIMENSION, activated=False, biased=False)


# First the pixels, BGR from 0 to 255, are multiplied by `input.scale` and added to `input.shift`.
LAYERS: tuple[Layer, ...] = tuple(_layers())


def convolutions() -> Iterator[Convolution]:
    """All convolutions in the order of the forward pass."""
    for layer in LAYERS:
        if isinstance(layer, Convolution):
            yield layer
        else:
            yield from layer.convolutions
            yield from layer.weighting


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """The shapes of the network's tensors by name."""
    shapes: dict[str, tuple[int, ...]] = {"input.scale": (3,), "input.shift": (3,)}
    for layer in convolutions():
        shapes[f"{layer.name}.weight"] = layer.shape
        if layer.biased:
            shapes[f"{layer.name}.bias"] = (layer.outputs,)
        if layer.activated:
            shapes[f"{layer.name}.slope"] = (1,)
    return shapes
