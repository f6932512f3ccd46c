"""Thumbnails: the box of the cache on the right image, the whole one without, and why there is none."""

import base64
import hashlib
import io

import numpy as np
import pytest
from object_store import impatience, object_store
from PIL import Image

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.segment import Entry
from batchverify.evaluation.report.thumbnails import BITE, SIDE, ImageSource, thumbnails
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.manifest.paths import ImageRoot
from batchverify.records import Limits, Reason, Skipped
from batchverify.storage.location import Location

UNIT = np.full(512, 512**-0.5, np.float16)
RED, BLUE = (220, 30, 30), (30, 30, 220)


def draw(path, size=(600, 400), box=(300, 100, 500, 300)) -> bytes:
    """A blue image with a red square; its bytes."""
    pixels = np.full((size[1], size[0], 3), BLUE, np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = RED
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def pixels_of(thumbnail) -> np.ndarray:
    head, _, body = thumbnail.uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


def record(tmp_path, **settings):
    embedding = EmbeddingFingerprint.of("a" * 64, EmbeddingSettings(**settings))
    about = {"manifest": [str(tmp_path / "pairs.csv")], "cache": str(tmp_path / "cache")}
    return about | {"embedding": embedding.document, "options": {}}, embedding


def test_a_face_is_cut_by_the_box_of_its_bytes(tmp_path):
    about, embedding = record(tmp_path, margin=0)
    data = draw(tmp_path / "a.png")
    (tmp_path / "copy.png").write_bytes(data)
    draw(tmp_path / "other.png", size=(300, 300), box=(0, 0, 10, 10))
    cache = EmbeddingCache(about["cache"], embedding)
    cache.create()
    key = hashlib.sha256(data).digest()
    cache.append([Entry(key, UNIT, (300, 100, 500, 300), 0.99, 1)])
    cache.commit()
    found = thumbnails(["a.png", "copy.png", "other.png"], ImageSource.of(about, None, None))
    for name in ("a.png", "copy.png"):
        assert found[name].note == "face"
        assert np.abs(pixels_of(found[name]).astype(int) - RED).max() < 12
    assert found["other.png"].note == "whole image"
    assert pixels_of(found["other.png"]).shape == (SIDE, SIDE, 3)


def test_of_an_aligned_face_the_box_is_shown(tmp_path):
    about, embedding = record(tmp_path, crop="align", detector="retinaface")
    data = draw(tmp_path / "a.png")
    cache = EmbeddingCache(about["cache"], embedding)
    cache.create()
    cache.append([Entry(hashlib.sha256(data).digest(), UNIT, (360, 160, 440, 240), 0.99, 1)])
    cache.commit()
    found = thumbnails(["a.png"], ImageSource.of(about, None, None))["a.png"]
    assert found.note == "face"
    assert np.abs(pixels_of(found).astype(int) - RED).max() < 12


def test_the_box_of_a_image_that_is_reduced_is_reduced_with_it(tmp_path):
    about, embedding = record(tmp_path, margin=0)
    data = draw(tmp_path / "large.png", size=(8192, 300), box=(6000, 50, 6200, 250))
    cache = EmbeddingCache(about["cache"], embedding)
    cache.create()
    box = (6010, 60, 6190, 240)
    cache.append([Entry(hashlib.sha256(data).digest(), UNIT, box, 0.99, 1)])
    cache.commit()
    found = thumbnails(["large.png"], ImageSource.of(about, None, None))["large.png"]
    assert np.abs(pixels_of(found).astype(int) - RED).max() < 12


def test_fixed_crops_need_no_cache(tmp_path):
    about, _ = record(tmp_path, crop="center")
    draw(tmp_path / "a.png", size=(200, 200), box=(48, 38, 152, 164))
    found = thumbnails(["a.png"], ImageSource.of(about | {"cache": None}, None, None))["a.png"]
    assert found.note == "face"
    assert np.abs(pixels_of(found).astype(int) - RED).max() < 40


def test_the_whole_image_keeps_its_shape(tmp_path):
    about, _ = record(tmp_path)
    draw(tmp_path / "a.png")
    found = thumbnails(["a.png"], ImageSource.of(about, None, None))["a.png"]
    assert pixels_of(found).shape == (round(SIDE * 400 / 600), SIDE, 3)


@pytest.mark.parametrize(
    ("cell", "note"),
    [
        ("gone.png", "image not found"),
        ("", "image not found"),
        (None, "image not found"),
        ("text.png", "undecodable: not shown"),
        ("../secret.png", "outside --image-root"),
        ("/etc/secret.png", "outside --image-root"),
        ("http://x/a.png", "forbidden: not shown"),
    ],
)
def test_why_there_is_no_image(tmp_path, cell, note):
    about, _ = record(tmp_path)
    root = tmp_path / "root"
    root.mkdir()
    (root / "text.png").write_text("no image")
    draw(tmp_path / "secret.png")
    found = thumbnails([cell], ImageSource.of(about, str(root), None))[cell]
    assert (found.uri, found.note) == (None, note)


def test_images_are_looked_for_beside_every_manifest_file(tmp_path):
    about, _ = record(tmp_path)
    draw(tmp_path / "one" / "a.png")
    draw(tmp_path / "two" / "b.png")
    about["manifest"] = [str(tmp_path / name / "pairs.csv") for name in ("one", "two")]
    found = thumbnails(["a.png", "b.png", "c.png"], ImageSource.of(about, None, None))
    assert [each.uri is not None for each in found.values()] == [True, True, False]
    assert isinstance(ImageSource.of({}, None, None).resolve("a.png"), Skipped)
    assert ImageSource.of({}, None, None).resolve("a.png").reason == Reason.NOT_FOUND


@pytest.mark.parametrize("cell", ["n" * 300 + ".png", "a\0.png", "\udcff.png", "a.png/b.png", "s3://"])
def test_a_name_that_no_file_can_have_is_looked_for_nowhere(tmp_path, cell):
    about, _ = record(tmp_path)
    about["manifest"] = [str(tmp_path / name / "pairs.csv") for name in ("one", "two")]
    draw(tmp_path / "one" / "a.png")
    found = thumbnails([cell, "a.png"], ImageSource.of(about, None, None))
    assert found[cell].uri is None and found["a.png"].uri is not None


def test_more_images_than_are_held_at_once(tmp_path):
    about, _ = record(tmp_path)
    cells = [f"{each}.png" for each in range(2 * BITE + 1)]
    for cell in cells:
        draw(tmp_path / cell, size=(40, 40), box=(0, 0, 4, 4))
    found = thumbnails(cells, ImageSource.of(about, None, None))
    assert list(found) == cells
    assert all(each.uri for each in found.values())


def test_a_file_that_cannot_be_looked_at_is_not_replaced_by_another_of_its_name(tmp_path):
    draw(tmp_path / "a.png")
    with object_store() as store, impatience(attempts=1):
        store.client().create_bucket(Bucket="thumbnails")
        store.client().put_object(Bucket="thumbnails", Key="faces/a.png", Body=b"another")
        folders = (f"s3://thumbnails/faces{store.options()}", str(tmp_path))
        roots = tuple(ImageRoot(Location.parse(folder)) for folder in folders)
        source = ImageSource(roots, None, {}, Limits())
        assert source.resolve("a.png").startswith("s3://thumbnails/faces/a.png")
        store.weather(poisoned={"a.png": "403"})
        assert source.resolve("a.png").startswith("s3://thumbnails/faces/a.png")
        assert source.resolve("b.png") == str(tmp_path / "b.png")
