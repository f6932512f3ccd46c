"""The sample manifests: the script draws them again, and their files are what the manifests say."""

import csv
import re
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from PIL import Image, UnidentifiedImageError
from repository import REPOSITORY

from batchverify.records import Limits, Reason

SAMPLES = REPOSITORY / "sample_manifests"
DRAWING = SAMPLES / "drawing"
PEOPLE = {"ada", "bola", "chen", "dan", "esra", "fay", "gus", "hari"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder as the script draws it here and now, with one view of each person."""
    out = tmp_path_factory.mktemp("samples")
    subprocess.run([sys.executable, DRAWING / "draw_sample_faces.py", "-o", out, "--views", "1"], check=True)
    return out


def rows(name):
    with (SAMPLES / name).open(newline="") as file:
        return list(csv.DictReader(file))


def files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file() and DRAWING not in path.parents)
    return {str(path.relative_to(folder)) for path in paths}


def pixels(path):
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image, np.float32)


def test_script_writes_the_same_files(drawn):
    others = {f"faces/{name}_{number}.jpg" for name in PEOPLE for number in (2, 3)}
    assert files(drawn) == files(SAMPLES) - others


@pytest.mark.parametrize("name", ["faces.csv", "broken.csv"])
def test_script_writes_the_same_manifests(drawn, name):
    assert (drawn / name).read_bytes() == (SAMPLES / name).read_bytes()


def test_script_draws_the_same_pictures(drawn):
    pictures = [*sorted((SAMPLES / "faces").glob("*_1.jpg")), SAMPLES / "broken" / "landscape.jpg"]
    for path in pictures:
        again = pixels(drawn / path.relative_to(SAMPLES))
        assert np.abs(again - pixels(path)).mean() < 2, path.name


def test_parquet_has_the_rows_of_the_csv():
    table = pyarrow.parquet.read_table(SAMPLES / "faces.parquet")
    assert table.schema.field("label").type == pyarrow.int8()
    text = pyarrow.csv.read_csv(SAMPLES / "faces.csv")
    assert table.to_pylist() == text.to_pylist()


def test_24_faces_of_8_people():
    faces = sorted((SAMPLES / "faces").iterdir())
    assert Counter(path.stem.split("_")[0] for path in faces) == dict.fromkeys(PEOPLE, 3)
    for path in faces:
        height, width, _ = pixels(path).shape
        assert 200 <= height <= 250 and 200 <= width <= 250
        assert 8_000 <= path.stat().st_size <= 20_000


def test_pairs_are_distinct_and_their_labels_true():
    pairs = rows("faces.csv")
    assert Counter(row["label"] for row in pairs) == {"0": 24, "1": 28}
    assert len({frozenset((row["image_a"], row["image_b"])) for row in pairs}) == len(pairs)
    for row in pairs:
        assert row["label"] == str(int(row["person_a"] != row["person_b"]))
        for side in "ab":
            assert row[f"image_{side}"].startswith(f"faces/{row[f'person_{side}']}_")
            assert (SAMPLES / row[f"image_{side}"]).is_file()


def broken_cases():
    """(reason, side, cell) of every bad cell in broken.csv."""
    for row in rows("broken.csv"):
        for reason, side in re.findall(r"(\w+) on side ([ab])", row["case"]):
            yield reason, side, row[f"image_{side}"]


def test_broken_shows_every_reason_on_both_sides():
    shown = {(reason, side) for reason, side, _ in broken_cases()}
    # no file kills its reader, so `crashed` has no row
    assert shown == {(reason.value, side) for reason in Reason if reason is not Reason.CRASHED for side in "ab"}
    cells = {side: {cell for _, at, cell in broken_cases() if at == side} for side in "ab"}
    assert cells["a"] == cells["b"]


def test_broken_cells_without_a_case_are_good_faces():
    for row in rows("broken.csv"):
        bad = {side for _, side in re.findall(r"(\w+) on side ([ab])", row["case"])}
        assert bad or row["case"] == "good"
        for side in {"a", "b"} - bad:
            assert (SAMPLES / row[f"image_{side}"]).parent == SAMPLES / "faces"
            assert (SAMPLES / row[f"image_{side}"]).is_file()
    labels = Counter(row["label"] for row in rows("broken.csv"))
    assert min(labels[""], labels["0"], labels["1"]) > 0


def reason_of(cell):
    """What an independent, naive reader makes of a cell; None for an image that decodes."""
    if "://" in cell:
        return "forbidden"
    path = SAMPLES / cell
    if not cell or not path.exists():
        return "not_found"
    if path.is_dir():
        return "unreadable"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            if image.width * image.height > Limits().pixels:
                return "too_large"
            image.load()
    except (UnidentifiedImageError, OSError):
        return "undecodable"
    return None


def test_broken_files_are_what_their_rows_say():
    for reason, _, cell in broken_cases():
        # whether there is a face in it is another test's matter
        assert reason_of(cell) == (None if reason == "no_face" else reason), cell


def test_folder_is_small():
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < 1_000_000


@pytest.fixture(scope="module")
def detector():
    """facenet-pytorch's own detector, at its own thresholds."""
    from facenet_pytorch import MTCNN

    return MTCNN(image_size=160, margin=44, min_face_size=20, device="cpu")


def test_every_face_is_found_where_it_was_drawn(detector):
    for path in sorted((SAMPLES / "faces").iterdir()):
        image = Image.open(path)
        boxes, probabilities = detector.detect(image)
        assert boxes is not None and len(boxes) == 1, path.name
        assert probabilities[0] > 0.95, path.name
        left, top, right, bottom = boxes[0].astype(float) / image.width
        assert left < 0.5 < right and top < 0.47 < bottom and 0.3 < right - left < 0.6, path.name


def test_no_face_in_the_landscape(detector):
    boxes, _ = detector.detect(Image.open(SAMPLES / "broken" / "landscape.jpg"))
    assert boxes is None


@pytest.mark.weights
def test_backbone_tells_the_people_apart(detector, shared):
    import torch
    from facenet_pytorch import InceptionResnetV1

    net = InceptionResnetV1(pretrained=None).eval()
    state = torch.load(shared / "weights" / "20180402-114759-vggface2.pt", weights_only=True)
    net.load_state_dict({k: v for k, v in state.items() if not k.startswith("logits")}, strict=False)
    paths, crops = sorted((SAMPLES / "faces").iterdir()), []
    for path in paths:
        image = Image.open(path)
        boxes, _ = detector.detect(image)
        crops.append(detector.extract(image, boxes.astype(float), None))
    with torch.inference_mode():
        vectors = net(torch.stack(crops)).numpy()
    upper = np.triu_indices(len(paths), 1)
    names = np.array([path.stem.split("_")[0] for path in paths])
    cosine, same = (vectors @ vectors.T)[upper], (names[:, None] == names[None])[upper]
    assert cosine[same].min() > 0.85 and cosine[~same].max() < 0.4
