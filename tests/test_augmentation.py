"""Changed views of a face: the same for the same key and number, others else, and still that face."""

import hashlib

import numpy as np
import pytest
from PIL import Image
from repository import REPOSITORY

from batchverify.augmentation import augmented

VIEWS = range(1, 41)
KEY = hashlib.sha256(b"a face").digest()


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    picture = Image.open(REPOSITORY / "sample_manifests" / "faces" / "ada_1.jpg").convert("RGB")
    return np.array(picture.resize((160, 160)))


@pytest.fixture(scope="module")
def views(face) -> list[np.ndarray]:
    return [augmented(face, KEY, view) for view in VIEWS]


def flat(colour: int, size: int = 160) -> np.ndarray:
    return np.full((size, size, 3), colour, np.uint8)


def spots(view: np.ndarray) -> np.ndarray:
    """Where a view of a grey picture holds salt and pepper."""
    return ((view == 0) | (view == 255)).all(axis=2)


def test_a_view_is_a_face_of_the_same_shape_and_the_face_stays_as_it_is(face):
    before = face.copy()
    view = augmented(face, KEY, 1)
    assert (view.shape, view.dtype) == (face.shape, np.uint8)
    assert np.array_equal(face, before)
    assert augmented(face[:96, :96], KEY, 1).shape == (96, 96, 3)


def test_key_and_number_alone_decide(face, views):
    np.random.default_rng().random()
    assert all(np.array_equal(augmented(face, KEY, view), views[view - 1]) for view in (1, 2, 40))
    assert not np.array_equal(augmented(face, hashlib.sha256(b"another").digest(), 1), views[0])


def test_views_differ_from_each_other_and_from_the_face(face, views):
    every = [face, *views]
    assert len({each.tobytes() for each in every}) == len(every)
    for view in views:
        assert np.abs(view.astype(int) - face).mean() > 2


def test_about_half_of_the_views_are_mirrored():
    picture = flat(60)
    picture[:, :80, 0] = 200
    halves = [augmented(picture, KEY, view)[..., 0].astype(float) for view in VIEWS]
    left = np.array([each[:, :60].mean() - each[:, 100:].mean() for each in halves])
    assert np.abs(left).min() > 50
    assert 10 < (left < 0).sum() < 30


def test_no_black_corners_come_in():
    for view in VIEWS:
        changed = augmented(flat(200), KEY, view)
        kept = changed[~spots(changed)]
        # Brightness falls by a quarter at most, contrast and colour of one grey stay; a corner from outside is 0.
        assert kept.min() >= 200 * 0.75 - 3, f"view {view}"


def test_corners_show_what_is_near_them():
    """A red frame of 40 pixels: rotation and crop may bring nothing else into the outermost row."""
    picture = flat(128)
    picture[40:-40, 40:-40] = (0, 0, 255)
    picture[:40], picture[-40:], picture[:, :40], picture[:, -40:] = [(200, 30, 30)] * 4
    for view in VIEWS:
        corner = augmented(picture, KEY, view)[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
        noise = (corner == 0).all(axis=1) | (corner == 255).all(axis=1)
        assert (corner[~noise, 0] > corner[~noise, 2]).all(), f"view {view}"


def test_rotation_and_crop_keep_to_their_limits():
    """Two dots on a line through the middle: their distance tells the crop, their direction the rotation."""
    picture = flat(60)
    picture[78:82, 38:42], picture[78:82, 118:122] = (255, 0, 0), (0, 255, 0)
    for view in VIEWS:
        changed = augmented(picture, KEY, view).astype(float)
        red, green = (changed[..., one] - changed[..., other] for one, other in ((0, 1), (1, 0)))
        places = [np.argwhere(each > each.max() * 0.6).mean(axis=0) for each in (red, green)]
        down, across = places[1] - places[0]
        angle = np.degrees(np.arctan(down / across))
        assert abs(angle) <= 11, f"view {view}: {angle}"
        assert 78 <= np.hypot(down, across) <= 80 / 0.88 + 2, f"view {view}"


def test_noise_is_in_a_part_of_the_views_and_below_one_per_cent():
    shares = np.array([spots(augmented(flat(100), KEY, view)).mean() for view in range(1, 301)])
    assert shares.max() <= 0.0125
    assert 60 < (shares > 0).sum() < 120


def test_compression_is_in_a_part_of_the_views():
    """Beside an edge of two greys JPEG rings: brighter than the brighter one. Nothing else does that."""
    picture = flat(80)
    picture[:, 80:] = 150
    ringing = 0
    for view in VIEWS:
        changed = augmented(picture, KEY, view)
        values = np.bincount(changed[~spots(changed)].ravel())
        bright = len(values) // 2 + int(values[len(values) // 2 :].argmax())
        ringing += len(values) - 1 > bright + 1
    assert 8 < ringing < 32
