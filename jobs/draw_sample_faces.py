"""Draws `sample_manifests/`: 24 faces of 8 people who do not exist, and a manifest for every way to fail.

    python jobs/draw_sample_faces.py [-o sample_manifests]

Seeded: on one version of Pillow and pyarrow the same bytes come out each time. The people's figures were
searched for once, so that the vggface2 backbone tells them apart about as well as it does real people.
"""

from __future__ import annotations

import argparse
import csv
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter
from sample_face import Person, View, draw

Row = tuple[str, str, "int | None"]

PEOPLE = {
    "ada": Person(
        seed=1, skin=(236, 196, 174), hair=(120, 52, 24), iris=(70, 120, 80), lips=(196, 96, 92), cloth=(60, 110, 100),
        length=2.3, curl=0.35, part=0.2, volume=0.16, neck=0.5,
        width=0.96, jaw=2.0, taper=0.2, eye_open=0.105, eye_size=0.22, freckles=0.7, nose_width=0.14,
        brow_arch=0.1, lip_upper=0.07, lip_lower=0.1, makeup=0.3,
    ),
    "bola": Person(
        seed=2, skin=(104, 66, 46), hair=(16, 13, 12), iris=(44, 26, 16), lips=(120, 70, 62), cloth=(190, 180, 150),
        hairline=-0.98, volume=0.04, curl=1.0, neck=0.66,
        width=1.02, jaw=3.0, taper=0.08, nose_width=0.23, lip_upper=0.09, lip_lower=0.13,
        beard=0.75, moustache=0.7, brow_size=0.055, eye_open=0.08, blush=0.1,
    ),
    "chen": Person(
        seed=3, skin=(238, 206, 178), hair=(20, 18, 20), iris=(40, 24, 18), lips=(200, 110, 104), cloth=(40, 50, 90),
        hairline=-0.42, fringe=0.5, length=1.35, volume=0.14, neck=0.5,
        width=1.03, jaw=2.1, chin=1.34, eye_open=0.065, eye_tilt=0.08, fold=0.2, nose_high=0.24, brow_lift=0.27,
        brow_size=0.035, makeup=0.2,
    ),
    "dan": Person(
        seed=4, skin=(226, 180, 158), hair=(214, 210, 204), iris=(90, 120, 150), lips=(180, 110, 100), cloth=(70, 70, 80),
        bald=True, sideburn=0.2, volume=0.06, glasses=(30, 30, 34), collar="v",
        age=1.0, beard=0.9, moustache=0.9, nose_width=0.21, nose_high=0.36, nose_tip=0.64, brow_size=0.055,
    ),
    "esra": Person(
        seed=5, skin=(218, 170, 136), hair=(40, 26, 20), iris=(80, 50, 26), lips=(170, 70, 70), cloth=(50, 40, 60),
        scarf=(70, 40, 110), neck=0.52,
        width=0.95, age=0.4, brow_size=0.045, brow_arch=0.1, eye_open=0.1, eye_size=0.23, nose_high=0.34, makeup=0.5,
    ),
    "fay": Person(
        seed=6, skin=(142, 92, 66), hair=(30, 20, 16), iris=(50, 28, 16), lips=(150, 60, 64), cloth=(200, 150, 40),
        curl=1.0, volume=0.7, neck=0.5,
        nose_width=0.21, lip_upper=0.1, lip_lower=0.13, eye_open=0.11, eye_size=0.22, jaw=2.0, taper=0.18,
        brow_arch=0.09, blush=0.15, makeup=0.5,
    ),
    "gus": Person(
        seed=7, skin=(246, 208, 188), hair=(214, 176, 110), iris=(90, 140, 190), lips=(214, 120, 112), cloth=(200, 60, 50),
        brow=(150, 116, 74), hairline=-0.6, fringe=0.4, volume=0.14, neck=0.46,
        crown=1.5, chin=1.2, width=1.04, eye_open=0.12, eye_size=0.24, eye_gap=0.45, nose_tip=0.46, nose_high=0.24, nose_width=0.14,
        mouth_at=0.82, mouth_width=0.3, brow_size=0.03, brow_lift=0.3, blush=0.6, ridge=0.0, socket=0.1,
    ),
    "hari": Person(
        seed=8, skin=(182, 128, 92), hair=(18, 14, 14), iris=(48, 28, 16), lips=(140, 80, 70), cloth=(230, 230, 235),
        swept=True, part=0.3, hairline=-0.92, temple=0.12, arch=3.2, volume=0.15, collar="v", sideburn=0.25,
        moustache=1.0, beard=0.25, brow_size=0.065, brow_lift=0.25, nose_high=0.36, nose_width=0.2, jaw=2.7, age=0.3, blush=0.15,
    ),
}

BACKDROPS = (
    ((120, 130, 140), (70, 78, 88)),
    ((170, 150, 120), (90, 70, 50)),
    ((96, 122, 92), (50, 66, 54)),
    ((176, 186, 196), (120, 128, 140)),
    ((92, 84, 104), (44, 40, 54)),
    ((196, 182, 164), (140, 116, 96)),
    ((70, 104, 120), (40, 54, 70)),
)


def view(person: Person, number: int) -> View:
    """The first picture looks ahead, the second turns one way and smiles, the third turns the other way."""
    r = np.random.RandomState(100 * person.seed + number)
    turn = (0, 1, -1)[number - 1] * (-1) ** person.seed
    return View(
        seed=100 * person.seed + number,
        size=int(r.randint(216, 249)),
        yaw=0.19 * turn + r.uniform(-0.04, 0.04),
        pitch=r.uniform(-0.06, 0.06),
        roll=r.uniform(-0.09, 0.09),
        zoom=r.uniform(0.22, 0.245),
        shift=(r.uniform(-0.15, 0.15), r.uniform(-0.05, 0.1)),
        light=(r.choice((-1, 1)) * r.uniform(0.25, 0.6), -r.uniform(0.35, 0.6), 0.8),
        warmth=r.uniform(-0.05, 0.07),
        exposure=r.uniform(0.9, 1.15),
        smile=(0.3, 0.75, 0.45)[number - 1] + r.uniform(-0.1, 0.1),
        teeth=0.7 if number == 2 and person.seed % 3 else 0.0,
        gaze=r.uniform(-0.3, 0.3),
        backdrop=BACKDROPS[(3 * person.seed + 2 * number) % len(BACKDROPS)],
    )
