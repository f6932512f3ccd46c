"""What a face is drawn with: person, view, noise, the relief of the head, and light."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Field = np.ndarray  # (H, W) float32 over the picture, or (H, W, 3) float32 RGB in linear light
RGB = tuple[int, int, int]  # sRGB, 0 to 255

OVERSAMPLE = 2


@dataclass(frozen=True)
class Person:
    """What all images of a person share. Lengths are in half head widths, heights from the eyes down."""

    seed: int
    skin: RGB
    hair: RGB
    iris: RGB
    lips: RGB
    cloth: RGB
    brow: RGB | None = None
    width: float = 1.0
    crown: float = 1.4
    chin: float = 1.42
    jaw: float = 2.3  # 1.8 pointed to 3.4 square
    taper: float = 0.12
    neck: float = 0.58
    cheek: float = 0.06
    eye_gap: float = 0.43
    eye_size: float = 0.2
    eye_open: float = 0.085
    eye_tilt: float = 0.0
    fold: float = 0.6
    socket: float = 0.17
    ridge: float = 0.05
    makeup: float = 0.0
    brow_size: float = 0.045
    brow_lift: float = 0.27
    brow_arch: float = 0.06
    brow_tilt: float = 0.0
    nose_width: float = 0.17
    nose_tip: float = 0.58
    nose_high: float = 0.3
    mouth_at: float = 0.96
    mouth_width: float = 0.4
    lip_upper: float = 0.06
    lip_lower: float = 0.09
    age: float = 0.0
    freckles: float = 0.0
    blush: float = 0.3
    beard: float = 0.0
    moustache: float = 0.0
    hairline: float = -0.95
    arch: float = 2.6  # of the hairline: 2 round to 4 square
    temple: float = 0.0
    sideburn: float = 0.15
    volume: float = 0.12
    length: float = 0.0  # 0 is short hair, else how far down it falls
    curl: float = 0.0  # 1 is frizzy
    part: float = 0.0
    fringe: float = 0.0
    swept: bool = False
    bald: bool = False
    scarf: RGB | None = None
    glasses: RGB | None = None
    collar: str = "round"


@dataclass(frozen=True)
class View:
    """What differs between images of a person; angles in radians, `zoom` in half head widths per image."""

    seed: int
    size: int = 232
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    zoom: float = 0.235
    shift: tuple[float, float] = (0.0, 0.0)
    light: tuple[float, float, float] = (-0.4, -0.5, 0.8)
    warmth: float = 0.0
    exposure: float = 1.0
    smile: float = 0.2
    teeth: float = 0.0
    gaze: float = 0.0
    backdrop: tuple[RGB, RGB] = ((120, 130, 140), (70, 78, 88))


@dataclass
class Scene:
    """A picture in the making: `x`, `y` of the picture, `u`, `v` on the head, `z` the head's height."""

    person: Person
    view: View
    x: Field
    y: Field
    u: Field
    v: Field
    z: Field
    pixel: float
    picture: Field = field(init=False)

    def paint(self, colour: Field, alpha: Field) -> None:
        """Lay `colour` over the picture, with opacity `alpha` (0 to 1)."""
        self.picture += (colour - self.picture) * np.clip(alpha, 0, 1)[..., None]

    def darken(self, amount: Field, tint: tuple[float, float, float] = (1, 1, 1)) -> None:
        """Darken by `amount` (0 to 1), weighted for each colour by `tint`."""
        self.picture *= 1 - amount[..., None] * np.array(tint, np.float32)

    def edge(self, distance: Field, soft: float = 1.5) -> Field:
        """The alpha of a shape given as signed distance, positive inside; `soft` is in pixels."""
        return np.clip(distance / (soft * self.pixel) + 0.5, 0, 1)

    def noise(self, salt: int, a: Field, b: Field) -> Field:
        """Smooth noise in -1..1, the person's own, one knot per unit of `a` and `b`."""
        return noise(self.person.seed * 100 + salt, a, b)


# Fields


def linear(rgb: RGB) -> Field:
    """An sRGB colour in linear light, `(3,) float32`."""
    return (np.array(rgb, np.float32) / 255) ** np.float32(2.2)


def step(a: Field, low: float, high: float) -> Field:
    """Smooth step from 0 at `low` to 1 at `high`."""
    t = np.clip((a - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def hill(a: Field, wide: float) -> Field:
    """A Gaussian ridge of height 1 along `a` = 0."""
    return np.exp(-0.5 * (a / wide) ** 2)


def bump(a: Field, b: Field, wide: float, high: float) -> Field:
    """A Gaussian hill of height 1."""
    return np.exp(-0.5 * ((a / wide) ** 2 + (b / high) ** 2))


def noise(seed: int, a: Field, b: Field) -> Field:
    """Smooth value noise in -1..1, one knot per unit, repeating after 64."""
    knots = np.random.RandomState(seed).uniform(-1, 1, (64, 64)).astype(np.float32)
    i, j = np.floor(a).astype(np.int32), np.floor(b).astype(np.int32)
    s, t = step(a - i, 0, 1), step(b - j, 0, 1)
    i, j, right, down = i % 64, j % 64, (i + 1) % 64, (j + 1) % 64
    top = knots[i, j] + (knots[right, j] - knots[i, j]) * s
    low = knots[i, down] + (knots[right, down] - knots[i, down]) * s
    return top + (low - top) * t


def blurred(a: Field, radius: float) -> Field:
    """A field after a wide blur: a running mean, twice along each axis, borders repeated."""
    n = max(1, int(radius))
    for axis in (0, 1, 0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (n + 1, n)
        total = np.cumsum(np.pad(a, pad, mode="edge"), axis=axis, dtype=np.float64)
        ahead, behind = np.split(total, [2 * n + 1], axis)[1], np.split(total, [-2 * n - 1], axis)[0]
        a = ((ahead - behind) / (2 * n + 1)).astype(np.float32)
    return a


# The relief of the head


def outline(p: Person, u: Field, v: Field) -> Field:
    """0 at the head's silhouette, 1 at its middle."""
    width = p.width * (1 - p.taper * step(v, 0.1, p.chin))
    rise = np.where(v > 0, np.abs(v / p.chin) ** p.jaw, np.abs(v / p.crown) ** 2.3)
    return 1 - np.abs(u / width) ** 2.4 - rise


def nose(p: Person, u: Field, v: Field) -> Field:
    """Height of bridge, tip and wings."""
    t = np.clip((v + 0.2) / (p.nose_tip + 0.2), 0, 1)
    bridge = (0.22 + 0.5 * t**1.4) * hill(u / (0.48 + 0.3 * t), p.nose_width)
    bridge = bridge * step(v, -0.5, 0.0) * (1 - step(v, p.nose_tip - 0.12, p.nose_tip + 0.16))
    tip = 0.42 * bump(u, v - p.nose_tip + 0.02, p.nose_width * 0.6, 0.095)
    wings = bump(np.abs(u) - p.nose_width * 0.92, v - p.nose_tip - 0.03, p.nose_width * 0.33, 0.075)
    return p.nose_high * (bridge + tip + 0.34 * wings)


def folds(p: Person, smile: float, a: Field, v: Field) -> Field:
    """Depth of the lines from nose to mouth, under the eyes and on the forehead."""
    run = np.clip((v - p.nose_tip) / (p.mouth_at - p.nose_tip + 0.1), 0, 1)
    line = p.nose_width + 0.07 + (p.mouth_width + 0.08 - p.nose_width) * run**0.8
    groove = bump(a - line, v - p.mouth_at + 0.17, 0.045, 0.14) * (0.012 + 0.045 * p.age + 0.03 * smile)
    bag = bump(a - p.eye_gap + 0.03, v - 0.19 - 0.25 * (a - p.eye_gap) ** 2, 0.15, 0.02) * 0.03 * p.age
    brow = sum(hill(v - k - 0.05 * a**2, 0.016) for k in (-0.82, -0.68, -0.55))
    return groove + bag + 0.009 * p.age * brow * step(a, 0.7, 0.4)


def relief(p: Person, smile: float, u: Field, v: Field, power: float = 0.45) -> Field:
    """Height of the head over the plane of its silhouette; a higher `power` is less steep at the rim."""
    a, inside = np.abs(u), outline(p, u, v)
    soft = nose(p, u, v) - folds(p, smile, a, v)
    soft -= p.socket * bump(a - p.eye_gap + 0.03, v + 0.04, 0.21, 0.13)
    soft += 0.07 * bump(a - p.eye_gap, v + 0.01, 0.15, 0.1)
    soft += p.ridge * bump(a - p.eye_gap, v + p.brow_lift, 0.26, 0.09)
    soft += (p.cheek + 0.06 * smile) * bump(a - 0.58, v - 0.42 + 0.06 * smile, 0.24, 0.2)
    soft += 0.09 * bump(u, v - p.mouth_at, 0.36, 0.24) + 0.08 * bump(u, v - p.chin + 0.17, 0.2, 0.12)
    soft -= 0.04 * bump(u, v - p.mouth_at - p.lip_lower - 0.1, 0.2, 0.05)
    soft -= 0.02 * bump(u, v - (p.nose_tip + p.mouth_at) / 2 - 0.03, 0.03, 0.08)
    return 1.05 * np.clip(inside, 0, 1) ** power + soft * step(inside, 0.02, 0.35)


def stage(p: Person, w: View) -> Scene:
    """The picture's grid and, by fixed-point iteration, the point of the turned head that each pixel shows."""
    n = w.size * OVERSAMPLE
    pixel = 1 / (w.zoom * n)
    rows, columns = np.mgrid[0:n, 0:n].astype(np.float32)
    right, down = (columns - n * 0.5) * pixel - w.shift[0], (rows - n * 0.47) * pixel - w.shift[1]
    x = right * np.float32(np.cos(w.roll)) + down * np.float32(np.sin(w.roll))
    y = down * np.float32(np.cos(w.roll)) - right * np.float32(np.sin(w.roll))
    u, v = x, y
    for _ in range(7):
        z = relief(p, w.smile, u, v, 0.9)
        u = (x - z * np.float32(np.sin(w.yaw))) / np.float32(np.cos(w.yaw))
        v = (y - z * np.float32(np.sin(w.pitch))) / np.float32(np.cos(w.pitch))
    # nobody's halves are alike
    u, v = u + 0.03 * noise(p.seed, u * 1.3 + 9, v * 1.3 + 9), v + 0.02 * noise(p.seed + 1, u + 9, v + 9)
    return Scene(p, w, x, y, u, v, relief(p, w.smile, u, v), pixel)


# Light


def normals(height: Field, pixel: float) -> Field:
    """Unit normals of a height map, `(H, W, 3)`, the third axis towards the camera."""
    down, right = np.gradient(height, pixel)
    n = np.stack([-right, -down, np.ones_like(height)], -1).astype(np.float32)
    return n / np.linalg.norm(n, axis=-1, keepdims=True)


def shadow(s: Scene, height: Field) -> Field:
    """How much of the main light arrives, 0 to 1: a march over the height map towards the light."""
    right, down, ahead = s.view.light
    across = float(np.hypot(right, down))
    hidden = np.zeros_like(height)
    for k in range(1, 13):
        far = 0.045 * k
        shift = [round(-far * c / across / s.pixel) for c in (down, right)]
        gain = np.roll(height, shift, (0, 1)) - height - far * ahead / across
        hidden = np.maximum(hidden, 0.8 * gain / (0.03 + 0.05 * far))
    return blurred(1 - 0.75 * np.clip(hidden, 0, 1), 2)


def lit(s: Scene, height: Field, wrap: tuple[float, float, float]) -> Field:
    """Light on a matt surface, `(H, W, 3)`; `wrap` lets red light reach round skin's edges."""
    n = normals(height, s.pixel)
    lamp = np.array(s.view.light, np.float32)
    key = n @ (lamp / np.linalg.norm(lamp))
    reach = np.array(wrap, np.float32)
    warm = np.array([1 + s.view.warmth, 1, 1 - s.view.warmth], np.float32)
    diffuse = np.clip((key[..., None] + reach) / (1 + reach), 0, None) * shadow(s, height)[..., None] * warm
    fill = np.clip(n @ np.array([-lamp[0], -0.1, 0.7], np.float32), 0, None)
    hollow = 1 - 3 * np.clip(blurred(height, 0.1 / s.pixel) - height, 0, 0.2)
    return (1.05 * diffuse + (0.26 * fill + 0.12)[..., None]) * hollow[..., None]


def shine(s: Scene, height: Field) -> Field:
    """The mirror image of the main light, 0 to 1."""
    lamp = np.array(s.view.light, np.float32)
    half = lamp / np.linalg.norm(lamp) + np.array([0, 0, 1], np.float32)
    return np.clip(normals(height, s.pixel) @ (half / np.linalg.norm(half)), 0, 1) ** 22
