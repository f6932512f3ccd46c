"""The fused network against the plain one that it is made of."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from batchverify import fused as module
from batchverify.backbones import build_network, fold_batch_norm, load_backbone
from batchverify.fused import fuse, kind_of_network
from batchverify.tiles import multiplies_bfloat16

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


def loops(network: torch.nn.Module) -> dict[str, str]:
    """The parts of a network that are compiled loops, and of which kind."""
    works = ((name, getattr(part, "work", None)) for name, part in network.named_modules())
    return {name: type(work).__name__ for name, work in works if work is not None}


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


class Refusing(ThreadPoolExecutor):
    """No more threads, after the work was taken in: what Python does at a limit of processes."""

    def submit(self, *args: object) -> None:
        super().submit(*args)
        raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("refuses", [False, True])
def test_each_part_is_done_once(refuses, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(module, "_helpers", lambda: pool)
    try:
        torch.set_num_threads(3)
        with (Refusing if refuses else ThreadPoolExecutor)(2) as pool:
            total = np.zeros((7, 2))
            for _ in range(200):
                module._shared(lambda part: [np.add(part, 1, out=part)], [total])
            assert (total == 200).all()
            with pytest.raises(ZeroDivisionError):
                module._shared(lambda part: [1 / 0], [total])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_threads_share_the_images(faces, dtype):
    network, before = fused(dtype), torch.get_num_threads()
    values, found = torch.cat([faces, -faces, faces[:1]]).to(dtype), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append((network.conv2d_2b(network.conv2d_2a(network.conv2d_1a(values))), network(values)))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found)


def test_what_has_a_faster_form_takes_it():
    network = fused(torch.float32)
    names = {name for name, kind in loops(network).items() if kind == "WinogradConvolution"}
    alone = {"conv2d_2a", "conv2d_2b", "conv2d_4a", "conv2d_4b", "mixed_6a.branch0", "mixed_6a.branch1.1"}
    assert alone <= names and {"mixed_6a.branch1.2", "mixed_7a.branch2.1"} <= names
    assert len(names) == 8 + 5 * 3 and "conv2d_1a" not in names and "mixed_7a.branch0.1" not in names
    assert type(network.maxpool_3a).__name__ == "_Compiled"


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this CPU multiplies no bfloat16 in vectors")
def test_bfloat16_has_faster_forms_of_its_own():
    network = fused(torch.bfloat16)
    kinds = {name: type(part).__name__ for name, part in network.named_modules()}
    assert {kinds[f"repeat_{which}.0"] for which in (1, 2, 3)} == {kinds["block8"]} == {"_Joined"}
    lines = {name for name, kind in loops(network).items() if kind == "LineConvolution"}
    assert lines == {f"repeat_2.{block}.tails.1.{part}" for block in range(10) for part in (0, 1)}
    assert kinds["mixed_6a.branch1.0"] == kinds["mixed_7a.branch0.0"] == "_Compiled"
    # 80 outputs are no multiple of a panel; in images of 3 x 3 lines are too short.
    assert kinds["conv2d_3b"] == kinds["repeat_3.0.tails.1.0"] == "_Convolution"


def test_what_is_computed_how():
    assert kind_of_network("cpu", torch.float32) == "winograd"
    assert kind_of_network("cpu", torch.bfloat16) == ("winograd" if multiplies_bfloat16() else "fused")
    assert kind_of_network("cpu", torch.float16) == kind_of_network("cuda", torch.float32) == "eager"
