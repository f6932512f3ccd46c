"""The three networks of MTCNN (Zhang et al. 2016, arXiv 1604.02878) in OpenVINO, with facenet-pytorch's weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from threading import local
from typing import Any, Protocol

import numpy as np

from batchverify.faces.pyramid import CHANNELS, Pyramid
from batchverify.runtime.compiled_network import CompiledNetwork

WEIGHTS_FILE = "mtcnn.safetensors"
# The max-pooling window after each convolution, with a stride of 2; 0 for none.
PROPOSAL_WINDOWS, REFINE_WINDOWS, OUTPUT_WINDOWS = (2, 0, 0), (3, 3, 0), (3, 3, 2, 0)
REFINE_SIZE, OUTPUT_SIZE = 24, 48
# P-Net is compiled anew after so many canvas sizes, for each of which a compiled network keeps half a megabyte.
SIZES_KEPT = 100

Tensors = dict[str, np.ndarray]
# Shifts of the box (B, 4) and face probabilities (B,).
PatchResults = tuple[np.ndarray, np.ndarray]


class Networks(Protocol):
    """MTCNN's networks on some device, for any number of threads."""

    def propose(self, canvases: np.ndarray, scales: Pyramid) -> np.ndarray:
        """P-Net: (B, h, w, 3) float32 canvases to (B, h', w', 6) float32 cells.

        Columns 0 and 1 are the logits of no face and of a face, 2 to 5 the shifts of the box.
        """

    def refine(self, patches: np.ndarray) -> PatchResults:
        """R-Net: (B, 24, 24, 3) float32 patches to shifts (B, 4) and face probabilities (B,)."""

    def output(self, patches: np.ndarray) -> PatchResults:
        """O-Net: (B, 48, 48, 3) float32 patches to the same; landmarks are not computed."""


def weights_path() -> Path:
    """The packaged weights of all three networks."""
    return Path(str(files("batchverify.faces") / "weights" / WEIGHTS_FILE))


def mtcnn_weights(network: str) -> Tensors:
    """The float32 tensors of `pnet`, `rnet` or `onet` by name."""
    prefix = f"{network}."
    return {name[len(prefix) :]: array for name, array in _stored().items() if name.startswith(prefix)}


@cache
def _stored() -> Tensors:
    """All tensors of the file, read once for all threads."""
    from safetensors.numpy import load_file

    return load_file(weights_path())


class OpenvinoNetworks(local):
    """The networks on this machine's CPU, in float32 because bfloat16 would move boxes by pixels.

    threads: CPUs for each calling thread. Every thread compiles its own networks, the second and the third for each
    shape of patches: with streams of shared ones two threads were a quarter slower (measured). sizes_kept: see
    `SIZES_KEPT`.
    """

    def __init__(self, threads: int = 1, *, sizes_kept: int = SIZES_KEPT) -> None:
        # Called in every thread anew.
        self._threads, self._sizes_kept = threads, sizes_kept
        self._proposal: CompiledNetwork | None = None
        self._sizes: set[tuple[int, ...]] = set()
        self._classifiers: dict[tuple[str, tuple[int, ...]], CompiledNetwork] = {}

    def propose(self, canvases: np.ndarray, scales: Pyramid) -> np.ndarray:
        """See `Networks`."""
        size = canvases.shape
        if self._proposal is None or (len(self._sizes) == self._sizes_kept and size not in self._sizes):
            self._proposal = CompiledNetwork(_proposal_model(), threads=self._threads)
            self._sizes.clear()
        self._sizes.add(size)
        return self._proposal(canvases, scales.mask())[0]

    def refine(self, patches: np.ndarray) -> PatchResults:
        """See `Networks`."""
        return self._classified("rnet", REFINE_WINDOWS, patches)

    def output(self, patches: np.ndarray) -> PatchResults:
        """See `Networks`."""
        return self._classified("onet", OUTPUT_WINDOWS, patches)

    def _classified(self, network: str, windows: Sequence[int], patches: np.ndarray) -> PatchResults:
        key = network, patches.shape
        if key not in self._classifiers:
            model = _patch_model(network, windows, patches.shape)
            self._classifiers[key] = CompiledNetwork(model, threads=self._threads)
        shifts, scores = self._classifiers[key](patches)
        return shifts, scores[:, 1]


class _Builder:
    """Makes the layers of one network as OpenVINO nodes."""

    def __init__(self, network: str) -> None:
        from openvino import opset13

        self.ops = opset13
        self._tensors = mtcnn_weights(network)

    def input(self, *shape: int) -> tuple[Any, Any]:
        """(parameter, values): images as they are in memory, and the same with channels first."""
        from openvino import PartialShape

        images = self.ops.parameter(PartialShape([*shape, CHANNELS]), np.float32)
        return images, self.ops.transpose(images, self.ops.constant(np.array([0, 3, 1, 2])))

    def convolution(self, values: Any, *names: str) -> Any:
        """Convolutions without padding, with concatenated outputs."""
        weight = np.concatenate([self._tensors[f"{name}.weight"] for name in names])
        bias = np.concatenate([self._tensors[f"{name}.bias"] for name in names])
        product = self.ops.convolution(values, self.ops.constant(weight), [1, 1], [0, 0], [0, 0], [1, 1])
        return self.ops.add(product, self.ops.constant(bias.reshape(1, -1, 1, 1)))

    def prelu(self, values: Any, name: str) -> Any:
        return self.ops.prelu(values, self.ops.constant(self._tensors[f"{name}.weight"]))

    def pool(self, values: Any, window: int) -> Any:
        """Max pooling with a stride of 2; the last windows may extend beyond the edge."""
        if not window:
            return values
        size = [window, window]
        return self.ops.max_pool(values, [2, 2], [1, 1], [0, 0], [0, 0], size, "ceil").output(0)

    def dense(self, values: Any, name: str) -> Any:
        product = self.ops.matmul(values, self.ops.constant(self._tensors[f"{name}.weight"]), False, True)
        return self.ops.add(product, self.ops.constant(self._tensors[f"{name}.bias"].reshape(1, -1)))

    def model(self, outputs: Sequence[Any], inputs: Sequence[Any]) -> Any:
        from openvino import Model

        return Model([self.ops.result(output) for output in outputs], list(inputs))


def _proposal_model() -> Any:
    """P-Net for any number of canvases of any size, with the mask of their levels."""
    from openvino import PartialShape

    builder = _Builder("pnet")
    images, values = builder.input(-1, -1, -1)
    mask = builder.ops.parameter(PartialShape([1, 1, -1, -1]), np.float32)
    for number, window in enumerate(PROPOSAL_WINDOWS, 1):
        values = builder.prelu(builder.convolution(values, f"conv{number}"), f"prelu{number}")
        if window:
            values = builder.pool(builder.ops.add(values, mask), window)
    cells = builder.convolution(values, "conv4_1", "conv4_2")
    return builder.model([builder.ops.transpose(cells, np.array([0, 2, 3, 1]))], [images, mask])


def _patch_model(network: str, windows: Sequence[int], shape: tuple[int, ...]) -> Any:
    """R-Net or O-Net for patches of a shape: shifts (B, 4), probabilities of no face and of a face (B, 2)."""
    number, size = shape[:2]
    builder = _Builder(network)
    images, values = builder.input(number, size, size)
    for layer, window in enumerate(windows, 1):
        values = builder.prelu(builder.convolution(values, f"conv{layer}"), f"prelu{layer}")
        values = builder.pool(values, window)
    # Columns before rows, in the order of facenet-pytorch's dense weights.
    values = builder.ops.transpose(values, np.array([0, 3, 2, 1]))
    values = builder.ops.reshape(values, np.array([number, -1]), False)
    dense = len(windows) + 1
    hidden = builder.prelu(builder.dense(values, f"dense{dense}"), f"prelu{dense}")
    faces = builder.ops.softmax(builder.dense(hidden, f"dense{dense + 1}_1"), 1)
    return builder.model([builder.dense(hidden, f"dense{dense + 1}_2"), faces], [images])
