"""The backbone in torch, in batches of one fixed shape; on a GPU as a CUDA graph, from pinned memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock, local
from typing import TypeVar

import numpy as np
import torch
from torch.nn.functional import conv2d, linear, max_pool2d, normalize, relu

from batchverify.embedding.backbone import Backbone
from batchverify.embedding.inception import (
    DIMENSION,
    LAYERS,
    Convolution,
    Layer,
    Pool,
    Residual,
    check_tensors,
    fold,
)
from batchverify.errors import BatchverifyError, UsageError
from batchverify.fingerprint import FACE_SIZE
from batchverify.runtime.devices import cpu_has_bf16, full_float32

log = logging.getLogger(__name__)

Found = TypeVar("Found")

CPU_BATCH = 32
# Tried in this order; the largest is `engine.GPU_CHUNK`: larger ones would be padded.
GPU_BATCHES = (128, 256, 512)
# Passes before a graph is recorded: libraries choose their ways and allocate in the first.
WARM_UP = 3
TIMED = 5
# A larger batch must be worth its memory and its padding.
WORTH = 1.03
# One thread records at a time: recording begins and ends with calls that concern the whole device.
_RECORDING = Lock()


class TorchInception:
    """InceptionResnetV1 with folded weights: (B, 3, 160, 160) to (B, 512), not normalised; see `inception.py`.

    Raises `ArtifactError` when the tensors are not those of the network.
    """

    def __init__(self, backbone: Backbone, device: str, dtype: torch.dtype) -> None:
        check_tensors(backbone.name, backbone.tensors)
        self._layers = {
            name: tuple(torch.from_numpy(array).to(device, dtype) for array in arrays)
            for name, arrays in fold(backbone.tensors).items()
        }
        for name, (weight, bias) in self._layers.items():
            if weight.ndim == 4:
                self._layers[name] = weight.contiguous(memory_format=torch.channels_last), bias

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        for layer in LAYERS:
            values = self._layer(values, layer)
        return linear(values.mean((2, 3)), *self._layers["last_linear"])

    def _layer(self, values: torch.Tensor, layer: Layer) -> torch.Tensor:
        if isinstance(layer, Pool):
            return max_pool2d(values, 3, 2)
        if isinstance(layer, Convolution):
            return relu(self._sum(values, layer), inplace=True)
        ends = []
        for branch in layer.branches:
            end = values
            for each in branch:
                end = relu(self._sum(end, each), inplace=True)
            ends.append(end)
        if not isinstance(layer, Residual):
            return torch.cat([*ends, max_pool2d(values, 3, 2)], 1)
        total = self._sum(torch.cat(ends, 1), layer.projection).add_(values)
        return relu(total, inplace=True) if layer.relu else total

    def _sum(self, values: torch.Tensor, layer: Convolution) -> torch.Tensor:
        weight, bias = self._layers[layer.name]
        return conv2d(values, weight, bias, layer.stride, layer.padding)


@dataclass(frozen=True)
class Pass:
    """What is computed. network: on `device`, in `dtype`; flip: the mean of the vectors of both mirror images."""

    network: Callable[[torch.Tensor], torch.Tensor]
    device: str
    dtype: torch.dtype
    flip: bool = False

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 160, 160, 3) uint8 on the device to (B, 512) float32 unit rows there."""
        inputs = pixels.permute(0, 3, 1, 2)  # (B, 3, 160, 160), channels last
        # Exact in every number format: bytes, halves of odd numbers, and these by a power of two.
        inputs = inputs.to(self.dtype).sub_(127.5).div_(128)
        vectors = self.network(inputs).float()
        if self.flip:
            vectors = vectors + self.network(inputs.flip(3)).float()
        return normalize(vectors)


class Forward:
    """Batches of `size` faces on a CPU: `Forward(…)(pixels)`."""

    def __init__(self, compute: Pass, size: int) -> None:
        self.compute, self.size = compute, size

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """(N, 160, 160, 3) uint8, N at most `size`, to (N, 512) float32 unit rows; padded to `size`."""
        full = torch.zeros(self.size, FACE_SIZE, FACE_SIZE, 3, dtype=torch.uint8)
        full.numpy()[: len(pixels)] = pixels
        return self.compute(full).numpy()[: len(pixels)]


class GpuForward(Forward):
    """The same on a GPU, for one thread: its copies and kernels run on a stream of their own, beside others'.

    Bytes go over the bus from pinned memory, the pass is recorded once and replayed. Where it cannot be
    recorded it is called as it is.
    """

    def __init__(self, compute: Pass, size: int) -> None:
        super().__init__(compute, size)
        shape = size, FACE_SIZE, FACE_SIZE, 3
        self._bytes = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        self._answers = torch.zeros(size, DIMENSION, pin_memory=True)
        self._stream = torch.cuda.Stream(compute.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        with _RECORDING, torch.cuda.stream(self._stream):
            self._pixels = torch.zeros(shape, dtype=torch.uint8, device=compute.device)
            for _ in range(WARM_UP):
                self._rows = compute(self._pixels)
            self._stream.synchronize()
            self._record()

    @property
    def recorded(self) -> bool:
        """Whether the pass is a graph."""
        return self._graph is not None

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """See `Forward`."""
        # Places that are left hold earlier faces: no vector depends on its neighbours.
        self._bytes.numpy()[: len(pixels)] = pixels
        with torch.cuda.stream(self._stream):
            self._pixels.copy_(self._bytes, non_blocking=True)
            if self._graph is not None:
                self._graph.replay()
            else:
                self._rows = self.compute(self._pixels)
            self._answers.copy_(self._rows, non_blocking=True)
        self._stream.synchronize()
        return self._answers.numpy()[: len(pixels)].copy()

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads go on meanwhile: what they call is none of this recording's business.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._rows = self.compute(self._pixels)
        except RuntimeError as exc:
            if is_out_of_memory(exc):
                raise
            log.warning("%s: no CUDA graph, the network is called as it is: %s", self.compute.device, exc)
            self._stream = torch.cuda.Stream(self.compute.device)
            return
        self._graph = graph


class TorchNetwork:
    """The backbone in torch: (N, 160, 160, 3) uint8 RGB faces to (N, 512) float32 unit rows, from any thread.

    Folded and channels last, always in batches of one fixed shape. On a GPU the batch is found by trying, and halved
    where memory runs out. threads: of a CPU, for each thread that calls; torch's own number by default.
    Raises `ArtifactError` for other weights, `UsageError` for a dtype that torch does not have.
    """

    def __init__(
        self,
        backbone: Backbone,
        device: str,
        *,
        dtype: str = "auto",
        flip: bool = False,
        batch_size: int | None = None,
        threads: int | None = None,
    ) -> None:
        self._threads = threads
        self.device, self.dtype = device, choose_dtype(dtype, device)
        torch_dtype: torch.dtype = getattr(torch, self.dtype)
        self.compute = Pass(TorchInception(backbone, device, torch_dtype), device, torch_dtype, flip)
        self._of_thread, self._shrinking = local(), Lock()
        if self.on_gpu:
            full_float32()
            # Threads work on streams of their own; what is not there yet must not be used by them.
            torch.cuda.synchronize(device)
        self.batch_size = batch_size or self._best_batch()

    @property
    def on_gpu(self) -> bool:
        """Whether the device is one."""
        return self.device != "cpu"

    @torch.inference_mode()
    def vectors(self, pixels: np.ndarray) -> np.ndarray:
        """(N, 160, 160, 3) uint8 RGB to (N, 512) float32 unit rows. Raises `BatchverifyError` for overflows."""
        rows: list[np.ndarray] = []
        done = 0
        while done < len(pixels):
            size = self.batch_size
            found = self.within_memory(partial(self._batch, size, pixels[done : done + size]))
            if found is None:
                self._shrink(size)
                continue
            rows.append(found)
            done += len(found)
        return np.concatenate(rows) if rows else np.zeros((0, DIMENSION), np.float32)

    def within_memory(self, work: Callable[[], Found]) -> Found | None:
        """What the work gives; None, all that it held being free again, where a GPU's memory was too small."""
        try:
            return work()
        except RuntimeError as exc:
            if not is_out_of_memory(exc):
                raise
            log.info("%s: %s", self.device, exc)
        self._of_thread.forward = None
        torch.cuda.empty_cache()
        return None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """This thread's share: of a CPU `threads`, of a GPU a stream, whose copies hide behind others' work."""
        if not self.on_gpu:
            self._limit_threads()
            yield
            return
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._of_thread.stream):
            yield

    def _limit_threads(self) -> None:
        """On a CPU: torch keeps a number of threads for each thread that calls it."""
        if self._threads and not self.on_gpu:
            torch.set_num_threads(self._threads)

    def forward(self, size: int) -> Forward:
        """The forward pass at a batch size; on a GPU this thread's own."""
        if not self.on_gpu:
            return Forward(self.compute, size)
        kept: Forward | None = getattr(self._of_thread, "forward", None)
        if kept is None or kept.size != size:
            # The old one's memory first.
            self._of_thread.forward = kept = None
            self._of_thread.forward = kept = GpuForward(self.compute, size)
        return kept

    @torch.inference_mode()
    def _best_batch(self) -> int:
        if not self.on_gpu:
            return CPU_BATCH
        best = fastest_size(GPU_BATCHES, lambda size: faces_per_second(GpuForward(self.compute, size)))
        torch.cuda.empty_cache()
        return best

    def _shrink(self, size: int) -> None:
        """Halve the batch that was too large, unless another thread has; `BatchverifyError` where it was one face."""
        with self._shrinking:
            if self.batch_size < size:
                return
            if size == 1:
                raise BatchverifyError(f"{self.device}: no memory for a single face")
            self.batch_size = size // 2
        log.warning("%s: out of memory; going on with batches of %d faces", self.device, self.batch_size)

    def _batch(self, size: int, pixels: np.ndarray) -> np.ndarray:
        self._limit_threads()
        rows = self.forward(size)(pixels)
        if not np.isfinite(rows).all():
            raise BatchverifyError(f"the backbone gave vectors that are not finite ({self.dtype}, torch)")
        return rows


def choose_dtype(dtype: str, device: str) -> str:
    """What torch computes in on a device: as asked for, or with `auto` its fastest. Raises `UsageError`."""
    if dtype == "auto":
        if device.startswith("cuda"):
            # bfloat16 has float32's range: nothing overflows.
            return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
        return "bfloat16" if cpu_has_bf16() else "float32"
    kinds = ("float32", "bfloat16", "float16")
    if dtype not in kinds:
        raise UsageError(f"--dtype must be auto, {', '.join(kinds)} in torch, got '{dtype}'")
    return dtype


def is_out_of_memory(exc: RuntimeError) -> bool:
    """Whether a GPU, one of its libraries, or pinned memory had no room."""
    return isinstance(exc, torch.cuda.OutOfMemoryError) or any(
        words in str(exc) for words in ("out of memory", "ALLOC_FAILED")
    )


def fastest_size(sizes: Sequence[int], rate: Callable[[int], float]) -> int:
    """Of rising batch sizes the one with most faces a second, by trying; those beyond the memory are none."""
    best, most = sizes[0], 0.0
    for size in sizes:
        try:
            found = rate(size)
        except RuntimeError as exc:
            if not is_out_of_memory(exc):
                raise
            found = 0.0
        log.info("batches of %d faces: %.0f faces a second", size, found)
        if found <= most * WORTH:
            break
        best, most = size, found
    return best


def faces_per_second(forward: Forward) -> float:
    """How fast a forward pass is, by the clock."""
    pixels = np.zeros((forward.size, FACE_SIZE, FACE_SIZE, 3), np.uint8)
    forward(pixels)
    started = time.perf_counter()
    for _ in range(TIMED):
        forward(pixels)
    return TIMED * forward.size / (time.perf_counter() - started)
