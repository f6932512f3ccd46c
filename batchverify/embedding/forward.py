"""The backbone in torch, in batches of one fixed shape; on a GPU as a CUDA graph."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from threading import Lock, local
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.functional import conv2d, linear, max_pool2d, normalize, relu

from batchverify.embedding.backbone import Backbone
from batchverify.embedding.inception import (
    CPU_BATCH,
    LAYERS,
    Convolution,
    Layer,
    Pool,
    Residual,
    fold,
)
from batchverify.embedding.layers import compact_layers, fill
from batchverify.errors import BatchverifyError, UsageError
from batchverify.fingerprint import FACE_SIZE
from batchverify.process import require_own_process
from batchverify.runtime.devices import cpu_has_bf16, full_float32, limit_torch, on_device, survive_forks

log = logging.getLogger(__name__)

T = TypeVar("T")

# Tried in this order. The largest equals `GPU_CHUNK` of the engines: larger ones would always be padded.
GPU_BATCHES = (128, 256, 512)
# Passes before a graph is recorded: in the first ones libraries choose algorithms and allocate memory.
WARM_UP = 3
TIMED = 5
# A larger batch must be this much faster to be worth its memory and padding.
LEAST_GAIN = 1.03
# Only one thread records at a time: recording starts and ends with calls that affect the whole device.
_RECORDING = Lock()


class TorchInception:
    """InceptionResnetV1 with folded weights: (B, 3, 160, 160) to (B, 512), not normalised; see `inception.py`."""

    def __init__(self, backbone: Backbone, device: str, dtype: torch.dtype) -> None:
        self._layers = {
            name: tuple(on_device(array, device, dtype) for array in arrays)
            for name, arrays in fold(backbone.tensors).items()
        }

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        for layer in LAYERS:
            values = self._layer(values, layer)
        return linear(values.mean((2, 3)), *self._layers["last_linear"])

    def _layer(self, values: torch.Tensor, layer: Layer) -> torch.Tensor:
        if isinstance(layer, Pool):
            return max_pool2d(values, 3, 2)
        if isinstance(layer, Convolution):
            return self._activated(values, layer)
        outputs = [reduce(self._activated, branch, values) for branch in layer.branches]
        if not isinstance(layer, Residual):
            return torch.cat([*outputs, max_pool2d(values, 3, 2)], 1)
        total = self._sum(torch.cat(outputs, 1), layer.projection).add_(values)
        return relu(total, inplace=True) if layer.relu else total

    def _activated(self, values: torch.Tensor, layer: Convolution) -> torch.Tensor:
        return relu(self._sum(values, layer), inplace=True)

    def _sum(self, values: torch.Tensor, layer: Convolution) -> torch.Tensor:
        weight, bias = self._layers[layer.name]
        return conv2d(values, weight, bias, layer.stride, layer.padding)


def torch_compact(backbone: Backbone, device: str, dtype: torch.dtype) -> nn.Module:
    """The compact network: scaled faces (B, 3, 128, 128) to (B, 256), not normalised; see `compact.py`."""
    network = compact_layers().eval().requires_grad_(False)
    fill(network, backbone.tensors)
    return network.to(device, dtype).to(memory_format=torch.channels_last)


def centred(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 as InceptionResnetV1 takes it, -1 to 1. Exact in every dtype: halves of odd numbers, a power of two."""
    return pixels.to(dtype).sub_(127.5).div_(128)


def _reversed(scale: torch.Tensor, shift: torch.Tensor, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 RGB as the compact network takes it, scaled in float32: shorter types are not exact."""
    return pixels.flip(1).float().mul_(scale).add_(shift).to(dtype)


def input_of(backbone: Backbone, device: str) -> Callable[[torch.Tensor, torch.dtype], torch.Tensor]:
    """What turns (B, 3, S, S) uint8 RGB on a device into the input of a network of ours, in a dtype."""
    if not backbone.is_compact:
        return centred
    scale, shift = (
        on_device(backbone.tensors[f"input.{name}"].reshape(1, 3, 1, 1), device) for name in ("scale", "shift")
    )
    return partial(_reversed, scale, shift)


@dataclass(frozen=True)
class ForwardPass:
    """Pixels to unit vectors.

    network: on `device`, in `dtype`. flip: add the vectors of the mirror images. size: side of a face in pixels.
    scale: from (B, 3, S, S) uint8 RGB to the network's input in a dtype.
    """

    network: Callable[[torch.Tensor], torch.Tensor]
    device: str
    dtype: torch.dtype
    flip: bool = False
    size: int = FACE_SIZE
    scale: Callable[[torch.Tensor, torch.dtype], torch.Tensor] = centred

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) uint8 on the device to (B, D) float32 unit rows there."""
        inputs = pixels.permute(0, 3, 1, 2)  # (B, 3, S, S), channels last
        inputs = self.scale(inputs, self.dtype)
        vectors = self.network(inputs).float()
        if self.flip:
            vectors = vectors + self.network(inputs.flip(3)).float()
        return normalize(vectors)


class BatchRunner:
    """Runs a forward pass on a CPU in batches of `size` faces."""

    def __init__(self, compute: ForwardPass, size: int) -> None:
        self.compute, self.size = compute, size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of a batch of pixels."""
        return self.size, self.compute.size, self.compute.size, 3

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8, N at most `size`, to (N, D) float32 unit rows; padded to `size`."""
        padded = torch.zeros(self.shape, dtype=torch.uint8)
        padded.numpy()[: len(pixels)] = pixels
        return self.compute(padded).numpy()[: len(pixels)]


class GpuBatchRunner(BatchRunner):
    """The same on a GPU, for one thread, which has its own CUDA stream.

    Pixels are copied from pinned memory. The pass is recorded once as a CUDA graph and replayed; if it cannot be
    recorded, it is called directly.
    """

    def __init__(self, compute: ForwardPass, size: int) -> None:
        super().__init__(compute, size)
        self._host_pixels = torch.zeros(self.shape, dtype=torch.uint8, pin_memory=True)
        self._stream = torch.cuda.Stream(compute.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        with _RECORDING, torch.cuda.stream(self._stream):
            self._pixels = torch.zeros(self.shape, dtype=torch.uint8, device=compute.device)
            for _ in range(WARM_UP):
                self._rows = compute(self._pixels)
            self._stream.synchronize()
            self._host_rows = torch.zeros(self._rows.shape, pin_memory=True)
            self._record()

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """See `BatchRunner`."""
        # Earlier faces remain in the rest of the batch, which does not matter: no vector depends on its neighbours.
        self._host_pixels.numpy()[: len(pixels)] = pixels
        with torch.cuda.stream(self._stream):
            self._pixels.copy_(self._host_pixels, non_blocking=True)
            if self._graph is not None:
                self._graph.replay()
            else:
                self._rows = self.compute(self._pixels)
            self._host_rows.copy_(self._rows, non_blocking=True)
        self._stream.synchronize()
        return self._host_rows.numpy()[: len(pixels)].copy()

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Calls of other threads meanwhile do not disturb the recording.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._rows = self.compute(self._pixels)
        except RuntimeError as exc:
            if is_out_of_memory(exc):
                raise
            log.warning("%s: no CUDA graph, the network is called directly: %s", self.compute.device, exc)
            self._stream = torch.cuda.Stream(self.compute.device)
            return
        self._graph = graph


class TorchDevice:
    """A device that any thread may compute on in torch. threads: CPUs for each, by default torch's own number."""

    def __init__(self, device: str, threads: int | None = None) -> None:
        survive_forks()
        if device != "cpu":
            require_own_process("CUDA")
            full_float32()
        self.device, self._threads, self._of_thread = device, threads, local()

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.device != "cpu"

    def within_memory(self, work: Callable[[], T]) -> T | None:
        """The result of `work`; None, with its memory freed, if a GPU's memory was too small."""
        try:
            return work()
        except RuntimeError as exc:
            if not is_out_of_memory(exc):
                raise
            log.info("%s: %s", self.device, exc)
        self._of_thread.runner = None
        torch.cuda.empty_cache()
        return None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Let this thread compute with `threads` CPUs, or on its own stream of a GPU."""
        if not self.on_gpu:
            self._limit_threads()
            yield
            return
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._of_thread.stream):
            yield

    def _limit_threads(self) -> None:
        """Set the number of CPUs, which torch stores for each calling thread."""
        if self._threads and not self.on_gpu:
            limit_torch(self._threads)


class TorchNetwork(TorchDevice):
    """The backbone in torch: (N, S, S, 3) uint8 RGB faces to (N, D) float32 unit rows, from any thread.

    All batches have one shape. On a GPU the batch size is found by trials, and halved if memory runs out.
    threads: CPUs for each calling thread, by default torch's own number.
    Raises `ArtifactError` for weights of another network, `UsageError` for a dtype that torch does not have.
    """

    runtime = "torch"

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
        super().__init__(device, threads)
        self.dtype, self.spec = choose_dtype(dtype, device), backbone.spec
        torch_dtype: torch.dtype = getattr(torch, self.dtype)
        backbone.check_tensors()
        network = torch_compact if backbone.is_compact else TorchInception
        self.compute = ForwardPass(
            network(backbone, device, torch_dtype),
            device,
            torch_dtype,
            flip,
            self.spec.size,
            input_of(backbone, device),
        )
        self._shrinking = Lock()
        if self.on_gpu:
            # Threads use their own streams, which do not wait for the copies of the weights.
            torch.cuda.synchronize(device)
        self.batch_size = batch_size or self._best_batch()

    @torch.inference_mode()
    def vectors(self, pixels: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8 RGB to (N, D) float32 unit rows. Raises `BatchverifyError` for overflows."""
        batches: list[np.ndarray] = []
        done = 0
        while done < len(pixels):
            size = self.batch_size
            rows = self.within_memory(partial(self._batch, size, pixels[done : done + size]))
            if rows is None:
                self._shrink(size)
                continue
            batches.append(rows)
            done += len(rows)
        return np.concatenate(batches) if batches else np.zeros((0, self.spec.dimension), np.float32)

    def runner(self, size: int) -> BatchRunner:
        """The runner for a batch size; on a GPU this thread's own."""
        if not self.on_gpu:
            return BatchRunner(self.compute, size)
        runner: BatchRunner | None = getattr(self._of_thread, "runner", None)
        if runner is None or runner.size != size:
            # First free the memory of the old one.
            self._of_thread.runner = runner = None
            self._of_thread.runner = runner = GpuBatchRunner(self.compute, size)
        return runner

    @torch.inference_mode()
    def _best_batch(self) -> int:
        if not self.on_gpu:
            return CPU_BATCH
        best = fastest_size(GPU_BATCHES, lambda size: faces_per_second(GpuBatchRunner(self.compute, size)))
        torch.cuda.empty_cache()
        return best

    def _shrink(self, size: int) -> None:
        """Halve the batch size unless another thread has done so; `BatchverifyError` for a batch of one face."""
        with self._shrinking:
            if self.batch_size < size:
                return
            if size == 1:
                raise BatchverifyError(f"{self.device}: no memory for a single face")
            self.batch_size = size // 2
        log.warning("%s: out of memory; going on with batches of %d faces", self.device, self.batch_size)

    def _batch(self, size: int, pixels: np.ndarray) -> np.ndarray:
        self._limit_threads()
        rows = self.runner(size)(pixels)
        if not np.isfinite(rows).all():
            raise BatchverifyError(f"the backbone gave vectors that are not finite ({self.dtype}, torch)")
        return rows


def choose_dtype(dtype: str, device: str) -> str:
    """The dtype for a device: the requested one, or with `auto` the fastest. Raises `UsageError` for others."""
    if dtype == "auto":
        if device.startswith("cuda"):
            # bfloat16 has float32's range: nothing overflows.
            return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
        return "bfloat16" if cpu_has_bf16() else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype must be auto, float32, bfloat16 or float16 with torch, got '{dtype}'")
    return dtype


def is_out_of_memory(exc: RuntimeError) -> bool:
    """Whether memory ran out: on a GPU, in one of its libraries, for pinned memory, or on a CPU."""
    return isinstance(exc, torch.cuda.OutOfMemoryError) or any(
        words in str(exc) for words in ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")
    )


def fastest_size(sizes: Sequence[int], rate: Callable[[int], float]) -> int:
    """The fastest of increasing batch sizes, found by trials. rate: faces per second of a size."""
    best_size, best_rate = sizes[0], 0.0
    for size in sizes:
        try:
            faces = rate(size)
        except RuntimeError as exc:
            if not is_out_of_memory(exc):
                raise
            faces = 0.0
        log.info("batches of %d faces: %.0f faces a second", size, faces)
        if faces <= best_rate * LEAST_GAIN:
            break
        best_size, best_rate = size, faces
    return best_size


def faces_per_second(runner: BatchRunner) -> float:
    """The measured speed of a runner with full batches."""
    pixels = np.zeros(runner.shape, np.uint8)
    runner(pixels)
    started = time.perf_counter()
    for _ in range(TIMED):
        runner(pixels)
    return TIMED * runner.size / (time.perf_counter() - started)
