"""Batch sizes by trying; on a machine with a GPU its path against the CPU's."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from batchverify.embedding.backbone import load_backbone
from batchverify.embedding.embedder import Embedder
from batchverify.embedding.forward import (
    GPU_BATCHES,
    BatchRunner,
    ForwardPass,
    TorchNetwork,
    faces_per_second,
    fastest_size,
    is_out_of_memory,
)
from batchverify.engine.base import GPU_CHUNK
from batchverify.errors import BatchverifyError, UsageError
from batchverify.faces.detection import FaceDetector
from batchverify.runtime.devices import cpu_has_bf16

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({8: 100.0, 16: 200.0, 32: 400.0}, 32),
        # Not worth its memory; slower; no room.
        ({8: 100.0, 16: 200.0, 32: 201.0}, 16),
        ({8: 100.0, 16: 90.0, 32: 400.0}, 8),
        ({8: 100.0, 16: 200.0, 32: None}, 16),
        ({8: None, 16: None, 32: None}, 8),
    ],
)
def test_the_batch_with_most_faces_a_second_is_taken(rates, expected):
    def rate(size: int) -> float:
        if rates[size] is None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return rates[size]

    assert fastest_size(list(rates), rate) == expected


def test_other_errors_of_trying_are_not_taken_for_a_lack_of_memory():
    def rate(_: int) -> float:
        raise RuntimeError("no kernel image is available")

    with pytest.raises(RuntimeError, match="no kernel image"):
        fastest_size([8], rate)
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("device-side assert"))


def test_a_rate_is_one():
    compute = ForwardPass(torch.nn.Flatten(), "cpu", torch.float32)
    assert faces_per_second(BatchRunner(compute, 2)) > 0


@pytest.fixture(scope="module")
def backbone():
    return load_backbone()


class Crowded(torch.nn.Module):
    """A network whose memory is full beyond so many faces."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        if len(faces) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return faces.flatten(1)[:, :512]


def test_batches_are_halved_where_memory_is_short(backbone, caplog):
    network = TorchNetwork(backbone, "cpu", batch_size=32, dtype="float32")
    pixels = np.random.default_rng(1).integers(0, 256, (50, 160, 160, 3), dtype=np.uint8)
    network.compute = replace(network.compute, network=Crowded(9))
    vectors = network.vectors(pixels)
    assert network.batch_size == 8
    assert [each.message for each in caplog.records if "batches of 8" in each.message]
    network.compute = replace(network.compute, network=Crowded(50))
    assert np.array_equal(network.vectors(pixels), vectors)
    network.compute = replace(network.compute, network=Crowded(0))
    with pytest.raises(BatchverifyError, match="no memory for a single face"):
        network.vectors(pixels)


def test_threads_that_run_out_of_memory_at_once_halve_the_batch_once(backbone):
    network = TorchNetwork(backbone, "cpu", batch_size=32, dtype="float32")
    barrier = threading.Barrier(4)
    pixels = np.random.default_rng(1).integers(0, 256, (70, 160, 160, 3), dtype=np.uint8)

    class Together(Crowded):
        def forward(self, faces: torch.Tensor) -> torch.Tensor:
            if len(faces) > self.most:
                barrier.wait(10)
            return super().forward(faces)

    network.compute = replace(network.compute, network=Together(16))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(network.vectors, [pixels] * 4))
    assert network.batch_size == 16
    assert all(np.array_equal(each, found[0]) for each in found)


def test_a_library_without_memory_is_known_by_its_words(backbone):
    class Library(Crowded):
        def forward(self, faces: torch.Tensor) -> torch.Tensor:
            if len(faces) > self.most:
                raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
            if len(faces) == 1:
                raise RuntimeError("something else")
            return super().forward(faces)

    network = TorchNetwork(backbone, "cpu", batch_size=4, dtype="float32")
    network.compute = replace(network.compute, network=Library(1))
    with pytest.raises(RuntimeError, match="something else"):
        network.vectors(np.zeros((3, 160, 160, 3), np.uint8))
    assert network.batch_size == 1


def test_the_largest_batch_tried_is_a_chunk():
    assert GPU_BATCHES[-1] == GPU_CHUNK


def test_torch_computes_in_what_it_knows(backbone):
    with pytest.raises(UsageError, match="--dtype must be auto, float32, bfloat16 or float16 with torch, got 'int8'"):
        TorchNetwork(backbone, "cpu", dtype="int8")
    fastest = "bfloat16" if cpu_has_bf16() else "float32"
    assert TorchNetwork(backbone, "cpu").dtype == fastest


@GPU
def test_vectors_of_a_gpu_are_those_of_the_cpu_and_of_any_thread():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 160, 160, 3), dtype=np.uint8)
    backbone = load_backbone()
    exact = Embedder(backbone, crop="none", device="cpu", runtime="torch", dtype="float32").vectors(pixels)
    for batch, dtype, least in ((64, "float32", 0.999999), (None, "auto", 0.999)):
        there = Embedder(backbone, crop="none", device="cuda", batch_size=batch, dtype=dtype)
        found = there.vectors(pixels)
        assert (found * exact).sum(axis=1).min() > least
        with ThreadPoolExecutor(4) as pool:
            for each in pool.map(there.vectors, [pixels] * 8):
                assert np.array_equal(each, found)
        assert there._network.runner(there.batch_size)._graph is not None


@GPU
def test_boxes_of_a_gpu_are_those_of_the_cpu():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (200 + 9 * at % 40, 180, 3), dtype=np.uint8) for at in range(20)]
    there, here = FaceDetector.on("cuda", "torch"), FaceDetector.on("cpu", "torch")
    for ours, theirs in zip(there(pictures), here(pictures), strict=True):
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.01)


@GPU
def test_a_gpu_short_of_memory_goes_on_with_smaller_batches():
    total = torch.cuda.mem_get_info()[1]
    pixels = np.random.default_rng(0).integers(0, 256, (600, 160, 160, 3), dtype=np.uint8)
    embedder = Embedder(crop="none", device="cuda", batch_size=4096, dtype="float32")
    torch.cuda.set_per_process_memory_fraction(min(1.0, 3e9 / total))
    try:
        assert np.isfinite(embedder.vectors(pixels)).all()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert embedder.batch_size < 4096
