"""Draws one synthetic face: a head as a height map, painted, lit and photographed with numpy alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFilter

Field = np.ndarray  # (H, W) float32, or (H, W, 3) float32 for colours in linear light
RGB = tuple[int, int, int]  # sRGB, 0 to 255

OVERSAMPLE = 2


@dataclass(frozen=True)
class Person:
    """What stays the same between two pictures. Lengths are in half head widths, v points down from the eyes."""

    seed: int
    skin: RGB
    hair: RGB
    iris: RGB
    lips: RGB
    cloth: RGB
    width: float = 1.0
    crown: float = 1.4
    chin: float = 1.42
    jaw: float = 2.3
    neck: float = 0.58
    taper: float = 0.12
    cheek: float = 0.06
    eye_gap: float = 0.43
    eye_size: float = 0.2
    eye_open: float = 0.085
    eye_tilt: float = 0.0
    fold: float = 0.6
    ridge: float = 0.05
    socket: float = 0.17
    makeup: float = 0.0
    brow_size: float = 0.045
    brow_lift: float = 0.27
    brow_arch: float = 0.06
    brow_tilt: float = 0.0
    brow: RGB | None = None
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
    temple: float = 0.0
    arch: float = 2.6
    sideburn: float = 0.15
    volume: float = 0.12
    length: float = 0.0
    curl: float = 0.0
    part: float = 0.0
    fringe: float = 0.0
    swept: bool = False
    bald: bool = False
    scarf: RGB | None = None
    glasses: RGB | None = None
    collar: str = "round"


@dataclass(frozen=True)
class View:
    """What changes from picture to picture: pose in radians, light, expression, background."""

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
    """The fields that the parts of a face are drawn on; `x`, `y` of the picture, `u`, `v` of the head."""

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
        """Lays `colour` over the picture where `alpha` (0 to 1) says so."""
        self.picture += (colour - self.picture) * np.clip(alpha, 0, 1)[..., None]

    def edge(self, distance: Field, soft: float = 1.5) -> Field:
        """The alpha of a shape given as signed distance, positive inside; `soft` is in pixels."""
        return np.clip(distance / (soft * self.pixel) + 0.5, 0, 1)


def linear(rgb: RGB) -> Field:
    """An sRGB colour in linear light, `(3,) float32`."""
    return (np.array(rgb, np.float32) / 255) ** np.float32(2.2)


def step(a: Field, low: float, high: float) -> Field:
    """Smooth step from 0 at `low` to 1 at `high`."""
    t = np.clip((a - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def bump(a: Field, b: Field, sa: float | Field, sb: float | Field) -> Field:
    """A Gaussian hill of height 1."""
    return np.exp(-0.5 * ((a / sa) ** 2 + (b / sb) ** 2))


def noise(seed: int, a: Field, b: Field) -> Field:
    """Smooth value noise in -1..1 with one knot per unit."""
    knots = np.random.default_rng(seed).uniform(-1, 1, (64, 64)).astype(np.float32)
    i, j = np.floor(a).astype(int), np.floor(b).astype(int)
    s, t = step(a - i, 0, 1), step(b - j, 0, 1)
    top = knots[i % 64, j % 64] * (1 - s) + knots[(i + 1) % 64, j % 64] * s
    low = knots[i % 64, (j + 1) % 64] * (1 - s) + knots[(i + 1) % 64, (j + 1) % 64] * s
    return top * (1 - t) + low * t


def clouds(seed: int, a: Field, b: Field, octaves: int = 3) -> Field:
    """Noise of several scales, about -1..1."""
    return sum(noise(seed + k, a * 2**k, b * 2**k) * 0.6**k for k in range(octaves)) / 1.4


def blurred(a: Field, radius: float) -> Field:
    """A field after a wide blur, by three box filters along each axis."""
    for axis in (0, 1, 0, 1):
        a = box(a, max(1, int(radius)), axis)
    return a


def box(a: Field, n: int, axis: int) -> Field:
    """Running mean over 2n + 1 samples, the border repeated."""
    pad = [(0, 0), (0, 0)]
    pad[axis] = (n + 1, n)
    total = np.cumsum(np.pad(a, pad, mode="edge"), axis=axis, dtype=np.float64)
    size = a.shape[axis]
    high = np.take(total, range(2 * n + 1, 2 * n + 1 + size), axis)
    return ((high - np.take(total, range(size), axis)) / (2 * n + 1)).astype(np.float32)


# The head's relief


def outline(p: Person, u: Field, v: Field) -> Field:
    """0 at the head's silhouette, 1 at its middle."""
    below = v > 0
    width = p.width * (1 - p.taper * step(v, 0.1, p.chin))
    rise = np.where(below, np.abs(v / p.chin) ** p.jaw, np.abs(v / p.crown) ** 2.3)
    return 1 - np.abs(u / width) ** 2.4 - rise


def nose(p: Person, u: Field, v: Field) -> Field:
    """Bridge, tip and wings."""
    t = np.clip((v + 0.2) / (p.nose_tip + 0.2), 0, 1)
    width = p.nose_width * (0.48 + 0.3 * t)
    bridge = (0.22 + 0.5 * t**1.4) * np.exp(-0.5 * (u / width) ** 2)
    bridge = bridge * step(v, -0.5, 0.0) * (1 - step(v, p.nose_tip - 0.12, p.nose_tip + 0.16))
    tip = 0.42 * bump(u, v - p.nose_tip + 0.02, p.nose_width * 0.6, 0.095)
    wings = bump(np.abs(u) - p.nose_width * 0.92, v - p.nose_tip - 0.03, p.nose_width * 0.33, 0.075)
    return p.nose_high * (bridge + tip + 0.34 * wings)


def relief(p: Person, smile: float, u: Field, v: Field, power: float = 0.45) -> Field:
    """Height of the head over the plane of its silhouette, `(H, W)`."""
    a = np.abs(u)
    inside = outline(p, u, v)
    z = 1.05 * np.clip(inside, 0, 1) ** power
    soft = nose(p, u, v)
    soft -= p.socket * bump(a - p.eye_gap + 0.03, v + 0.04, 0.21, 0.13)
    soft += 0.07 * bump(a - p.eye_gap, v + 0.01, 0.15, 0.1)
    soft += p.ridge * bump(a - p.eye_gap, v + p.brow_lift, 0.26, 0.09)
    soft += (p.cheek + 0.06 * smile) * bump(a - 0.58, v - 0.42 + 0.06 * smile, 0.24, 0.2)
    soft += 0.09 * bump(u, v - p.mouth_at, 0.36, 0.24)
    soft += 0.08 * bump(u, v - p.chin + 0.17, 0.2, 0.12)
    soft -= 0.04 * bump(u, v - p.mouth_at - p.lip_lower - 0.1, 0.2, 0.05)
    soft -= 0.02 * bump(u, v - (p.nose_tip + p.mouth_at) / 2 - 0.03, 0.03, 0.08)
    return z + (soft + folds(p, smile, a, v)) * step(inside, 0.02, 0.35)


def folds(p: Person, smile: float, a: Field, v: Field) -> Field:
    """Grooves from the nose to the mouth, under the eyes and on the forehead, deeper with age and smile."""
    run = np.clip((v - p.nose_tip) / (p.mouth_at - p.nose_tip + 0.1), 0, 1)
    line = p.nose_width + 0.07 + (p.mouth_width + 0.08 - p.nose_width) * run**0.8
    groove = bump(a - line, v - p.mouth_at + 0.17, 0.035, 0.14) * (0.02 + 0.04 * p.age + 0.035 * smile)
    bag = bump(a - p.eye_gap + 0.03, v - 0.19 - 0.25 * (a - p.eye_gap) ** 2, 0.15, 0.02) * 0.03 * p.age
    brow = sum(np.exp(-0.5 * ((v - k - 0.05 * a**2) / 0.016) ** 2) for k in (-0.82, -0.68, -0.55))
    return -groove - bag - 0.008 * p.age * brow * step(a, 0.7, 0.4)


def stage(p: Person, w: View) -> Scene:
    """The picture's grid, turned into the head's own coordinates by a few fixed-point steps."""
    n = w.size * OVERSAMPLE
    pixel = 1 / (w.zoom * n)
    rows, columns = np.mgrid[0:n, 0:n].astype(np.float32)
    right, down = (columns - n * 0.5) * pixel - w.shift[0], (rows - n * 0.47) * pixel - w.shift[1]
    x = right * np.cos(w.roll) + down * np.sin(w.roll)
    y = -right * np.sin(w.roll) + down * np.cos(w.roll)
    u, v = x, y
    for _ in range(8):
        z = relief(p, w.smile, u, v, 0.9)
        u, v = (x - z * np.sin(w.yaw)) / np.cos(w.yaw), (y - z * np.sin(w.pitch)) / np.cos(w.pitch)
    z = relief(p, w.smile, u, v)
    return Scene(p, w, x, y, u, v, z, pixel)


# Light


def normals(height: Field, pixel: float) -> Field:
    """Unit normals of a height map, `(H, W, 3)`."""
    down, right = np.gradient(height, pixel)
    n = np.stack([-right, -down, np.ones_like(height)], -1)
    return n / np.linalg.norm(n, axis=-1, keepdims=True)


def lamp(w: View) -> Field:
    """Unit vector towards the main light."""
    v = np.array(w.light, np.float32)
    return v / np.linalg.norm(v)


def shadow(s: Scene, height: Field) -> Field:
    """How much of the main light arrives, 0 to 1: a march over the height map towards the light."""
    light = lamp(s.view)
    across = float(np.hypot(light[0], light[1])) + 1e-6
    hidden = np.zeros_like(height)
    for k in range(1, 13):
        far = 0.045 * k
        shift = [int(round(-far * c / across / s.pixel)) for c in (light[1], light[0])]
        other = np.roll(height, shift, (0, 1))
        hidden = np.maximum(hidden, 0.8 * (other - height - far * light[2] / across) / (0.03 + 0.05 * far))
    return blurred(1 - 0.75 * np.clip(hidden, 0, 1), 2)


def lit(s: Scene, height: Field, gloss: float, wrap: tuple[float, float, float]) -> tuple[Field, Field]:
    """Diffuse light `(H, W, 3)` and highlight `(H, W)` of a surface; skin lets red light wrap around."""
    n, light = normals(height, s.pixel), lamp(s.view)
    key = n @ light
    warm = np.array([1 + s.view.warmth, 1, 1 - s.view.warmth], np.float32)
    w = np.array(wrap, np.float32)
    diffuse = np.clip((key[..., None] + w) / (1 + w), 0, None) * shadow(s, height)[..., None]
    fill = np.clip(n @ np.array([-light[0], -0.1, 0.7], np.float32), 0, None)
    hollow = np.clip(1 - 3.0 * np.clip(blurred(height, 0.1 / s.pixel) - height, 0, 0.2), 0, 1)
    half = light + np.array([0, 0, 1], np.float32)
    shine = np.clip(n @ (half / np.linalg.norm(half)), 0, 1) ** 22 * gloss
    total = (0.95 * diffuse * warm + (0.3 * fill + 0.16)[..., None]) * hollow[..., None]
    return total.astype(np.float32), shine.astype(np.float32)


# The parts, in the order in which they are painted


def backdrop(s: Scene) -> None:
    """A room out of focus."""
    top, low = (linear(c) for c in s.view.backdrop)
    t = np.clip(0.5 + s.y / 4.5 + 0.35 * clouds(s.view.seed, s.x * 0.7 + 9, s.y * 0.5 + 9, 2), 0, 1)
    s.picture = (top + (low - top) * t[..., None]).astype(np.float32)


def body(s: Scene) -> None:
    """Neck, shoulders and clothes."""
    p, a = s.person, np.abs(s.x)
    neck = p.neck + 0.16 * step(s.y, 1.2, 1.75)
    round_ = 0.7 * np.sqrt(np.clip(1 - (s.x / (neck + 0.1)) ** 2, 0, 1))
    light, shine = lit(s, round_, 0.05, (0.4, 0.25, 0.2))
    under = 1 - 0.65 * step(s.y, 2.0, 1.15)
    s.paint(linear(p.skin) * light * under[..., None], s.edge(neck - a) * step(s.y, 0.4, 0.5))
    slope = 1.6 + 0.5 * (1 - np.exp(-1.2 * np.clip(a - 0.5, 0, None))) + 0.1 * np.clip(a - 1.2, 0, None) ** 2
    depth = 0.55 * (1 - a / 0.7) if p.collar == "v" else 0.42 * np.sqrt(np.clip(1 - (a / 0.72) ** 2, 0, 1))
    cover = s.y - slope - np.where(a < 0.72, depth, 0)
    folds_ = 0.5 * np.sqrt(np.clip(1 - (s.x / 2.4) ** 2, 0, 1)) + 0.05 * clouds(p.seed, s.x * 3, s.y * 1.5, 2)
    light, _ = lit(s, folds_, 0, (0.1, 0.1, 0.1))
    weave = 1 + 0.08 * noise(p.seed + 5, s.x * 60, s.y * 60)
    hem = 1 - 0.35 * np.exp(-np.abs(cover - 0.07) / 0.02) * (cover < 0.1)
    s.paint(linear(p.cloth) * light * (weave * hem)[..., None], s.edge(cover))


def ears(s: Scene) -> None:
    """Two ears, behind the head."""
    p = s.person
    a = np.abs(s.x + 0.1 * np.sin(s.view.yaw)) - p.width * 1.0
    b = s.y - 0.16
    shape = 1 - (a / 0.15) ** 2 - (b / (0.34 - 0.1 * a)) ** 2
    hollow = bump(a - 0.03, b - 0.0, 0.05, 0.16)
    light, _ = lit(s, 0.15 * np.clip(shape, 0, 1) ** 0.5 - 0.06 * hollow, 0, (0.5, 0.3, 0.25))
    tint = linear(p.skin) * np.array([1.0, 0.85, 0.8], np.float32)
    s.paint(tint * light * (0.8 - 0.45 * hollow)[..., None], s.edge(shape * 0.15))


def complexion(s: Scene) -> Field:
    """The colour of the bare skin, `(H, W, 3)`."""
    p, u, v = s.person, s.u, s.v
    tone = np.repeat(linear(p.skin)[None, None], u.shape[0], 0).repeat(u.shape[1], 1)
    tone *= (1 + 0.10 * clouds(p.seed, u * 5 + 20, v * 5 + 20))[..., None]
    tone *= (1 + 0.07 * noise(p.seed + 3, u * 45 + 200, v * 45 + 200))[..., None]
    red = bump(np.abs(u) - 0.55, v - 0.45, 0.25, 0.2) + 0.7 * bump(u, v - p.nose_tip, 0.16, 0.12)
    tone *= 1 - (p.blush * red)[..., None] * np.array([0.0, 0.35, 0.3], np.float32)
    dark = bump(np.abs(u) - p.eye_gap, v - 0.1, 0.2, 0.09) * (0.16 + 0.2 * p.age)
    tone *= 1 - dark[..., None] * np.array([0.8, 1, 0.9], np.float32)
    spots = step(noise(p.seed + 7, u * 17 + 90, v * 17 + 90), 0.35, 0.75) * bump(u, v - 0.35, 0.62, 0.3)
    return tone * (1 - p.freckles * spots[..., None] * np.array([0.35, 0.5, 0.6], np.float32))


def stubble(s: Scene, tone: Field) -> Field:
    """Beard and moustache, mixed into the skin's colour; the chin keeps its shape."""
    p, a, v = s.person, np.abs(s.u), s.v
    cheek = 0.62 + 0.5 * np.clip(0.75 - a, 0, 1) - 0.9 * np.clip(a - 0.78, 0, 1)
    ragged = 0.06 * noise(p.seed + 11, s.u * 30 + 50, v * 12 + 50)
    jaw = step(v - cheek + ragged, -0.04, 0.14) * step(a, p.mouth_width * 0.1, p.mouth_width + 0.12)
    below = step(v - p.mouth_at - p.lip_lower - 0.07 + ragged, -0.03, 0.05)
    chin = np.maximum(jaw * step(a, p.mouth_width - 0.02, p.mouth_width + 0.1), below)
    span = p.mouth_at - p.lip_upper - 0.05
    lip = bump(v - span + 0.02 - 0.14 * a**2, a * 0, 0.055, 1) * step(a, p.mouth_width + 0.16, p.mouth_width)
    hair = np.clip(0.65 + 0.6 * noise(p.seed + 13, s.u * 38 + 70, v * 11 + 70), 0.15, 1)
    amount = np.maximum(p.beard * chin, p.moustache * lip * 1.2)
    colour = linear(p.brow or p.hair) * (0.5 + 0.8 * hair)[..., None]
    return tone + (colour - tone) * (np.clip(amount * (0.55 + 0.6 * hair), 0, 0.96))[..., None]


def brows(s: Scene, tone: Field) -> Field:
    """Eyebrows of short hairs."""
    p, a = s.person, np.abs(s.u)
    t = (a - p.eye_gap) / (p.eye_size * 1.5)
    line = -p.brow_lift - p.brow_arch * (1 - np.where(t > 0.4, 1.2, 0.5) * (t - 0.4) ** 2) - p.brow_tilt * t
    thick = p.brow_size * np.clip(1 - 0.45 * (t + 0.2), 0.2, 1.2)
    hairs = noise(p.seed + 17, (a + 0.5 * s.v) * 55 + 30, (s.v - line) * 20 + 30)
    shape = np.exp(-0.5 * ((s.v - line) / thick) ** 4) * step(np.abs(t), 1.08, 0.8)
    alpha = np.clip(shape * (0.8 + 0.4 * hairs), 0, 0.95)
    return tone + (linear(p.brow or p.hair) * 0.7 - tone) * alpha[..., None]


def mouth_line(s: Scene) -> Field:
    """Where the lips meet, as v over u."""
    p, w = s.person, s.view
    return p.mouth_at - (0.055 + 0.1 * w.smile) * (s.u / p.mouth_width) ** 2 + 0.009 * np.cos(s.u * 12)


def lips(s: Scene, tone: Field) -> Field:
    """Lips, the line between them, and teeth in an open smile."""
    p, w = s.person, s.view
    t = s.u / (p.mouth_width * (1 + 0.18 * w.smile))
    open_ = 0.11 * w.teeth * np.clip(1 - t**2, 0, 1)
    high, low = s.v - mouth_line(s) + open_ * 0.4, s.v - mouth_line(s) - open_ * 0.6
    bow = np.clip(1 - np.abs(t) ** 1.6, 0, 1) * (1 - 0.22 * np.exp(-((t / 0.13) ** 2)))
    upper = np.minimum(high + p.lip_upper * bow * 1.2, -high)
    lower = np.minimum(p.lip_lower * np.clip(1 - t**2, 0, 1) ** 0.7 - low, low)
    colour = linear(p.lips) * (1 + 0.2 * noise(p.seed + 19, s.u * 40 + 10, s.v * 6 + 10))[..., None]
    within = step(np.abs(t), 1.0, 0.86)
    tone = tone + (colour * 0.8 - tone) * (0.85 * within * s.edge(upper, 4))[..., None]
    tone = tone + (colour * 1.1 - tone) * (0.85 * within * s.edge(lower, 5))[..., None]
    gap = np.minimum(-low, high)
    inner = s.edge(gap + 0.006, 2) * step(np.abs(t), 1.05, 0.9)
    white = step(gap, 0.0, 0.02) * step(low, 0.0, -0.03) * step(np.abs(t), 0.95, 0.6)
    white = white * (1 - 0.25 * np.exp(-((np.abs(np.sin(s.u * 26)) / 0.16) ** 2)))
    cave = linear((60, 20, 20)) + (linear((225, 215, 200)) - linear((60, 20, 20))) * (0.85 * white)[..., None]
    return tone + (cave - tone) * (inner * np.clip(0.75 + w.teeth, 0, 1))[..., None]


def nostrils(s: Scene, tone: Field) -> Field:
    """Two dark openings under the tip of the nose."""
    p = s.person
    a = np.abs(s.u) - p.nose_width * 0.52
    hole = bump(a, s.v - p.nose_tip - 0.085 + 0.3 * a, p.nose_width * 0.24, 0.022)
    wing = bump(np.abs(s.u) - p.nose_width * 1.3, s.v - p.nose_tip - 0.03, 0.025, 0.07)
    return tone * (1 - 0.85 * hole - 0.3 * wing)[..., None]


def eyelids(s: Scene) -> tuple[Field, Field, Field]:
    """Across the eye (-1 inner to 1 outer corner), and signed distances from the upper and the lower lid."""
    p, w = s.person, s.view
    t = (np.abs(s.u) - p.eye_gap) / p.eye_size
    middle = s.v + p.eye_tilt * t * p.eye_size
    arch = np.clip(1 - np.abs(t) ** 2.2, 0, 1)
    upper = middle + p.eye_open * arch * (1 - 0.12 * t) * (1 - 0.15 * w.smile)
    lower = 0.62 * p.eye_open * np.clip(1 - (t - 0.1) ** 2, 0, 1) * (1 - 0.3 * w.smile) - middle
    return t, upper, lower


def eyes(s: Scene) -> None:
    """White, iris, pupil, highlight, lashes and the fold of the lid, over the lit skin."""
    p, w = s.person, s.view
    t, upper, lower = eyelids(s)
    inside = s.edge(np.minimum(upper, lower), 2.5) * (np.abs(t) < 1)
    side = np.sign(s.u)
    du, dv = s.u - side * p.eye_gap - 0.05 * w.gaze, s.v + 0.012
    r = np.hypot(du, dv) / (0.47 * p.eye_size + 0.012)
    shade = (0.35 + 0.65 * step(upper, 0.0, 0.07)) * (1 - 0.35 * np.abs(t) ** 3)
    white = linear((226, 218, 212)) * 0.75 * shade[..., None] * w.exposure
    rays = 1 + 0.35 * noise(p.seed + 23, np.arctan2(dv, du) * 9 + 40, r * 3 + 40)
    ring = (0.55 + 0.7 * r**2) * rays * (1 - 0.8 * step(r, 0.8, 1.0))
    iris = linear(p.iris) * (ring * shade)[..., None] * 1.1
    ball = white + (iris - white) * step(r, 1.06, 0.94)[..., None]
    ball = ball * (1 - 0.97 * step(r, 0.46, 0.36))[..., None]
    spark = bump(du + 0.035 * np.sign(-w.light[0] or 1), dv + 0.035, 0.014, 0.014)
    s.paint(ball + 0.9 * spark[..., None], inside)
    lash = np.exp(-np.abs(upper) / (0.014 + 0.012 * p.makeup)) * (np.abs(t) < 1.05) * (0.65 + 0.3 * step(t, -0.8, 0.9))
    s.paint(linear((24, 16, 14)) * np.ones(3, np.float32), lash * step(s.z, 0.1, 0.3))
    rim = 0.35 * np.exp(-np.abs(lower) / 0.014) * (np.abs(t) < 1)
    s.picture *= 1 - rim[..., None] * np.array([0.5, 0.8, 0.8], np.float32)
    lid = step(upper, -0.13, -0.02) * step(-upper, -0.01, 0.02) * step(np.abs(t), 1.2, 0.7)
    s.picture *= 1 - (0.5 * p.makeup * lid)[..., None] * np.array([0.7, 0.9, 0.7], np.float32)
    crease = p.fold * np.exp(-np.abs(upper + 0.05 - 0.02 * p.age) / 0.016) * (np.abs(t) < 1.12)
    s.picture *= 1 - 0.55 * crease[..., None] * np.array([0.8, 1, 1], np.float32)


def head(s: Scene) -> None:
    """The skin with everything painted on it, then lit."""
    tone = lips(s, nostrils(s, brows(s, stubble(s, complexion(s)))))
    p, w = s.person, s.view
    mouth = s.v - mouth_line(s)
    t = s.u / p.mouth_width
    rise = 0.05 * (bump(mouth + 0.5 * p.lip_upper, t, 0.03, 0.5) + 1.2 * bump(mouth - 0.55 * p.lip_lower, t, 0.04, 0.5))
    pores = 0.0016 * noise(p.seed + 29, s.u * 30 + 300, s.v * 30 + 300)
    height = s.z * np.cos(w.yaw) - s.u * np.sin(w.yaw) - s.v * np.sin(w.pitch) + rise + pores
    light, shine = lit(s, height, 0.13, (0.4, 0.26, 0.2))
    bare = np.clip(tone.mean(-1) / linear(p.skin).mean(), 0, 1.2) ** 2
    sheen = shine * bare * (1 + 0.25 * noise(p.seed + 31, s.u * 30 + 60, s.v * 30 + 60))
    alpha = s.edge(outline(p, s.u, s.v) * 0.4)
    fall = blurred(np.roll(alpha, int(0.2 / s.pixel), 0), 0.13 / s.pixel)
    s.picture *= 1 - 0.6 * (fall * (np.abs(s.x) < 1.2) * step(s.y, 0.5, 0.9))[..., None]
    s.paint(tone * light + np.clip(sheen, 0, None)[..., None], alpha)
    eyes(s)


# Hair


def strands(s: Scene) -> Field:
    """Noise drawn out along the hair, -1..1."""
    p, u, v = s.person, s.x, s.y
    wave = 0.5 * p.curl * noise(p.seed + 37, u * 2.2 + 30, v * 2.2 + 30)
    if p.swept:
        across, along = np.arctan2(u - p.part, 0.7 - v) * 1.5 + wave, np.hypot(u, 0.7 - v)
    else:
        across = (u - p.part) / np.sqrt(np.clip(v + p.crown + p.volume, 0, None) + 0.12) + wave
        along = v
    fine = noise(p.seed + 41, across * 46 + 500, along * 3 + 500)
    locks = noise(p.seed + 43, across * 13 + 500, along * 1.6 + 500)
    tight = clouds(p.seed + 47, u * 13 + 500, v * 13 + 500, 2)
    return np.where(p.curl > 0.8, tight, 0.5 * fine + 0.6 * locks)


def cap(s: Scene) -> Field:
    """Signed extent of the hair's outer silhouette, positive inside."""
    p = s.person
    wide, high = p.width + p.volume, p.crown + 0.1 + p.volume
    low = max(p.length, 0.45)
    below = s.y > -0.25
    rise = np.where(below, np.clip((s.y + 0.25) / (low + 0.25), 0, None) ** (6 if p.length else 3), ((s.y + 0.25) / (high - 0.25)) ** 2)
    flare = 1 + 0.12 * p.length * step(s.y, 0, 1.5)
    return 1 - np.abs(s.x / (wide * flare)) ** 2.3 - rise


def hairline(s: Scene) -> Field:
    """Signed distance behind the hairline, an arch from sideburn to sideburn: positive where hair grows."""
    p, a = s.person, np.abs(s.u)
    foot = max(p.sideburn, p.length)
    arch = np.clip(1 - (a / (0.9 * p.width)) ** p.arch, 0, 1) ** (1 / p.arch)
    line = np.where(s.v < p.sideburn, p.sideburn - (p.sideburn - p.hairline) * arch, foot * (arch <= 0) - 9 * (arch > 0))
    line = line - p.temple * bump(a - 0.55, s.v * 0, 0.16, 1) + 0.2 * p.part * s.u
    if p.bald:
        line = np.where(a > 0.8 * p.width, p.sideburn, -9.0) - 9 * (s.v < -0.8)
    return line - s.v


def hair_paint(s: Scene, grain: Field, height: Field) -> Field:
    """Colour of lit hair, with a band of gloss across the strands."""
    light, _ = lit(s, height, 0, (0.2, 0.2, 0.2))
    band = bump(s.y + 0.95 - 0.25 * s.x**2, s.x * 0, 0.22, 1) + 0.5 * bump(s.y - 0.5, s.x * 0, 0.35, 1)
    gloss = 0.05 * band * np.clip(0.4 + grain, 0, 1) * (0 if s.person.curl > 0.8 else 1)
    colour = linear(s.person.hair) * (np.clip(0.75 + 0.55 * grain, 0.15, 1.6))[..., None]
    return colour * light + gloss[..., None] * (0.4 + linear(s.person.hair))


def back_hair(s: Scene) -> None:
    """What is seen of long hair behind the neck."""
    if s.person.length:
        grain = strands(s)
        dark = hair_paint(s, grain, 0.3 * np.clip(cap(s), 0, 1)) * 0.45
        s.paint(dark, s.edge(cap(s) * 0.5 + 0.03 * grain, 3))


def front_hair(s: Scene) -> None:
    """Hair on the head, with its shadow on the forehead."""
    p, grain = s.person, strands(s)
    rough = 0.05 + 0.05 * p.curl + 0.1 * p.fringe
    inside = np.minimum(cap(s) * 0.5 + 0.04 * grain, hairline(s) * 0.8 + rough * grain)
    if p.length:
        curtain = np.abs(s.x) - p.width * (0.84 + 0.03 * s.y) + 0.12 * p.curl * np.sin(4 * s.y + 2 * np.sign(s.x))
        side = np.minimum(curtain + 0.03 * grain, cap(s) * 0.5 + 0.03 * grain)
        inside = np.maximum(inside, np.where(s.y > -0.6, side, -1))
    alpha = s.edge(inside, 5)
    fall = blurred(np.roll(alpha, int(0.06 / s.pixel), 0), 0.05 / s.pixel)
    s.picture *= 1 - 0.45 * (fall * (1 - alpha) * s.edge(outline(p, s.u, s.v)))[..., None]
    height = 0.8 * np.clip(cap(s), 0, 1) ** 0.5 + 0.05 * grain
    s.paint(hair_paint(s, grain, height), alpha)


def scarf(s: Scene) -> None:
    """A headscarf, around the face and over the shoulders."""
    p = s.person
    opening = 1 - np.abs(s.u / (0.9 * p.width)) ** 2.3 - np.abs((s.v - 0.18) / 1.13) ** 2.4
    wide = 1.17 * p.width + 0.5 * step(s.y, 0.9, 2.1)
    top = 1 - np.abs(s.x / wide) ** 2.4 - np.where(s.y < 0, np.abs(s.y / (p.crown + 0.12)) ** 2.2, 0)
    inside = np.minimum(top * 0.5, -opening * 0.4)
    drape = np.sin(14 * np.hypot(s.x, s.y - 0.3) + 3 * clouds(p.seed, s.x * 2 + 8, s.y * 2 + 8, 2) + 2 * s.x)
    height = 0.8 * np.clip(top, 0, 1) ** 0.5 + 0.02 * drape
    light, _ = lit(s, height, 0, (0.15, 0.15, 0.15))
    alpha = s.edge(inside, 3)
    fall = blurred(alpha, 0.06 / s.pixel)
    s.picture *= 1 - 0.5 * (fall * (1 - alpha) * s.edge(opening))[..., None]
    weave = 1 + 0.05 * noise(p.seed + 51, s.x * 70, s.y * 70)
    s.paint(linear(p.scarf or p.cloth) * light * weave[..., None], alpha)


def glasses(s: Scene) -> None:
    """Frames, a tint and a reflection."""
    p = s.person
    x = s.x - 0.95 * np.sin(s.view.yaw)
    y = s.y - 0.95 * np.sin(s.view.pitch) - 0.07
    a = np.abs(x) - p.eye_gap - 0.02
    ring = (np.abs(a / 0.35) ** 3 + np.abs(y / 0.28) ** 3) ** (1 / 3) - 1
    frame = 0.024 - np.abs(ring) * 0.3
    bridge = np.minimum(0.022 - np.abs(y + 0.06 - 0.25 * x**2), 0.15 - np.abs(x))
    arms = np.minimum(0.022 - np.abs(y + 0.1), np.minimum(np.abs(x) - p.eye_gap - 0.35, p.width * 1.02 - np.abs(x)))
    shape = np.maximum(np.maximum(frame, bridge), arms)
    s.picture *= 1 - 0.3 * blurred(np.roll(s.edge(shape), int(0.06 / s.pixel), 0), 0.03 / s.pixel)[..., None]
    s.picture += 0.03 * (s.edge(-ring * 0.3) * step(np.sin(5 * (x + y)), 0.3, 0.9))[..., None]
    light, shine = lit(s, np.clip(shape, 0, 0.03) * 2, 0.3, (0.2, 0.2, 0.2))
    s.paint(linear(p.glasses or p.hair) * light + shine[..., None], s.edge(shape, 2))


def photograph(s: Scene) -> Image.Image:
    """Exposure, tone curve, lens blur, grain."""
    bright = np.clip(s.picture * s.view.exposure, 0, None)
    tone = np.clip(bright / (0.75 + 0.3 * bright), 0, 1) ** np.float32(1 / 2.2)
    small = tone.reshape(s.view.size, OVERSAMPLE, s.view.size, OVERSAMPLE, 3).mean((1, 3))
    grain = np.random.default_rng(s.view.seed).normal(0, 1, small.shape).astype(np.float32)
    picture = Image.fromarray(np.uint8(np.clip(small * 255 + 0.5, 0, 255)))
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6)), np.float32)
    return Image.fromarray(np.uint8(np.clip(soft + 2.2 * grain + 0.5, 0, 255)))


def draw(person: Person, view: View) -> Image.Image:
    """One picture of `view.size` squared, RGB."""
    s = stage(person, view)
    backdrop(s)
    if not person.scarf:
        back_hair(s)
    body(s)
    ears(s)
    head(s)
    if person.scarf:
        scarf(s)
    else:
        front_hair(s)
    if person.glasses:
        glasses(s)
    return photograph(s)
