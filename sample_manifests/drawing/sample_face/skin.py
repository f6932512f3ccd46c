"""Everything of a picture but hair: backdrop, body, skin, brows, eyes, mouth, and the camera's own marks."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from .scene import OVERSAMPLE, Field, Scene, blurred, bump, hill, linear, lit, noise, outline, shine, step

SKIN_WRAP = (0.4, 0.26, 0.2)
CLOTH_WRAP = (0.1, 0.1, 0.1)


def backdrop(s: Scene) -> None:
    """A place out of focus: two colours, clouds, and a few discs of light."""
    top, low = (linear(c) for c in s.view.backdrop)
    drift = 0.35 * noise(s.view.seed, s.x * 0.7 + 9, s.y * 0.5 + 9)
    t = np.clip(0.5 + s.y / 4.5 + drift, 0, 1)
    s.picture = (top + (low - top) * t[..., None]).astype(np.float32)
    places = np.random.RandomState(s.view.seed).uniform((-2.3, -2.1, 0.15), (2.3, 1.2, 0.45), (6, 3))
    for x, y, radius in places.astype(np.float32):
        disc = s.edge(radius - np.hypot(s.x - x, s.y - y), 14)
        s.picture *= 1 + 0.22 * disc[..., None]


def neck_width(s: Scene) -> Field:
    """Half the width of the neck, growing into the shoulders."""
    return s.person.neck + 0.16 * step(s.y, 1.2, 1.75)


def body(s: Scene) -> None:
    """Neck, shoulders and clothes."""
    p, a = s.person, np.abs(s.x)
    neck = neck_width(s)
    round_ = 0.7 * np.sqrt(np.clip(1 - (s.x / (neck + 0.1)) ** 2, 0, 1))
    skin = linear(p.skin) * lit(s, round_, SKIN_WRAP) * (1 - 0.65 * step(s.y, 2.0, 1.15))[..., None]
    s.paint(skin, s.edge(neck - a) * step(s.y, 0.4, 0.5))
    slope = 1.6 + 0.5 * (1 - np.exp(-1.2 * np.clip(a - 0.5, 0, None))) + 0.1 * np.clip(a - 1.2, 0, None) ** 2
    pointed, rounded = 0.55 * (1 - a / 0.7), 0.42 * np.sqrt(np.clip(1 - (a / 0.7) ** 2, 0, 1))
    cover = s.y - slope - np.clip(pointed if p.collar == "v" else rounded, 0, None)
    drape = 0.5 * np.sqrt(np.clip(1 - (s.x / 2.4) ** 2, 0, 1)) + 0.06 * s.noise(5, s.x * 3 + 9, s.y * 1.5 + 9)
    weave = 1 + 0.08 * s.noise(6, s.x * 60 + 300, s.y * 60 + 300) - 0.3 * hill(cover - 0.07, 0.012)
    s.paint(linear(p.cloth) * lit(s, drape, CLOTH_WRAP) * weave[..., None], s.edge(cover))


def ears(s: Scene) -> None:
    """Two ears, behind the head."""
    a = np.abs(s.x + 0.1 * np.float32(np.sin(s.view.yaw))) - s.person.width
    b = s.y - 0.16
    shape = 1 - (a / 0.15) ** 2 - (b / (0.34 - 0.1 * a)) ** 2
    hollow = bump(a - 0.04, b, 0.05, 0.16)
    light = lit(s, 0.15 * np.clip(shape, 0, 1) ** 0.5 - 0.06 * hollow, SKIN_WRAP)
    tint = linear(s.person.skin) * np.array([0.85, 0.72, 0.68], np.float32)
    s.paint(tint * light * (1 - 0.5 * hollow)[..., None], s.edge(shape * 0.15))


def complexion(s: Scene) -> Field:
    """The colour of bare skin: blotches, grain, blush, rings under the eyes, freckles."""
    p, u, v = s.person, s.u, s.v
    blotch = 1 + 0.08 * s.noise(10, u * 5 + 20, v * 5 + 20) + 0.05 * s.noise(11, u * 11 + 40, v * 11 + 40)
    tone = linear(p.skin) * (blotch + 0.05 * s.noise(12, u * 45 + 200, v * 45 + 200))[..., None]
    red = bump(np.abs(u) - 0.55, v - 0.45, 0.25, 0.2) + 0.7 * bump(u, v - p.nose_tip, 0.16, 0.12)
    tone = tone * (1 - (p.blush * red)[..., None] * np.array([0.0, 0.35, 0.3], np.float32))
    ring = bump(np.abs(u) - p.eye_gap, v - 0.1, 0.2, 0.09) * (0.16 + 0.2 * p.age)
    tone = tone * (1 - ring[..., None] * np.array([0.8, 1, 0.9], np.float32))
    spots = step(s.noise(13, u * 17 + 90, v * 17 + 90), 0.35, 0.75) * bump(u, v - 0.35, 0.62, 0.3)
    return tone * (1 - p.freckles * spots[..., None] * np.array([0.35, 0.5, 0.6], np.float32))


def beard(s: Scene, tone: Field) -> Field:
    """Beard and moustache, mixed into the skin's colour."""
    p, a, v = s.person, np.abs(s.u), s.v
    ragged = 0.06 * s.noise(15, s.u * 30 + 50, v * 12 + 50)
    cheek = 0.62 + 0.5 * np.clip(0.75 - a, 0, 1) - 0.9 * np.clip(a - 0.78, 0, 1)
    jaw = step(v - cheek + ragged, -0.04, 0.14) * step(a, p.mouth_width - 0.02, p.mouth_width + 0.1)
    chin = np.maximum(jaw, step(v - p.mouth_at - p.lip_lower - 0.07 + ragged, -0.03, 0.05))
    above = v - p.mouth_at + p.lip_upper + 0.07 - 0.14 * a**2
    lip = hill(above, 0.055) * step(a, p.mouth_width + 0.14, p.mouth_width - 0.02)
    hairs = np.clip(0.65 + 0.6 * s.noise(16, s.u * 38 + 70, v * 11 + 70), 0.15, 1)
    amount = np.maximum(p.beard * chin, p.moustache * lip * 1.2)
    colour = linear(p.brow or p.hair) * (0.5 + 0.8 * hairs)[..., None]
    return tone + (colour - tone) * np.clip(amount * (0.55 + 0.6 * hairs), 0, 0.96)[..., None]


def brows(s: Scene, tone: Field) -> Field:
    """Eyebrows of short hairs."""
    p, a = s.person, np.abs(s.u)
    t = (a - p.eye_gap) / (p.eye_size * 1.5)
    arch = 1 - np.where(t > 0.35, 1.8, 0.6) * (t - 0.35) ** 2
    above = s.v + p.brow_lift + p.brow_arch * arch + p.brow_tilt * t
    thick = p.brow_size * np.clip(1 - 0.5 * t, 0.2, 1.2) * (0.55 + 0.45 * step(t, -1.05, -0.5))
    hairs = s.noise(17, (a + 0.5 * s.v) * 55 + 90, above * 20 + 30)
    shape = np.exp(-0.5 * np.abs(above / thick) ** 3) * step(np.abs(t), 1.1, 0.75)
    alpha = np.clip(shape * (0.8 + 0.4 * hairs), 0, 0.95)[..., None]
    return tone + (linear(p.brow or p.hair) * 0.7 - tone) * alpha


def nostrils(s: Scene, tone: Field) -> Field:
    """Two openings under the tip of the nose, and the crease of its wings."""
    p = s.person
    a = np.abs(s.u) - p.nose_width * 0.52
    hole = bump(a, s.v - p.nose_tip - 0.085 + 0.3 * a, p.nose_width * 0.24, 0.022)
    wing = bump(np.abs(s.u) - p.nose_width * 1.3, s.v - p.nose_tip - 0.03, 0.025, 0.07)
    return tone * (1 - 0.85 * hole - 0.3 * wing)[..., None]


def below_mouth(s: Scene) -> Field:
    """How far below the line between the lips."""
    t = s.u / s.person.mouth_width
    return s.v - s.person.mouth_at + (0.07 + 0.1 * s.view.smile) * t**2 - 0.009 * np.cos(s.u * 12)


def lips(s: Scene, tone: Field) -> Field:
    """Lips and, between them, a line or teeth."""
    p, w = s.person, s.view
    t = s.u / (p.mouth_width * (1 + 0.12 * w.smile))
    gape = 0.11 * w.teeth * np.clip(1 - t**2, 0, 1)
    high, low = below_mouth(s) + gape * 0.4, below_mouth(s) - gape * 0.6
    bow = np.clip(1 - np.abs(t) ** 1.6, 0, 1) * (1 - 0.22 * hill(t, 0.09))
    upper = np.minimum(high + p.lip_upper * bow * 1.2, -high)
    lower = np.minimum(p.lip_lower * np.clip(1 - t**2, 0, 1) ** 0.7 - low, low)
    colour = linear(p.lips) * (1 + 0.2 * s.noise(19, s.u * 40 + 90, s.v * 6 + 10))[..., None]
    within = 0.85 * step(np.abs(t), 1.0, 0.86)
    tone = tone + (colour * 0.8 - tone) * (within * s.edge(upper, 4))[..., None]
    tone = tone + (colour * 1.1 - tone) * (within * s.edge(lower, 5))[..., None]
    inner = s.edge(np.minimum(-low, high) + 0.006, 2) * step(np.abs(t), 1.05, 0.9)
    return tone + (teeth(s, t, high, low) - tone) * (inner * min(0.75 + w.teeth, 1))[..., None]


def teeth(s: Scene, t: Field, high: Field, low: Field) -> Field:
    """The colour inside the mouth; `high` and `low` say how far below the upper and the lower lip."""
    white = step(np.minimum(-low, high), 0.0, 0.02) * step(low, 0.0, -0.03) * step(np.abs(t), 0.95, 0.6)
    white = white * (1 - 0.25 * hill(np.sin(s.u * 26), 0.11))
    cave, enamel = linear((60, 20, 20)), linear((225, 215, 200))
    return cave + (enamel - cave) * (0.85 * white)[..., None]


def head(s: Scene) -> None:
    """The shadow on the neck, then skin with all that is painted on it, lit."""
    p, w = s.person, s.view
    tone = lips(s, nostrils(s, brows(s, beard(s, complexion(s)))))
    below, t = below_mouth(s), s.u / p.mouth_width
    turn, nod = np.float32(w.yaw), np.float32(w.pitch)
    height = s.z * np.cos(turn) - s.u * np.sin(turn) - s.v * np.sin(nod)
    height = height + 0.05 * bump(below + 0.5 * p.lip_upper, t, 0.03, 0.5)
    height = height + 0.06 * bump(below - 0.55 * p.lip_lower, t, 0.04, 0.5)
    height = height + 0.0016 * s.noise(29, s.u * 30 + 300, s.v * 30 + 300)
    bare = np.clip(tone.mean(-1) / linear(p.skin).mean(), 0, 1.2) ** 2
    gloss = 0.09 * shine(s, height) * bare * (1 + 0.2 * s.noise(31, s.u * 30 + 60, s.v * 30 + 60))
    alpha = s.edge(outline(p, s.u, s.v) * 0.4)
    fall = blurred(np.roll(alpha, int(0.2 / s.pixel), 0), 0.13 / s.pixel)
    s.darken(0.6 * fall * s.edge(neck_width(s) - np.abs(s.x)) * step(s.y, 0.5, 0.9))
    s.paint(tone * lit(s, height, SKIN_WRAP) + gloss[..., None], alpha)


def eyes(s: Scene) -> None:
    """Eyeballs, lashes, and the fold and colour of the lids, over the lit skin."""
    p, w = s.person, s.view
    t = (np.abs(s.u) - p.eye_gap) / p.eye_size
    middle = s.v + p.eye_tilt * t * p.eye_size
    arch = np.clip(1 - np.abs(t) ** 2.2, 0, 1)
    upper = middle + p.eye_open * arch * (1 - 0.12 * t) * (1 - 0.15 * w.smile)
    lower = 0.62 * p.eye_open * np.clip(1 - (t - 0.1) ** 2, 0, 1) * (1 - 0.3 * w.smile) - middle
    s.paint(eyeballs(s, t, upper), s.edge(np.minimum(upper, lower), 2.5) * (np.abs(t) < 1))
    lash = np.exp(-np.abs(upper) / (0.014 + 0.012 * p.makeup)) * (0.65 + 0.3 * step(t, -0.8, 0.9))
    s.paint(linear((24, 16, 14)), lash * step(np.abs(t), 1.08, 1.0) * step(s.z, 0.1, 0.3))
    s.darken(0.35 * np.exp(-np.abs(lower) / 0.014) * (np.abs(t) < 1), (0.5, 0.8, 0.8))
    lid = step(upper, -0.13, -0.02) * step(upper, 0.01, -0.02) * step(np.abs(t), 1.2, 0.7)
    s.darken(0.5 * p.makeup * lid, (0.7, 0.9, 0.7))
    crease = np.exp(-np.abs(upper + 0.05 - 0.02 * p.age) / 0.016) * step(np.abs(t), 1.15, 1.0)
    s.darken(0.55 * p.fold * crease, (0.8, 1, 1))


def eyeballs(s: Scene, t: Field, upper: Field) -> Field:
    """White, iris, pupil and highlight, in the shade of the upper lid."""
    p, w = s.person, s.view
    side, dv = s.u - np.sign(s.u) * p.eye_gap - 0.05 * w.gaze, s.v + 0.012
    r = np.hypot(side, dv) / (0.47 * p.eye_size + 0.012)
    shade = (0.35 + 0.65 * step(upper, 0.0, 0.07)) * (1 - 0.35 * np.abs(t) ** 3)
    white = linear((226, 218, 212)) * (0.75 * shade)[..., None]
    rays = 1 + 0.35 * s.noise(23, np.arctan2(dv, side) * 9 + 40, r * 3 + 40)
    ring = (0.55 + 0.7 * r**2) * rays * (1 - 0.8 * step(r, 0.8, 1.0))
    ball = white + (linear(p.iris) * (1.1 * ring * shade)[..., None] - white) * step(r, 1.06, 0.94)[..., None]
    spark = bump(side - 0.035 * np.sign(w.light[0]), dv + 0.035, 0.014, 0.014)
    return ball * (1 - 0.97 * step(r, 0.46, 0.36))[..., None] + 0.9 * spark[..., None]


def photograph(s: Scene) -> Image.Image:
    """What a camera adds: exposure and tone curve, fewer pixels, a soft lens, grain."""
    bright = np.clip(s.picture * s.view.exposure, 0, None)
    tone = np.clip(bright / (0.75 + 0.3 * bright), 0, 1) ** np.float32(1 / 2.2)
    small = tone.reshape(s.view.size, OVERSAMPLE, s.view.size, OVERSAMPLE, 3).mean((1, 3))
    picture = Image.fromarray(np.uint8(small * 255 + 0.5))
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6)), np.float32)
    grain = np.random.RandomState(s.view.seed).normal(0, 2.2, soft.shape)
    return Image.fromarray(np.uint8(np.clip(soft + grain + 0.5, 0, 255)))
