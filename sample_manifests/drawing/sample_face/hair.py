"""What is on a head: hair of many kinds, a headscarf, glasses."""

from __future__ import annotations

import numpy as np

from .scene import Field, Scene, blurred, hill, linear, lit, outline, shine, step

HAIR_WRAP = (0.2, 0.2, 0.2)
FRIZZY = 0.8


def strands(s: Scene) -> Field:
    """Noise drawn out along the hair, -1..1."""
    p, x, y = s.person, s.x, s.y
    if p.curl > FRIZZY:
        return 0.7 * s.noise(47, x * 13 + 500, y * 13 + 500) + 0.4 * s.noise(48, x * 26 + 500, y * 26 + 500)
    wave = 0.5 * p.curl * s.noise(37, x * 2.2 + 30, y * 2.2 + 30)
    if p.swept:
        across, along = np.arctan2(x - p.part, 0.7 - y) * 1.5 + wave, np.hypot(x, 0.7 - y)
    else:
        across = (x - p.part) / np.sqrt(np.clip(y + p.crown + p.volume, 0, None) + 0.12) + wave
        along = y
    fine = s.noise(41, across * 46 + 500, along * 3 + 500)
    return 0.5 * fine + 0.6 * s.noise(43, across * 13 + 500, along * 1.6 + 500)


def silhouette(s: Scene) -> Field:
    """Positive inside the hair's outer line, 1 at its middle."""
    p = s.person
    low, bottom = (p.length, 5) if p.length else (0.45 + 0.5 * p.volume, 3)
    under = np.clip((s.y + 0.25) / (low + 0.25), 0, None) ** bottom
    over = np.abs((s.y + 0.25) / (p.crown + p.volume - 0.15)) ** 2.1
    wide = (p.width + p.volume) * (1 + 0.12 * p.length * step(s.y, 0, 1.5))
    return 1 - np.abs(s.x / wide) ** 2.3 - np.where(s.y > -0.25, under, over)


def hairline(s: Scene) -> Field:
    """Signed distance behind the hairline, an arch from sideburn to sideburn: positive where hair grows."""
    p, a = s.person, np.abs(s.u)
    if p.bald:
        return np.minimum(np.minimum(a - 0.84 * p.width, p.sideburn - s.v), s.v + 0.75)
    arch = np.clip(1 - (a / (0.9 * p.width)) ** p.arch, 0, 1) ** (1 / p.arch)
    line = p.sideburn - (p.sideburn - p.hairline) * arch
    line = line - p.temple * hill(a - 0.55, 0.16) + 0.2 * p.part * s.u
    return np.where(s.v < p.sideburn, line - s.v, -1)


def coloured(s: Scene, grain: Field, height: Field) -> Field:
    """Lit hair, with bands of gloss across the strands."""
    band = hill(s.y + 0.95 - 0.25 * s.x**2, 0.22) + 0.5 * hill(s.y - 0.5, 0.35)
    gloss = 0.05 * band * np.clip(0.4 + grain, 0, 1) * (s.person.curl <= FRIZZY)
    own = linear(s.person.hair)
    tone = own * np.clip(0.75 + 0.55 * grain, 0.15, 1.6)[..., None]
    return tone * lit(s, height, HAIR_WRAP) + gloss[..., None] * (0.4 + own)


def back_hair(s: Scene) -> None:
    """What is seen of long hair, or of a headscarf, behind the neck."""
    if s.person.scarf:
        s.paint(linear(s.person.scarf) * 0.15, s.edge(wrapped(s)))
    if not s.person.length:
        return
    grain, inside = strands(s), silhouette(s)
    dark = coloured(s, grain, 0.3 * np.clip(inside, 0, 1)) * 0.45
    s.paint(dark, s.edge(inside * 0.5 + 0.03 * grain, 3))


def curtains(s: Scene, grain: Field) -> Field:
    """Signed distance inside long hair beside the face."""
    p = s.person
    inner = p.width * (0.84 + 0.03 * s.y) + 0.3 * step(s.y, p.length - 0.9, p.length)
    inner = inner - 0.12 * p.curl * np.sin(4 * s.y + 2 * np.sign(s.x)) * step(s.y, 0.2, 0.8)
    return np.where(s.y > -0.6, np.abs(s.x) - inner + 0.03 * grain, -1)


def front_hair(s: Scene) -> None:
    """Hair on the head, with its shadow on the forehead."""
    p, grain, outer = s.person, strands(s), silhouette(s)
    frayed = 0.04 if p.curl > FRIZZY else 0.015
    rough = 0.05 + 0.05 * p.curl + 0.1 * p.fringe
    grown = hairline(s) * 0.8 + rough * grain
    if p.length:
        grown = np.maximum(grown, curtains(s, grain))
    alpha = s.edge(np.minimum(outer * 0.5 + frayed * grain, grown), 5)
    fall = blurred(np.roll(alpha, int(0.06 / s.pixel), 0), 0.05 / s.pixel)
    s.darken(0.45 * fall * (1 - alpha) * s.edge(outline(p, s.u, s.v)))
    s.paint(coloured(s, grain, 0.8 * np.clip(outer, 0, 1) ** 0.5 + 0.05 * grain), alpha)


def wrapped(s: Scene) -> Field:
    """Positive inside the outer line of a headscarf, 1 at its middle."""
    p = s.person
    wide = 1.17 * p.width + 0.5 * step(s.y, 0.9, 2.1)
    over = np.where(s.y < 0, np.abs(s.y / (p.crown + 0.12)) ** 2.2, 0)
    return 1 - np.abs(s.x / wide) ** 2.4 - over


def scarf(s: Scene) -> None:
    """A headscarf, around the face and over the shoulders."""
    p, whole = s.person, wrapped(s)
    opening = 1 - np.abs(s.u / (0.9 * p.width)) ** 2.3 - np.abs((s.v - 0.18) / (p.chin - 0.29)) ** 2.4
    turns = 3 * s.noise(52, s.x * 2 + 8, s.y * 2 + 8) + 2 * s.x
    drape = np.sin(14 * np.hypot(s.x, s.y - 0.3) + turns)
    alpha = s.edge(np.minimum(whole * 0.5, -opening * 0.4), 3)
    fall = blurred(alpha, 0.06 / s.pixel)
    s.darken(0.5 * fall * (1 - alpha) * s.edge(opening))
    weave = 1 + 0.05 * s.noise(51, s.x * 70 + 300, s.y * 70 + 300)
    light = lit(s, 0.8 * np.clip(whole, 0, 1) ** 0.5 + 0.02 * drape, HAIR_WRAP)
    s.paint(linear(p.scarf or p.cloth) * light * weave[..., None], alpha)


def frames(s: Scene) -> tuple[Field, Field]:
    """Signed distance inside the frames of glasses, and inside their lenses."""
    p = s.person
    turn, nod = np.float32(s.view.yaw), np.float32(s.view.pitch)
    x, y = s.x - 0.95 * np.sin(turn), s.y - 0.07 - 0.95 * np.sin(nod)
    a = np.abs(x)
    ring = (np.abs((a - p.eye_gap - 0.02) / 0.35) ** 3 + np.abs(y / 0.28) ** 3) ** (1 / 3) - 1
    bridge = np.minimum(0.022 - np.abs(y + 0.06 - 0.25 * x**2), 0.15 - a)
    arms = np.minimum(0.022 - np.abs(y + 0.1), np.minimum(a - p.eye_gap - 0.35, p.width * 1.02 - a))
    return np.maximum(np.maximum(0.024 - np.abs(ring) * 0.3, bridge), arms), -ring * 0.3


def glasses(s: Scene) -> None:
    """Frames, their shadow, and streaks of light on the lenses."""
    shape, lens = frames(s)
    s.darken(0.3 * blurred(np.roll(s.edge(shape), int(0.06 / s.pixel), 0), 0.03 / s.pixel))
    s.picture += 0.03 * (s.edge(lens) * step(np.sin(5 * (s.x + s.y)), 0.3, 0.9))[..., None]
    height = np.clip(shape, 0, 0.03) * 2
    colour = linear(s.person.glasses or s.person.hair) * lit(s, height, HAIR_WRAP)
    s.paint(colour + 0.3 * shine(s, height)[..., None], s.edge(shape, 2))
