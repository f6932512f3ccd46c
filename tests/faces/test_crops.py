"""Crops: facenet-pytorch's extract_face pixel by pixel, the fixed crops, and boxes that hold nothing."""

import hashlib
import math

import numpy as np
import pytest
from facenet_pytorch import extract_face
from PIL import Image
from repository import REPOSITORY

from batchverify.faces.crops import Face, augmented, box_pixels, fixed_face

VIEWS = range(1, 41)
KEY = hashlib.sha256(b"a face").digest()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def reference(pixels: np.ndarray, box: tuple[float, ...], margin: int) -> np.ndarray:
    face = extract_face(Image.fromarray(pixels), np.array(box), image_size=160, margin=margin)
    return face.permute(1, 2, 0).numpy().astype(np.uint8)


@pytest.mark.parametrize("margin", [0, 14, 44, 120])
@pytest.mark.parametrize("size", [(250, 250), (91, 333), (37, 20)])
def test_box_faces_equal_facenet_pytorchs(size, margin):
    pixels = noise(*size)
    height, width = size
    dice = np.random.default_rng(margin)
    beyond = 0
    for _ in range(40):
        x, y = dice.uniform(0, width), dice.uniform(0, height)
        side = dice.uniform(4, max(size))
        box = (x - side / 2, y - side * 0.6, x + side / 2, y + side * 0.6)
        beyond += box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height
        face = box_pixels(pixels, box, margin)
        assert face is not None
        assert face.shape == (160, 160, 3)
        assert face.dtype == np.uint8
        assert np.array_equal(face, reference(pixels, box, margin))
    assert beyond > 5


def test_stretching_is_pillows_bilinear_bit_by_bit():
    dice = np.random.default_rng(1)
    sizes = [(160, 160), (1, 1), (160, 90), (90, 160), (161, 160), (600, 160), (1, 700), (700, 1)]
    sizes += [tuple(dice.integers(1, 500, 2)) for _ in range(60)]
    for height, width in sizes:
        # Black and white: the largest sums, and errors of rounding show.
        pixels = (noise(height, width) > 127).astype(np.uint8) * np.uint8(255)
        wanted = np.asarray(Image.fromarray(pixels).resize((160, 160), Image.Resampling.BILINEAR))
        assert np.array_equal(fixed_face(pixels, "none").pixels, wanted), (height, width)
        inner = np.pad(pixels, ((3, 2), (5, 1), (0, 0)))[3:-2, 5:-1]
        assert np.array_equal(fixed_face(inner, "none").pixels, wanted), "a view into another array"


@pytest.mark.parametrize(
    "box",
    [
        (-60.0, 10.0, -20.0, 50.0),
        (10.0, -60.0, 50.0, -20.0),
        (130.0, 10.0, 170.0, 50.0),
        (10.0, 130.0, 50.0, 170.0),
        (50.0, 50.0, 50.0, 50.0),
        (60.0, 60.0, 40.0, 40.0),
        (30.2, 30.2, 30.8, 60.0),
        (-9.0, -9.0, 0.5, 0.5),
    ],
)
def test_boxes_without_a_pixel_are_no_faces(box):
    assert box_pixels(noise(100, 100), box, 0) is None


def test_the_margin_counts_in_pixels_of_the_face():
    # 44 of 160: a box of 116 pixels grows to 160, 22 on each side.
    pixels = noise(300, 300)
    face = box_pixels(pixels, (100.0, 100.0, 216.0, 216.0), 44)
    assert face is not None
    assert np.array_equal(face, pixels[78:238, 78:238])


def test_the_center_crop_is_the_measured_one_on_lfw_pictures():
    pixels = noise(250, 250)
    face = fixed_face(pixels, "center")
    wanted = Image.fromarray(pixels).crop((60, 48, 190, 205)).resize((160, 160), Image.Resampling.BILINEAR)
    assert np.array_equal(face.pixels, np.asarray(wanted))
    assert face.box == (60, 48, 190, 205)
    assert math.isnan(face.confidence)
    assert face.faces == 0


def test_the_whole_picture_is_stretched():
    pixels = noise(80, 120)
    face = fixed_face(pixels, "none")
    wanted = Image.fromarray(pixels).resize((160, 160), Image.Resampling.BILINEAR)
    assert np.array_equal(face.pixels, np.asarray(wanted))
    assert face.box == (0, 0, 120, 80)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 3), (5, 1), (1, 4000)])
def test_tiny_and_thin_pictures_have_fixed_crops(size):
    for crop in ("center", "none"):
        face = fixed_face(noise(*size), crop)
        assert face.pixels.shape == (160, 160, 3)
        x0, y0, x1, y1 = face.box
        assert 0 <= x0 < x1 <= size[1]
        assert 0 <= y0 < y1 <= size[0]


def test_fixed_crops_differ():
    pixels = noise(50, 50)
    assert not np.array_equal(fixed_face(pixels, "center").pixels, fixed_face(pixels, "none").pixels)


def test_pictures_that_are_views_or_read_only():
    pixels = noise(120, 90)
    flipped = pixels[::-1, ::2]
    frozen = flipped.copy()
    frozen.setflags(write=False)
    box = (5.0, 20.0, 40.0, 80.0)
    view, copy = (box_pixels(pixels, box, 14) for pixels in (flipped, frozen))
    assert view is not None
    assert copy is not None
    assert np.array_equal(view, copy)


def test_scaled_faces_have_boxes_of_the_original():
    face = Face(np.zeros((160, 160, 3), np.uint8), (1.0, 2.0, 3.0, 4.0), 0.5, 2).scaled(2.5)
    assert face.box == (2.5, 5.0, 7.5, 10.0)
    assert (face.confidence, face.faces) == (0.5, 2)


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


def test_a_part_of_the_views_is_blurred_if_asked_and_the_others_stay(face, views):
    found = [augmented(face, KEY, view, blur=True) for view in VIEWS]
    same = [np.array_equal(one, other) for one, other in zip(found, views, strict=True)]
    assert 20 < sum(same) < 36
    assert all(np.array_equal(augmented(face, KEY, view, blur=True), found[view - 1]) for view in VIEWS[:5])
    for one, other, unchanged in zip(found, views, same, strict=True):
        salt = spots(one) | spots(other)
        assert unchanged or steps(one, salt) < steps(other, salt)


def steps(view: np.ndarray, salt: np.ndarray) -> float:
    """How much neighbouring pixels differ where there is no salt."""
    plain = ~(salt[:, 1:] | salt[:, :-1])
    return float(np.abs(np.diff(view.astype(float), axis=1))[plain].mean())
