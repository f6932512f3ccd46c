"""Forked processes: they go on in torch, and where a library cannot they fail at once with a sentence."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from head_samples import make_head, pairs
from repository import REPOSITORY

import batchverify
from batchverify.errors import UsageError
from batchverify.runtime.compiled_network import unavailable

FACES = REPOSITORY / "sample_manifests" / "faces"
# A fork that hangs, hangs for ever.
SECONDS = 60


def in_fork(call: Callable[[], Any]) -> Any:
    """What a call returns, or the error that it raises, in a process that is forked now."""
    with multiprocessing.get_context("fork").Pool(1, initializer=_keep, initargs=(call,)) as pool:
        return pool.apply_async(_called).get(SECONDS)


def _keep(call: Callable[[], Any]) -> None:
    _kept.append(call)


def _called() -> Any:
    try:
        return _kept[-1]()
    except UsageError as exc:
        return str(exc)


_kept: list[Callable[[], Any]] = []


def predict(runtime: str) -> float | None:
    """The probability of a pair, embedded in this process."""
    images = FACES / "ada_1.jpg", FACES / "ada_2.jpg"
    return batchverify.predict(*images, no_cache=True, runtime=runtime, device="cpu").probability


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def embed() -> np.ndarray:
    """The vectors of two faces, in torch with as many threads as this one has."""
    embedder = batchverify.Embedder(crop="none", runtime="torch", device="cpu", dtype="float32", batch_size=2)
    vectors: np.ndarray = embedder.vectors(np.zeros((2, 160, 160, 3), np.uint8))
    return vectors


@pytest.mark.usefixtures("two_threads")
def test_a_fork_embeds_in_torch_as_its_parent_did():
    np.testing.assert_allclose(embed(), in_fork(embed), atol=1e-4)


@pytest.mark.usefixtures("two_threads")
def test_a_fork_scores_in_torch_as_its_parent_did():
    head, (left, right) = make_head("network"), pairs(3000)
    scores = np.stack(head(left, right))
    assert np.array_equal(in_fork(lambda: np.stack(head(left, right))), scores)


@pytest.mark.skipif(bool(unavailable()), reason="OpenVINO cannot be used here")
def test_a_fork_that_cannot_compute_says_so_at_once():
    probability = predict("openvino")
    assert isinstance(probability, float)
    said = in_fork(lambda: predict("openvino"))
    assert "forked from one that had computed with OpenVINO" in said and "spawn" in said
    # What has not been computed with, works.
    assert in_fork(lambda: predict("torch")) == pytest.approx(predict("torch"), rel=1e-3)
    assert predict("openvino") == probability


@pytest.mark.skipif(bool(unavailable()), reason="OpenVINO cannot be used here")
def test_an_embedder_that_a_fork_has_inherited_says_so_too():
    embedder = batchverify.Embedder(crop="none", runtime="openvino", device="cpu", threads=1)
    faces = np.zeros((2, 160, 160, 3), np.uint8)
    embedder.vectors(faces)
    assert "spawn" in in_fork(lambda: embedder.vectors(faces))
