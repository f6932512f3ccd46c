"""Activations on disk: those of the frozen part, for faces and views, computed once whatever happens."""

import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from repository import REPOSITORY

from batchverify.embedding.backbone import load_backbone
from batchverify.embedding.embedder import Embedder
from batchverify.errors import BatchverifyError
from batchverify.faces.crops import augmented
from batchverify.records import Limits
from batchverify.training.finetuning.activations import Activations, faces_in_views
from batchverify.training.finetuning.face_crops import FaceCrops
from batchverify.training.finetuning.trainable import FrozenPart, TrainedPart

PATHS = [str(path) for path in sorted((REPOSITORY / "sample_manifests" / "faces").glob("*.jpg"))[:5]]
PATHS.insert(2, "/nowhere.jpg")


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("compact")


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Whole pictures as faces; the third is missing."""
    embedder = Embedder("compact", device="cpu", crop="none")
    return FaceCrops.collect(PATHS, embedder, Limits(), None, tmp_path_factory.mktemp("crops"))


@pytest.fixture
def frozen(backbone):
    return TrainedPart(backbone, "head").frozen


class Counted(FrozenPart):
    """A frozen part that counts its faces, and fails for more than `most` at once."""

    def __init__(self, part: FrozenPart, most: int = 10**9, failure: str = "DefaultCPUAllocator") -> None:
        self.__dict__.update(part.__dict__)
        self.most, self.failure, self.faces = most, failure, 0

    def __call__(self, pixels):
        """See `FrozenPart`."""
        if len(pixels) > self.most:
            raise RuntimeError(self.failure)
        # The first face only tells the shape.
        self.faces += len(pixels) if pixels.any() else 0
        return super().__call__(pixels)


def test_they_are_those_of_faces_and_views(crops, frozen, tmp_path):
    told = []
    found = Activations.computed(crops, frozen, 2, tmp_path, batch=4, progress=lambda *counts: told.append(counts))
    assert (len(found), found.views) == (6, 2)
    assert told == [(0, 18), (4, 18), (8, 18), (12, 18), (16, 18), (18, 18)]
    images, views = np.array([4, 0, 1, 4]), np.array([0, 1, 2, 2])
    rows = found.batch(images, views)
    assert rows.dtype == torch.float32 and rows.shape == (4, 128, 8, 8)
    for row, image, view in zip(rows, images, views, strict=True):
        pixels = crops.pixels[image]
        if view:
            pixels = augmented(pixels, crops.keys[image], int(view), blur=True)
        expected = frozen(torch.from_numpy(np.array(pixels[None])))[0]
        assert torch.allclose(row, expected, rtol=2e-3, atol=2e-3)
    assert not torch.equal(rows[0], rows[3])
    assert (tmp_path / "values").stat().st_size == 18 * 128 * 8 * 8 * 2


def test_what_learns_takes_them(backbone, crops, tmp_path):
    part = TrainedPart(backbone, "embedding").eval()
    found = Activations.computed(crops, part.frozen, 0, tmp_path)
    images = np.array([0, 1, 3, 4, 5])
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(part(found.batch(images, np.zeros(5, int)))).numpy()
    embedder = Embedder(backbone, device="cpu", crop="none", dtype="float32")
    assert (vectors * embedder.vectors(crops.pixels[images])).sum(1).min() > 0.9999


def test_what_is_there_is_not_computed_again(crops, frozen, tmp_path):
    first = Activations.computed(crops, frozen, 1, tmp_path, batch=4)
    every = np.arange(12)
    expected = first.batch(every % 6, every // 6)
    counted, told = Counted(frozen), []
    again = Activations.computed(crops, counted, 1, tmp_path, batch=4, progress=lambda *counts: told.append(counts))
    assert counted.faces == 0 and told == [(12, 12)]
    assert torch.equal(again.batch(every % 6, every // 6), expected)
    with (tmp_path / "values").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3c")
    again = Activations.computed(crops, counted, 1, tmp_path, batch=4)
    assert counted.faces == 4
    assert torch.equal(again.batch(every % 6, every // 6), expected)


def test_other_networks_blocks_views_and_faces_begin_anew(backbone, crops, frozen, tmp_path):
    other = FaceCrops.collect(
        PATHS[::-1], Embedder("compact", device="cpu", crop="none"), Limits(), None, tmp_path / "crops"
    )
    changed = replace(backbone, fingerprint="f" * 64)
    for case in (
        (crops, TrainedPart(changed, "head").frozen, 1),
        (crops, TrainedPart(backbone, "stage2").frozen, 1),
        (other, frozen, 1),
        (crops, frozen, 2),
    ):
        Activations.computed(crops, frozen, 1, tmp_path / "a")
        counted = Counted(case[1])
        Activations.computed(case[0], counted, case[2], tmp_path / "a")
        assert counted.faces == 6 * (1 + case[2])


def test_of_a_network_that_learns_as_a_whole_nothing_is_stored(backbone, crops, tmp_path):
    frozen = TrainedPart(backbone, "all").frozen
    found = Activations.computed(crops, frozen, 0, tmp_path / "a")
    assert not (tmp_path / "a").exists() and len(found) == 6
    images, views = np.array([3, 3, 0]), np.array([0, 7, 3_000_000])
    pixels = faces_in_views(crops, images, views)
    assert np.array_equal(pixels[0], crops.pixels[3])
    assert np.array_equal(pixels[1], augmented(crops.pixels[3], crops.keys[3], 7, blur=True))
    assert torch.equal(found.batch(images, views), frozen(torch.from_numpy(pixels)))
    # Views of a failed image are black as it is.
    assert not faces_in_views(crops, np.array([2]), np.array([1])).any()


@pytest.mark.parametrize("block", ["head", "all"])
def test_images_and_views_that_there_are_not(backbone, crops, tmp_path, block):
    found = Activations.computed(crops, TrainedPart(backbone, block).frozen, 1, tmp_path)
    for image, view in ((6, 0), (-1, 0), (0, -1)):
        with pytest.raises(IndexError, match="images 0 to 5 in views from 0"):
            found.batch(np.array([image]), np.array([view]))
    if block == "head":
        with pytest.raises(IndexError, match="views 0 to 1, not 2"):
            found.batch(np.array([0]), np.array([2]))


@pytest.mark.parametrize("block", ["head", "all"])
def test_copies_by_pickle_read_the_same_files(backbone, crops, tmp_path, block):
    found = Activations.computed(crops, TrainedPart(backbone, block).frozen, 1, tmp_path)
    images, views = np.array([1, 2]), np.array([0, 1])
    expected = found.batch(images, views)
    assert torch.equal(pickle.loads(pickle.dumps(found)).batch(images, views), expected)


def test_batches_are_halved_where_memory_is_short(crops, frozen, tmp_path):
    expected = Activations.computed(crops, frozen, 0, tmp_path / "a")
    found = Activations.computed(crops, Counted(frozen, most=2), 0, tmp_path / "b")
    images, views = np.arange(6), np.zeros(6, int)
    assert torch.allclose(found.batch(images, views), expected.batch(images, views), atol=1e-2)
    with pytest.raises(BatchverifyError, match="cpu: no memory for the frozen part of the network"):
        Activations.computed(crops, Counted(frozen, most=0), 0, tmp_path / "c")
    with pytest.raises(RuntimeError, match="something else"):
        Activations.computed(crops, Counted(frozen, 2, "something else"), 0, tmp_path / "c")


def test_values_that_float16_cannot_hold_are_reported(backbone, crops, tmp_path):
    tensors = {**backbone.tensors, "head.weight": backbone.tensors["head.weight"] * 1e6}
    frozen = TrainedPart(replace(backbone, tensors=tensors), "head_depthwise").frozen
    with pytest.raises(BatchverifyError, match=r"--unfreeze head_depthwise: the frozen blocks give values up to \d"):
        Activations.computed(crops, frozen, 0, tmp_path)


COMPUTE = """
import sys, torch
from pathlib import Path
from batchverify.embedding.backbone import load_backbone
from batchverify.embedding.embedder import Embedder
from batchverify.records import Limits
from batchverify.training.finetuning.activations import Activations
from batchverify.training.finetuning.face_crops import FaceCrops
from batchverify.training.finetuning.trainable import FrozenPart, TrainedPart
torch.set_num_threads(1)
folder, paths = Path(sys.argv[1]), sys.argv[2:]
crops = FaceCrops.collect(paths, Embedder("compact", device="cpu", crop="none"), Limits(), None, folder / "crops")
frozen = TrainedPart(load_backbone("compact"), "head").frozen
Activations.computed(crops, frozen, 3, folder / "a", batch=2, progress=lambda *counts: print(*counts, flush=True))
"""


def test_a_killed_run_is_taken_up_and_ends_with_the_same_bits(crops, frozen, tmp_path):
    command = [sys.executable, "-c", COMPUTE, str(tmp_path), *PATHS]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    counts = [int(run.stdout.readline().split()[0]) for _ in range(5)]
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert counts == [0, 2, 4, 6, 8]
    embedder = Embedder("compact", device="cpu", crop="none")
    again = FaceCrops.collect(PATHS, embedder, Limits(), None, tmp_path / "crops")
    counted = Counted(frozen)
    found = Activations.computed(again, counted, 3, tmp_path / "a", batch=2)
    assert 0 < counted.faces <= 24 - 8
    expected = Activations.computed(crops, frozen, 3, tmp_path / "undisturbed", batch=2)
    assert (tmp_path / "a" / "values").read_bytes() == (tmp_path / "undisturbed" / "values").read_bytes()
    assert len(found) == len(expected)
