"""The canvas of scales and the patches, against facenet-pytorch's resampling of each by itself."""

import numpy as np
import pytest
import torch
from facenet_pytorch.models.utils.detect_face import imresample, pad

from batchverify.faces.pyramid import CELL, CHANNELS, FACTOR, integral, pyramid, regions
from batchverify.kernels.loops import resample

SIZES = [(250, 250), (60, 61), (61, 60), (131, 77), (300, 1201), (20, 500), (21, 20), (1031, 777)]


def cut(sums: np.ndarray, boxes: np.ndarray, size: int) -> torch.Tensor:
    """Patches of boxes as the detector cuts them: (K, size, size, 4)."""
    patches = np.full((len(boxes), size, size, CHANNELS), np.nan, np.float32)
    places = np.array([[number, 0, 0, size, size] for number in range(len(boxes))])
    resample(sums, regions(boxes, sums.shape[0] - 1, sums.shape[1] - 1), places, False, patches)
    return torch.from_numpy(patches)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_level_is_an_interpolation_by_area(height, width):
    pixels = noise(height, width)
    scales = pyramid(height, width, 20)
    canvas = torch.from_numpy(scales.canvas(integral(pixels))).permute(0, 3, 1, 2)
    assert canvas.shape == (1, 3, scales.height, scales.width)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    scale = CELL / 20
    for level in scales.levels:
        size = (int(height * scale + 1), int(width * scale + 1))
        assert (level.height, level.width) == size
        wanted = (imresample(image, size) - 127.5) * 0.0078125
        got = canvas[:, :3, level.top : level.top + size[0], level.left : level.left + size[1]]
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        scale *= FACTOR
    assert min(height, width) * scale < CELL


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_levels_lie_apart_at_even_places_and_own_their_cells(height, width):
    scales = pyramid(height, width, 20)
    taken = np.zeros((scales.height, scales.width), np.int64)
    for level in scales.levels:
        assert level.top % 2 == level.left % 2 == 0
        taken[level.top : level.top + level.height, level.left : level.left + level.width] += 1
    assert taken.max() == 1
    cells = np.zeros(((scales.height - 1) // 2 - 4, (scales.width - 1) // 2 - 4), np.int64)
    for (top, left, rows, columns), level in zip(scales.cells, scales.levels, strict=True):
        assert (rows, columns) == level.map_size
        assert top + rows <= cells.shape[0]
        assert left + columns <= cells.shape[1]
        cells[top : top + rows, left : left + columns] += 1
    assert cells.max() == 1
    # Most of a canvas is used: what lies idle costs as much as pictures.
    if min(height, width) > 100:
        assert taken.mean() > 0.6


def test_no_pyramid_for_pictures_smaller_than_a_face():
    assert pyramid(19, 500, 20) is None
    assert pyramid(20, 500, 20) is not None


@pytest.mark.parametrize("size", [24, 48])
def test_patches_are_interpolations_by_area(size):
    dice = np.random.default_rng(size)
    for height, width in ((250, 250), (70, 410), (13, 17)):
        pixels = noise(height, width)
        low = dice.uniform(-0.5, 1, (60, 2)) * (width, height)
        boxes = np.concatenate([low, low + dice.uniform(1, max(height, width), (60, 1))], axis=1)
        boxes = boxes.astype(np.float32)
        y, ey, x, ex = pad(torch.from_numpy(boxes), width, height)
        inside = (ey > y - 1) & (ex > x - 1)
        patches = cut(integral(pixels), boxes[inside], size)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        edges = zip(*(edge[inside].tolist() for edge in (y, ey, x, ex)), strict=True)
        wanted = [imresample(image[:, :, a - 1 : b, c - 1 : d], (size, size)) for a, b, c, d in edges]
        assert len(wanted) > 20
        normalised = (torch.cat(wanted).permute(0, 2, 3, 1) - 127.5) * 0.0078125
        torch.testing.assert_close(patches[..., :3], normalised, rtol=0, atol=1e-5)


def test_integrals_hold_the_sums_of_rectangles():
    pixels = np.full((30, 40, 3), 255, np.uint8)
    pixels[3, 4] = (1, 2, 3)
    sums = integral(pixels)
    assert sums.shape == (31, 41, 4)
    assert not sums[0].any()
    assert not sums[:, 0].any()
    assert np.array_equal(sums[20, 30, :3], pixels[:20, :30].sum(axis=(0, 1)))
    large = np.full((2200, 4000, 3), 255, np.uint8)  # its sum does not fit 31 bits and wraps around
    assert (integral(large)[-1, -1, :3].view(np.uint32) == 2200 * 4000 * 255).all()


def test_large_pictures_have_the_same_levels_and_patches():
    large = np.zeros((2200, 4000, 3), np.uint8)
    large[:, 2000:] = 200
    canvas = pyramid(2200, 4000, 400).canvas(integral(large))
    level = pyramid(2200, 4000, 400).levels[0]
    right = canvas[0, 2 : level.height - 2, level.width - 9 : level.width - 2]
    np.testing.assert_allclose(right, (200 - 127.5) * 0.0078125, rtol=0, atol=1e-5)
    patch = cut(integral(large), np.array([[3001, 101, 3100, 200]], np.float32), 24)
    assert (patch[..., :3] == (200 - 127.5) * 0.0078125).all()
    whole = cut(integral(large), np.array([[2001, 1, 4000, 2200]], np.float32), 24)
    assert (whole[..., :3] == (200 - 127.5) * 0.0078125).all()
