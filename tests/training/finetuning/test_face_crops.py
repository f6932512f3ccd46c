"""Faces on disk: those that the embedder finds, in the images' order, found once whatever happens."""

import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from repository import REPOSITORY

from batchverify.cache.image_keys import content_key
from batchverify.embedding.embedder import Embedder
from batchverify.errors import BatchverifyError
from batchverify.faces.crops import Face
from batchverify.faces.images import decode
from batchverify.records import Limits, Reason, Skipped
from batchverify.training.finetuning.face_crops import FaceCrops

SAMPLES = sorted((REPOSITORY / "sample_manifests" / "faces").glob("*.jpg"))


class Counting(Embedder):
    """Counts the images in which it searched for a face."""

    searched = 0

    def find_faces(self, images):
        """See `Embedder`."""
        self.searched += len(images)
        return super().find_faces(images)


@pytest.fixture(scope="module")
def built():
    return Counting("compact", device="cpu")


@pytest.fixture
def embedder(built):
    built.searched = 0
    return built


@pytest.fixture
def images(tmp_path) -> list:
    """Five faces, one of them twice, and images without any."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in SAMPLES[:5]:
        shutil.copy(path, folder)
    shutil.copy(SAMPLES[1], folder / "same.jpg")
    (folder / "text.jpg").write_text("no picture")
    Image.new("RGB", (90, 90), (90, 120, 150)).save(folder / "blank.png")
    names = [*(path.name for path in SAMPLES[:3]), "same.jpg", "text.jpg", "gone.jpg", "blank.png"]
    names += [path.name for path in SAMPLES[3:5]]
    refused = Skipped(Reason.FORBIDDEN, "outside")
    return [*(str(folder / name) for name in names), refused]


REASONS = {
    4: Reason.UNDECODABLE,
    5: Reason.NOT_FOUND,
    6: Reason.NO_FACE,
    9: Reason.FORBIDDEN,
}


def collect(images, embedder, folder, *, block=4, **options):
    return FaceCrops.collect(images, embedder, Limits(), None, folder, block=block, **options)


def face_of(embedder, path: str) -> np.ndarray:
    with open(path, "rb") as file:
        decoded = decode(file.read(), Limits(), embedder.settings.working_side)
    (face,) = Embedder.find_faces(embedder, [decoded.pixels])
    assert isinstance(face, Face)
    return face.pixels


def test_a_link_that_leads_out_of_the_image_root_is_not_followed(embedder, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(SAMPLES[0], root / "in.jpg")
    shutil.copy(SAMPLES[1], tmp_path / "out.jpg")
    (root / "link.jpg").symlink_to(tmp_path / "out.jpg")
    paths = [str(root / "in.jpg"), str(root / "link.jpg")]
    crops = FaceCrops.collect(paths, embedder, Limits(), str(root), tmp_path / "crops")
    assert [crops.failed.get(row) and crops.failed[row].reason for row in range(2)] == [
        None,
        Reason.FORBIDDEN,
    ]
    assert not crops.pixels[1].any()


def test_each_image_has_its_face_or_a_reason(images, embedder, tmp_path):
    told = []
    crops = collect(images, embedder, tmp_path / "crops", progress=lambda *counts: told.append(counts))
    assert told == [(0, 10), (4, 10), (8, 10), (10, 10)]
    assert len(crops) == 10 and crops.pixels.shape == (10, 128, 128, 3)
    assert {row: skipped.reason for row, skipped in crops.failed.items()} == REASONS
    assert crops.failed[9] == images[9] and "no such file" in crops.failed[5].message
    for row, path in enumerate(images):
        if row in crops.failed:
            assert not crops.pixels[row].any()
            continue
        assert np.array_equal(crops.pixels[row], face_of(embedder, path)), path
    assert np.array_equal(crops.pixels[3], crops.pixels[1]) and crops.keys[3] == crops.keys[1]
    for row in (0, 4, 6):
        with open(images[row], "rb") as file:
            assert crops.keys[row] == content_key(file.read())
    assert crops.keys[5] == crops.keys[9] == b""


def test_what_is_there_is_not_searched_for_again(images, embedder, tmp_path):
    first = collect(images, embedder, tmp_path / "crops")
    searched, told = embedder.searched, []
    # Whatever became of the images.
    shutil.rmtree(tmp_path / "images")
    again = collect(images, embedder, tmp_path / "crops", progress=lambda *counts: told.append(counts))
    assert embedder.searched == searched and told == [(10, 10)]
    assert np.array_equal(again.pixels, first.pixels)
    assert (again.keys, again.failed, again.origin) == (first.keys, first.failed, first.origin)


def test_damaged_faces_are_cut_out_again(images, embedder, tmp_path):
    first = np.array(collect(images, embedder, tmp_path / "crops").pixels)
    embedder.searched = 0
    with (tmp_path / "crops" / "values").open("r+b") as file:
        file.seek(8 * 128 * 128 * 3 + 5)
        file.write(b"\xff\x00\xff")
    assert np.array_equal(collect(images, embedder, tmp_path / "crops").pixels, first)
    assert embedder.searched == 1


def test_other_images_settings_and_limits_begin_anew(images, embedder, tmp_path):
    first = collect(images, embedder, tmp_path / "crops")
    origins = {first.origin}
    others = [
        ([*images[:-1], images[0]], embedder, Limits()),
        (images[::-1], embedder, Limits()),
        (images, embedder, Limits(pixels=99)),
        (images, Embedder("compact", device="cpu", crop="center"), Limits()),
    ]
    for paths, other, limits in others:
        crops = FaceCrops.collect(paths, other, limits, None, tmp_path / "crops")
        origins.add(crops.origin)
    assert len(origins) == 5
    embedder.searched = 0
    collect(images, embedder, tmp_path / "crops")
    assert embedder.searched > 0


def test_an_image_with_other_bytes_has_other_crops(images, embedder, tmp_path):
    first = collect(images, embedder, tmp_path / "crops")
    shutil.copy(SAMPLES[7], images[0])
    assert collect(images, embedder, tmp_path / "crops").origin == first.origin
    assert collect(images, embedder, tmp_path / "others").origin != first.origin


def test_large_images_are_loaded_in_several_chunks(images, embedder, tmp_path):
    expected = collect(images, embedder, tmp_path / "crops")
    many = images * 6
    found = collect(many, embedder, tmp_path / "many", block=64, pixel_budget=1)
    assert np.array_equal(found.pixels, np.tile(expected.pixels, (6, 1, 1, 1)))
    assert found.keys == expected.keys * 6 and len(found.failed) == 6 * len(REASONS)


def test_fixed_crops_need_no_detector(images, tmp_path):
    embedder = Counting("compact", device="cpu", crop="none")
    crops = collect(images, embedder, tmp_path / "crops")
    assert embedder.searched == 0 and sorted(crops.failed) == [4, 5, 9]
    expected = np.asarray(Image.open(SAMPLES[0]).resize((128, 128), Image.Resampling.BILINEAR))
    assert np.abs(crops.pixels[0].astype(int) - expected).mean() < 1
    assert (crops.pixels[6] == (90, 120, 150)).all()


def test_no_image_at_all(embedder, tmp_path):
    crops = collect([], embedder, tmp_path / "crops")
    assert len(crops) == 0 and crops.pixels.shape == (0, 128, 128, 3)


def test_copies_by_pickle_read_the_same_file(images, embedder, tmp_path):
    crops = collect(images, embedder, tmp_path / "crops")
    crops.pixels.sum()
    data = pickle.dumps(crops)
    assert len(data) < 6000
    assert np.array_equal(pickle.loads(data).pixels, crops.pixels)


def test_a_folder_that_cannot_be_written_is_named(images, embedder, tmp_path):
    (tmp_path / "crops").write_text("")
    with pytest.raises(BatchverifyError, match="crops: cannot be written or read"):
        collect(images, embedder, tmp_path / "crops")


COLLECT = """
import sys, time
from pathlib import Path
from batchverify.embedding.embedder import Embedder
from batchverify.records import Limits
from batchverify.training.finetuning.face_crops import FaceCrops
embedder = Embedder("compact", device="cpu", threads=1)

def show(*counts):
    print(*counts, flush=True)

FaceCrops.collect(sys.argv[2:], embedder, Limits(), None, Path(sys.argv[1]), show, block=2)
"""


def test_a_killed_run_is_taken_up_where_it_was(embedder, tmp_path):
    paths = [str(path) for path in SAMPLES]
    command = [sys.executable, "-c", COLLECT, str(tmp_path / "crops"), *paths]
    done = 0
    for blocks in (2, 3):
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        counts = [int(run.stdout.readline().split()[0]) for _ in range(1 + blocks)]
        os.kill(run.pid, signal.SIGKILL)
        run.communicate()
        # At most the block that was being written is lost, and one more may be there than was told of.
        assert done <= counts[0] <= done + 2 and counts[-1] == counts[0] + 2 * blocks
        done = counts[-1]
    expected = collect(paths, embedder, tmp_path / "undisturbed")
    embedder.searched = 0
    found = collect(paths, embedder, tmp_path / "crops", block=2)
    assert 0 < embedder.searched <= len(paths) - done
    assert np.array_equal(found.pixels, expected.pixels)
    assert (found.keys, found.failed, found.origin) == (expected.keys, expected.failed, expected.origin)
