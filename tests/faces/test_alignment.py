"""Alignment: Umeyama's transform and its warp against slow references, and points that are no face."""

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import affine_transform

from batchverify.errors import UsageError
from batchverify.faces.alignment import TEMPLATES, Template, align, similarity

ARCFACE = TEMPLATES["arcface"]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise, in which every wrong weight shows."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def moved(template: Template, scale: float, degrees: float, shift: tuple[float, float]) -> np.ndarray:
    """The template's points in an image: (5, 2)."""
    angle = np.deg2rad(degrees)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.array(template.points) @ turn.T + shift


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Equations 34 to 43 of the paper, with its singular values: (2, 3)."""
    x, y = source - source.mean(axis=0), target - target.mean(axis=0)
    u, d, v = np.linalg.svd(y.T @ x / len(x))
    sign = np.diag([1.0, np.sign(np.linalg.det(u) * np.linalg.det(v))])
    rotation = u @ sign @ v
    scale = np.trace(np.diag(d) @ sign) / (x**2).sum(axis=1).mean()
    return np.column_stack([scale * rotation, target.mean(axis=0) - scale * rotation @ source.mean(axis=0)])


def warped(image: np.ndarray, transform: np.ndarray, side: int) -> np.ndarray:
    """scipy's bilinear interpolation, black outside: (side, side, 3) float64."""
    backwards = np.linalg.inv(np.vstack([transform, [0, 0, 1]]))
    # scipy takes rows before columns.
    matrix, offset = backwards[:2, :2][::-1, ::-1], backwards[:2, 2][::-1]
    channels = [
        affine_transform(image[..., c].astype(float), matrix, offset, (side, side), order=1, mode="grid-constant")
        for c in range(3)
    ]
    return np.stack(channels, axis=2)


@pytest.mark.parametrize("name", TEMPLATES)
def test_transforms_are_umeyamas(name):
    template, rng = TEMPLATES[name], np.random.default_rng(1)
    landmarks = np.stack(
        [
            moved(template, rng.uniform(0.2, 9), rng.uniform(-180, 180), tuple(rng.uniform(-50, 900, 2)))
            + rng.normal(0, 6, (5, 2))
            for _ in range(50)
        ]
    )
    # Mirrored points: the best turn, never a mirror image.
    landmarks[7] = landmarks[7] * (-1, 1)
    for points in landmarks:
        found = similarity(points, template)
        assert found is not None
        factor, shift = found
        transform = [[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]]
        np.testing.assert_allclose(transform, umeyama(points, np.array(template.points)), atol=1e-9)


def test_templates_are_the_published_ones():
    # Open Model Zoo's demo of face recognition, and InsightFace's face_align.py.
    assert [each.side for each in TEMPLATES.values()] == [160, 112, 128, 128]
    assert TEMPLATES["arcface-128"].points[0] == (46.2946, 51.6963)
    np.testing.assert_allclose(TEMPLATES["reid-0095"].points[2], (64.0336, 81.9847), atol=1e-3)
    assert ARCFACE.resized(224).points[4] == (141.4598, 184.4082)
    for name, template in TEMPLATES.items():
        assert template.name == name
        eye, other, nose, mouth, corner = template.points
        assert eye[0] < nose[0] < other[0] and mouth[0] < corner[0] and eye[1] < nose[1] < mouth[1]


@pytest.mark.parametrize("scale", [0.3, 0.71, 1.0])
@pytest.mark.parametrize("degrees", [0, 17, -90, 180])
def test_faces_that_do_not_shrink_are_bilinear(scale, degrees):
    image = picture(150, 190)
    # In the middle, and across every edge of the image.
    for shift in ((60, 20), (-30, 60), (150, -20), (170, 140), (20, -44)):
        points = moved(ARCFACE, scale, degrees, shift)
        found = align([image], points[None], ARCFACE)[0]
        wanted = warped(image, umeyama(points, np.array(ARCFACE.points)), 112)
        assert np.abs(found - wanted).max() <= 0.51, (shift, degrees)


@pytest.mark.parametrize("scale", [1.3, 2.0, 3.7, 11.0])
def test_faces_that_shrink_are_averaged_as_by_pillow(scale):
    template = Template("test", 64, ARCFACE.points)
    side = round(64 * scale)
    image = picture(side + 60, side + 80)
    # Pillow counts from the corner of a pixel, templates from its centre.
    shift = (21 + scale / 2 - 0.5, 13 + scale / 2 - 0.5)
    found = align([image], moved(template, scale, 0, shift)[None], template)[0]
    box = (21, 13, 21 + 64 * scale, 13 + 64 * scale)
    wanted = Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR, box)
    inner = slice(2, -2)  # Pillow ends its averages at the edge of the box
    difference = np.abs(found.astype(int) - np.asarray(wanted))[inner, inner]
    assert difference.max() <= 1
    # Without averages noise would stay noise.
    assert found[inner, inner].std() < image.std() / (0.9 * scale)


def test_turned_faces_that_shrink_are_averaged_by_a_triangle():
    """Every pixel of the image is weighed for every pixel of the crop."""
    image, template = picture(180, 230, 5), Template("test", 40, ARCFACE.resized(40).points)
    for scale, degrees, shift in ((2.6, 33, (90, -20)), (1.2, -140, (150, 150)), (4.4, 91, (160, 10))):
        points = moved(template, scale, degrees, shift)
        found = align([image], points[None], template)[0]
        backwards = np.linalg.inv(np.vstack([umeyama(points, np.array(template.points)), [0, 0, 1]]))
        row, column = np.indices((40, 40)).reshape(2, -1)
        x, y = (backwards @ np.stack([column, row, np.ones_like(row)]))[:2]
        # A border as wide as the crop, so that the weights beside the image count, too.
        inside = np.pad(image, ((300, 300), (300, 300), (0, 0))).astype(float)
        across, down = (
            np.maximum(1 - abs(np.arange(length) - 300 - centre[:, None]) / scale, 0)
            for length, centre in ((830, x), (780, y))
        )
        across, down = (each / each.sum(axis=1, keepdims=True) for each in (across, down))
        wanted = np.stack([((down @ inside[..., c]) * across).sum(axis=1) for c in range(3)], axis=1)
        assert np.abs(found.reshape(-1, 3) - wanted).max() <= 0.51


def test_images_of_all_sizes_in_one_call_do_not_influence_each_other():
    images = [picture(60, 70, 1), picture(300, 200, 2), picture(9, 8, 3), picture(2000, 1500, 4)]
    points = np.stack([moved(ARCFACE, scale, 10, (3, 2)) for scale in (0.4, 1.4, 0.05, 11)])
    together = align(images, points, ARCFACE)
    assert together.shape == (4, 112, 112, 3) and together.dtype == np.uint8
    for number, image in enumerate(images):
        frozen = image.copy()
        frozen.setflags(write=False)
        assert np.array_equal(align([frozen], points[number : number + 1], ARCFACE)[0], together[number])
        backwards = np.ascontiguousarray(image[::-1])[::-1]
        assert np.array_equal(align([backwards], points[number : number + 1], ARCFACE)[0], together[number])
    assert align([], np.zeros((0, 5, 2)), ARCFACE).shape == (0, 112, 112, 3)


def test_what_lies_outside_of_the_image_is_black():
    white = np.full((50, 50, 3), 255, np.uint8)
    face = align([white], moved(ARCFACE, 1, 0, (-60, 10))[None], ARCFACE)[0]
    assert (face[:, :60] == 0).all() and (face[:40, 60:110] == 255).all() and (face[40:] == 0).all()
    assert not align([white], moved(ARCFACE, 1, 0, (5000, 0))[None], ARCFACE).any()


@pytest.mark.parametrize(
    "points",
    [
        np.full((5, 2), 7.0),
        np.array(ARCFACE.points) * 1e-200,
        np.full((5, 2), np.nan),
        np.full((5, 2), np.float32(np.inf)),
        np.full((5, 2), 1e300),
        np.array([[0, 0], [1e300, 0], [1, 1], [0, 2], [2, 2]]),
        np.array([[1, 1], [1, 1], [1, 1], [1, 1], [1.001, 1]]),
        moved(ARCFACE, 1, 0, (1e12, 0)),
    ],
)
def test_points_that_are_no_face_are_refused(points):
    assert similarity(points, ARCFACE) is None
    good = moved(ARCFACE, 1, 0, (0, 0))
    with pytest.raises(UsageError, match="image 1: the landmarks are not those of a face"):
        align([picture(20, 20)] * 2, np.stack([good, points]), ARCFACE)
