"""Draw one synthetic face: a head as a height map that is painted, lit and photographed with numpy."""

from __future__ import annotations

from PIL import Image

from .hair import back_hair, front_hair, glasses, scarf
from .scene import Person, View, stage
from .skin import backdrop, body, ears, eyes, head, photograph

__all__ = ["Person", "View", "draw"]


def draw(person: Person, view: View) -> Image.Image:
    """A square RGB image of `view.size` pixels; equal arguments give equal pixels."""
    scene = stage(person, view)
    backdrop(scene)
    back_hair(scene)
    body(scene)
    ears(scene)
    head(scene)
    eyes(scene)
    if person.scarf:
        scarf(scene)
    else:
        front_hair(scene)
    if person.glasses:
        glasses(scene)
    return photograph(scene)
