"""Draw `sample_manifests/`: 24 faces of 8 people who do not exist, and a manifest for every way to fail.

    python sample_manifests/drawing/draw_sample_faces.py [-o sample_manifests]

The drawing is seeded: one version of Pillow and pyarrow always writes the same bytes. The measures of the faces were
searched for once, within natural bounds, until the vggface2 backbone told the people apart: the cosine of two
images is above 0.9 for one person and below 0.4 for two.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter
from sample_face import Person, View, draw
from sample_face.scene import noise

Row = list[str | int | None]  # the cells of one manifest row
HEADER = ["image_a", "image_b", "label", "person_a", "person_b"]
VIEWS = (1, 2, 3)

# fmt: off
PEOPLE = {
    "ada": Person(
        seed=1, skin=(236, 196, 174), hair=(120, 52, 24), iris=(70, 120, 80), lips=(196, 96, 92),
        cloth=(60, 110, 100), width=0.921, chin=1.5, jaw=1.9, taper=0.103, neck=0.5, cheek=0.045,
        eye_gap=0.418, eye_size=0.24, eye_open=0.12, eye_tilt=-0.033, fold=0.87, socket=0.198, makeup=0.41,
        brow_lift=0.23, brow_arch=0.077, brow_tilt=0.012, nose_width=0.19, nose_tip=0.533, nose_high=0.255,
        mouth_at=0.86, mouth_width=0.34, lip_upper=0.047, lip_lower=0.08, age=0.09, freckles=0.99,
        blush=0.16, hairline=-1.044, volume=0.16, length=2.3, curl=0.35, part=0.2,
    ),
    "bola": Person(
        seed=2, skin=(104, 66, 46), hair=(16, 13, 12), iris=(44, 26, 16), lips=(120, 70, 62),
        cloth=(190, 180, 150), width=0.925, chin=1.5, jaw=3.0, taper=0.056, neck=0.66, cheek=0.108,
        eye_gap=0.467, eye_size=0.21, eye_open=0.115, eye_tilt=0.079, fold=0.96, socket=0.2, ridge=0.09,
        brow_size=0.03, brow_lift=0.255, brow_arch=0.05, brow_tilt=0.012, nose_width=0.176, nose_tip=0.5,
        nose_high=0.2, mouth_at=0.882, mouth_width=0.359, lip_upper=0.08, lip_lower=0.06, age=0.08,
        blush=0.15, beard=0.81, moustache=0.9, hairline=-1.069, volume=0.04, curl=1.0,
    ),
    "chen": Person(
        seed=3, skin=(238, 206, 178), hair=(20, 18, 20), iris=(40, 24, 18), lips=(200, 110, 104),
        cloth=(40, 50, 90), width=0.988, chin=1.289, jaw=1.9, taper=0.258, neck=0.5, cheek=0.02,
        eye_gap=0.468, eye_size=0.24, eye_open=0.077, eye_tilt=0.08, fold=0.29, socket=0.087, ridge=0.013,
        makeup=0.09, brow_size=0.036, brow_arch=0.05, brow_tilt=-0.02, nose_width=0.193, nose_tip=0.606,
        nose_high=0.319, mouth_at=0.918, mouth_width=0.41, lip_upper=0.08, lip_lower=0.11, age=0.04,
        blush=0.0, hairline=-0.42, volume=0.14, length=1.35, fringe=0.5,
    ),
    "dan": Person(
        seed=4, skin=(226, 180, 158), hair=(214, 210, 204), iris=(90, 120, 150), lips=(180, 110, 100),
        cloth=(70, 70, 80), width=1.005, chin=1.483, jaw=2.94, taper=0.15, cheek=0.12, eye_gap=0.39,
        eye_size=0.184, eye_open=0.078, eye_tilt=0.004, fold=0.99, socket=0.163, ridge=0.064,
        brow_size=0.046, brow_lift=0.334, brow_arch=0.05, brow_tilt=-0.011, nose_width=0.208, nose_tip=0.5,
        nose_high=0.38, mouth_at=0.898, mouth_width=0.423, lip_upper=0.053, lip_lower=0.06, age=1.03,
        blush=0.31, beard=0.91, moustache=0.83, sideburn=0.2, volume=0.06, bald=True, glasses=(30, 30, 34),
        collar="v",
    ),
    "esra": Person(
        seed=5, skin=(218, 170, 136), hair=(40, 26, 20), iris=(80, 50, 26), lips=(170, 70, 70),
        cloth=(50, 40, 60), width=0.959, chin=1.413, jaw=2.572, taper=0.28, neck=0.52, cheek=0.041,
        eye_gap=0.47, eye_size=0.18, eye_open=0.098, eye_tilt=-0.039, fold=0.57, socket=0.2, ridge=0.045,
        makeup=0.71, brow_lift=0.23, brow_arch=0.099, brow_tilt=0.011, nose_width=0.166, nose_tip=0.5,
        nose_high=0.222, mouth_at=1.0, mouth_width=0.366, lip_upper=0.047, lip_lower=0.12, age=0.42,
        blush=0.15, scarf=(70, 40, 110),
    ),
    "fay": Person(
        seed=6, skin=(142, 92, 66), hair=(30, 20, 16), iris=(50, 28, 16), lips=(150, 60, 64),
        cloth=(200, 150, 40), width=1.06, chin=1.39, jaw=2.6, taper=0.056, neck=0.5, cheek=0.04,
        eye_gap=0.39, eye_size=0.226, eye_open=0.118, eye_tilt=0.076, fold=0.84, socket=0.196, makeup=1.0,
        brow_size=0.031, brow_lift=0.23, brow_arch=0.083, brow_tilt=-0.015, nose_width=0.22, nose_tip=0.5,
        nose_high=0.38, mouth_at=1.0, mouth_width=0.409, lip_upper=0.04, lip_lower=0.099, freckles=0.23,
        blush=0.48, hairline=-0.973, volume=0.7, curl=1.0,
    ),
    "gus": Person(
        seed=7, skin=(246, 208, 188), hair=(214, 176, 110), iris=(90, 140, 190), lips=(214, 120, 112),
        cloth=(200, 60, 50), brow=(150, 116, 74), width=1.06, crown=1.5, chin=1.22, jaw=3.0, taper=0.055,
        neck=0.46, cheek=0.02, eye_size=0.252, eye_open=0.13, eye_tilt=0.019, fold=0.41, socket=0.061,
        ridge=0.007, brow_size=0.024, brow_lift=0.337, brow_arch=0.085, brow_tilt=0.012, nose_width=0.12,
        nose_tip=0.414, nose_high=0.186, mouth_at=0.845, mouth_width=0.281, lip_upper=0.04, lip_lower=0.06,
        freckles=0.29, blush=0.19, hairline=-0.55, volume=0.14, fringe=0.4,
    ),
    "hari": Person(
        seed=8, skin=(182, 128, 92), hair=(18, 14, 14), iris=(48, 28, 16), lips=(140, 80, 70),
        cloth=(230, 230, 235), width=0.924, chin=1.472, jaw=3.0, taper=0.063, cheek=0.053, eye_gap=0.407,
        eye_size=0.196, eye_open=0.082, eye_tilt=0.08, fold=0.32, socket=0.085, ridge=0.0, brow_size=0.07,
        brow_lift=0.23, brow_arch=0.075, brow_tilt=-0.02, nose_width=0.14, nose_tip=0.592, nose_high=0.362,
        mouth_at=0.904, mouth_width=0.439, lip_upper=0.08, lip_lower=0.11, age=0.42, blush=0.11,
        beard=0.38, moustache=1.0, hairline=-1.08, arch=3.2, temple=0.12, sideburn=0.25, volume=0.15,
        part=0.3, swept=True, collar="v",
    ),
}
# fmt: on

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
    """In the first image the person looks ahead, in the second to one side and smiles, in the third to the other."""
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


def faces(folder: Path, views: Sequence[int]) -> None:
    """Write the face images, one of each person and view."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, person in PEOPLE.items():
        for number in views:
            draw(person, view(person, number)).save(folder / f"{name}_{number}.jpg", quality=90)


def pairs() -> list[Row]:
    """All 24 pairs of the same person and one pair of each two people, shuffled."""
    r = np.random.RandomState(3)
    rows: list[Row] = []
    for name in PEOPLE:
        rows += [[face(name, a), face(name, b), 0, name, name] for a, b in combinations(VIEWS, 2)]
    for one, other in combinations(PEOPLE, 2):
        one, other = (one, other) if r.randint(2) else (other, one)
        rows.append([face(one, r.choice(VIEWS)), face(other, r.choice(VIEWS)), 1, one, other])
    return [rows[k] for k in r.permutation(len(rows))]


def face(name: str, number: int) -> str:
    """The path of an image in the manifests."""
    return f"faces/{name}_{number}.jpg"


def write_csv(path: Path, header: list[str], rows: list[Row]) -> None:
    """Write a manifest; `None` becomes an empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def write_parquet(path: Path, rows: list[Row]) -> None:
    """Write a manifest as Parquet, with an int8 label."""
    kinds = [pa.string(), pa.string(), pa.int8(), pa.string(), pa.string()]
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    pq.write_table(pa.table(columns, names=HEADER), path)


# Bad images by reason. `crashed`, the seventh reason, is missing: it is for images that kill or hang their worker
# twice, and no file that could be kept here does that.
BROKEN = {
    "not_found": [("broken/missing.jpg", "no such file"), ("", "empty cell")],
    "forbidden": [("https://example.com/face.jpg", "a scheme that is not read")],
    "unreadable": [("broken", "a folder")],
    "undecodable": [
        ("broken/text.jpg", "text, not an image"),
        ("broken/truncated.jpg", "the first half of a JPEG"),
        ("broken/empty.jpg", "a file of zero bytes"),
    ],
    "too_large": [("broken/too_large.png", "10,001 x 10,001 pixels")],
    "no_face": [("broken/landscape.jpg", "hills and a lake")],
}


def broken_rows() -> list[Row]:
    """Every bad image once on each side, a good row after each reason, and one row that is bad on both sides."""
    good, rows = pairs(), []
    for k, (reason, images) in enumerate(BROKEN.items()):
        for image, why in images:
            rows.append([image, good[k][1], None, f"{reason} on side a: {why}"])
            rows.append([good[k][0], image, good[k][2], f"{reason} on side b: {why}"])
        rows.append([*good[k][:3], "good"])
    both = "not_found on side a, no_face on side b"
    rows.append(["broken/missing.jpg", "broken/landscape.jpg", None, both])
    return [[*good[len(BROKEN)][:3], "good"], *rows]


def broken_files(folder: Path, whole: Path) -> None:
    """Write the files of `BROKEN`. whole: the JPEG that is cut in half."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.jpg").write_text("This is a line of text with the name of a picture.\n")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "truncated.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    Image.new("1", (10_001, 10_001)).save(folder / "too_large.png", optimize=True)
    landscape(240).save(folder / "landscape.jpg", quality=88)


def landscape(size: int) -> Image.Image:
    """Hills behind a lake, without a face."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    picture = np.stack([120 + 144 * y, 165 + 80 * y, 215 + 16 * y], -1)
    for k, (top, colour) in enumerate(((0.42, (120, 140, 165)), (0.5, (86, 118, 104)), (0.58, (60, 92, 56)))):
        ridge = top + 0.09 * noise(k, x * (3 + 3 * k) + 9, 0 * y) + 0.02 * noise(k + 9, x * 25 + 9, 0 * y)
        shade = np.array(colour, np.float32) * (1 + 0.12 * noise(k + 5, x * 30 + 9, y * 30 + 9))[..., None]
        picture = np.where((y > ridge)[..., None], shade, picture)
    lake = (1 + 0.08 * noise(20, x * 6 + 9, y * 60 + 9))[..., None] * np.array((96, 132, 160), np.float32)
    picture = np.where((y > 0.74)[..., None], lake, picture)
    return Image.fromarray(np.uint8(np.clip(picture, 0, 255))).filter(ImageFilter.GaussianBlur(0.7))


def main() -> None:
    """Write the whole folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--views", type=int, nargs="+", choices=VIEWS, default=VIEWS, help="draw these alone")
    arguments = parser.parse_args()
    out = arguments.out
    faces(out / "faces", arguments.views)
    write_csv(out / "faces.csv", HEADER, pairs())
    write_parquet(out / "faces.parquet", pairs())
    broken_files(out / "broken", out / face("ada", 1))
    write_csv(out / "broken.csv", ["image_a", "image_b", "label", "case"], broken_rows())


if __name__ == "__main__":
    main()
