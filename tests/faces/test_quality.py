"""Sharpness against a slow loop, and in the order that people would give."""

import numpy as np
from PIL import Image, ImageFilter
from repository import REPOSITORY

from batchverify.faces.quality import sharpness


def test_it_equals_a_slow_loop() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    grey = pixels.astype(float) @ [0.299, 0.587, 0.114]
    # The middle 12 pixels, of which 10 have all neighbours.
    laplacians = [
        grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x]
        for y in range(7, 17)
        for x in range(7, 17)
    ]
    np.testing.assert_allclose(sharpness(pixels), np.var(laplacians), rtol=1e-5)


def test_blurred_and_small_faces_are_less_sharp() -> None:
    face = Image.open(REPOSITORY / "sample_manifests" / "faces" / "ada_1.jpg").convert("RGB")
    face = face.resize((160, 160))
    blurred = [face.filter(ImageFilter.GaussianBlur(radius)) for radius in (0, 1, 2, 4)]
    small = [face.resize((side, side)).resize((160, 160)) for side in (160, 80, 40)]
    for series in (blurred, small):
        values = [sharpness(np.asarray(each)) for each in series]
        assert values == sorted(values, reverse=True) and len(set(values)) == len(values)


def test_an_even_face_has_none_and_the_border_does_not_count() -> None:
    pixels = np.full((112, 112, 3), 90, np.uint8)
    pixels[:20] = 0
    pixels[:, :20] = 255
    assert sharpness(pixels) == 0
