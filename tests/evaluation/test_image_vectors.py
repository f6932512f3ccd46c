"""The vectors of a run's images: found by content in the cache that the run record names."""

from pathlib import Path

import numpy as np
import pytest
from cache_samples import FINGERPRINT, OTHER, failure, vector, write

from batchverify.cache.image_keys import content_key
from batchverify.cache.segment import Entry
from batchverify.evaluation.image_vectors import image_vectors
from batchverify.evaluation.report.thumbnails import ImageSource
from batchverify.fingerprint import EmbeddingFingerprint

CELLS = ["a.png", "b.png", "c.png"]


@pytest.fixture
def about(tmp_path):
    """A run record, the files of three images, and a cache with their vectors."""
    write(tmp_path / "cache", entries(tmp_path))
    return {
        "image_root": str(tmp_path),
        "cache": str(tmp_path / "cache"),
        "embedding": dict(FINGERPRINT.document),
    }


def entries(folder: Path, *, first: int = 0) -> list[Entry]:
    found = []
    for number, cell in enumerate(CELLS):
        (folder / cell).write_bytes(b"the bytes of " + cell.encode())
        found.append(Entry(content_key((folder / cell).read_bytes()), vector(first + number), (0, 0, 9, 9), 0.9, 1))
    return found


def found(about, cells=CELLS, **options):
    return image_vectors(cells, ImageSource.of(about, None, None), about["embedding"], **options)


def test_vectors_come_in_the_order_of_the_cells(about):
    vectors, without = found(about, ["c.png", "a.png"])
    assert without == "" and vectors.dtype == np.float32
    assert vectors == pytest.approx(np.stack([vector(2), vector(0)]).astype(np.float32), abs=1e-3)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1])


def test_vectors_of_several_backbones_stand_side_by_side(about, tmp_path):
    write(tmp_path / "cache", entries(tmp_path, first=10), OTHER)
    fused = EmbeddingFingerprint.fused([FINGERPRINT, OTHER])
    vectors, without = found(about | {"embedding": dict(fused.document)})
    assert without == "" and vectors.shape == (3, 1024)
    one, other = float(vector(0) @ vector(1)), float(vector(10) @ vector(11))
    assert float(vectors[0] @ vectors[1]) == pytest.approx((one + other) / 2, abs=1e-3)


def test_a_backbone_that_lacks_an_image_is_left_out(about, tmp_path):
    write(tmp_path / "cache", entries(tmp_path, first=10)[:2], OTHER)
    fused = EmbeddingFingerprint.fused([FINGERPRINT, OTHER])
    vectors, without = found(about | {"embedding": dict(fused.document)})
    assert without == "" and vectors.shape == (3, 512)
    assert vectors == pytest.approx(np.stack([vector(each) for each in range(3)]).astype(np.float32), abs=1e-3)


def test_what_is_missing_is_said(about, tmp_path):
    (tmp_path / "d.png").write_bytes(b"not in the cache")
    assert found(about, [*CELLS, "d.png"]) == (
        None,
        "the cache lacks the vectors of 1 of 4 images; --cache names another",
    )
    assert found(about, [*CELLS, "e.png"]) == (
        None,
        "1 of 4 images cannot be read; --image-root says where they are",
    )
    assert found(about | {"cache": None}) == (None, "the run record names no cache")
    assert found(about | {"embedding": {}}) == (None, "the run record names no cache")
    assert found(about, most=2) == (None, "3 images are more than 2")


def test_an_image_that_failed_has_no_vector(about, tmp_path):
    (tmp_path / "f.png").write_bytes(b"image 5")
    write(tmp_path / "cache", [failure(5)])
    vectors, without = found(about, ["a.png", "f.png"])
    assert vectors is None and "1 of 2 images" in without


def test_images_outside_the_given_root_are_not_read(about, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    source = ImageSource.of(about, str(inside), None)
    vectors, without = image_vectors(["../a.png"], source, about["embedding"])
    assert vectors is None and "1 of 1 images cannot be read" in without
