"""The fused network against the plain one that it is made of."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from batchverify.backbones import build_network, fold_batch_norm, load_backbone
from batchverify.fused import can_fuse, fuse

BATCH = 4


@pytest.fixture(scope="module")
def faces() -> torch.Tensor:
    pixels = torch.randn(BATCH, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    return pixels.contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def wanted(faces) -> torch.Tensor:
    with torch.inference_mode():
        return build_network(load_backbone("vggface2"))(faces)


def fused(dtype: torch.dtype) -> torch.nn.Module:
    network = fuse(fold_batch_norm(build_network(load_backbone("vggface2"))), dtype)
    return network.to(dtype).to(memory_format=torch.channels_last)


@torch.inference_mode()
def test_float32_is_the_plain_network(faces, wanted):
    before = faces.clone()
    torch.testing.assert_close(fused(torch.float32)(faces), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(faces, before)


@torch.inference_mode()
def test_bfloat16_is_near_it(faces, wanted):
    vectors = fused(torch.bfloat16)(faces.bfloat16()).float()
    assert torch.nn.functional.cosine_similarity(vectors, wanted).min() > 0.999


def test_threads_may_pack_at_once(faces):
    network = fused(torch.float32)

    @torch.inference_mode()
    def run(_: int) -> torch.Tensor:
        return network(faces)

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(run, range(4))
    assert all(torch.equal(first, each) for each in others)


def test_what_cannot_be_fused():
    assert can_fuse("cpu", torch.float32)
    assert not can_fuse("cpu", torch.float16)
    assert not can_fuse("cuda", torch.float32)
