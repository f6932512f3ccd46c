"""The backbone's forward pass in batches of one fixed shape; on a GPU as a CUDA graph, from pinned memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch

from batchverify.backbones import DIMENSION
from batchverify.crops import FACE_SIZE

log = logging.getLogger(__name__)

# Passes before a graph is recorded: libraries choose their ways and allocate in the first.
WARM_UP = 3
TIMED = 5
# A larger batch must be worth its memory and its padding.
WORTH = 1.03
# One thread records at a time: recording begins and ends with calls that concern the whole device.
_RECORDING = Lock()


@dataclass(frozen=True)
class Pass:
    """What is computed. network: on `device`, in `dtype`; flip: the mean of the vectors of both mirror images."""

    network: torch.nn.Module
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
        return torch.nn.functional.normalize(vectors)


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
