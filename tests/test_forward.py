"""Batch sizes by trying; on a machine with a GPU its path against the CPU's."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from batchverify.backbones import load_backbone
from batchverify.detection import FaceDetector
from batchverify.embedder import Embedder
from batchverify.forward import Forward, Pass, faces_per_second, fastest_size, is_out_of_memory

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
    def rate(size: int) -> float:
        raise RuntimeError("no kernel image is available")

    with pytest.raises(RuntimeError, match="no kernel image"):
        fastest_size([8], rate)
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("device-side assert"))


def test_a_rate_is_one():
    compute = Pass(torch.nn.Flatten(), "cpu", torch.float32)
    assert faces_per_second(Forward(compute, 2)) > 0


@GPU
def test_vectors_of_a_gpu_are_those_of_the_cpu_and_of_any_thread():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 160, 160, 3), dtype=np.uint8)
    backbone = load_backbone()
    exact = Embedder(backbone, crop="none", device="cpu", numbers="float32").vectors(pixels)
    for batch, numbers, least in ((64, "float32", 0.999999), (None, "auto", 0.999)):
        there = Embedder(backbone, crop="none", device="cuda", batch_size=batch, numbers=numbers)
        found = there.vectors(pixels)
        assert (found * exact).sum(axis=1).min() > least
        with ThreadPoolExecutor(4) as pool:
            for each in pool.map(there.vectors, [pixels] * 8):
                assert np.array_equal(each, found)
        assert there._forward(there.batch_size).recorded


@GPU
def test_boxes_of_a_gpu_are_those_of_the_cpu():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (200 + 9 * at % 40, 180, 3), dtype=np.uint8) for at in range(20)]
    for ours, theirs in zip(FaceDetector(device="cuda")(pictures), FaceDetector()(pictures), strict=True):
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.01)


@GPU
def test_a_gpu_short_of_memory_goes_on_with_smaller_batches():
    total = torch.cuda.mem_get_info()[1]
    pixels = np.random.default_rng(0).integers(0, 256, (600, 160, 160, 3), dtype=np.uint8)
    embedder = Embedder(crop="none", device="cuda", batch_size=4096, numbers="float32")
    torch.cuda.set_per_process_memory_fraction(min(1.0, 3e9 / total))
    try:
        assert np.isfinite(embedder.vectors(pixels)).all()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert embedder.batch_size < 4096
