"""`--details`: what the columns say of real pictures, and where they come from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from half_done import FACES, SAMPLES, run, stopped
from PIL import Image, ImageFilter

import batchverify
from batchverify.cache.segment import DETAIL_SCHEMA as CACHED
from batchverify.cache.segment import Entry
from batchverify.cli.app import main
from batchverify.engine.embedding_table import EmbeddingTable
from batchverify.engine.fused_table import FusedTable
from batchverify.errors import ManifestError, UsageError
from batchverify.manifest.columns import DETAIL_SCHEMA, SCORE_SCHEMA
from batchverify.manifest.manifest import Block
from batchverify.scoring.details import DETAIL_FIELDS
from batchverify.scoring.parquet import result_table

NAMES = [field.name for field in DETAIL_FIELDS]
ADA = SAMPLES / "faces" / "ada_1.jpg"
OPTIONS: dict[str, Any] = {"backbone": "compact", "quiet": True, "engine": "local"}


def make_pairs(folder: Path) -> Path:
    """A face beside itself: turned by a quarter, twice as large, blurred, absent, not there."""
    picture = Image.open(ADA).convert("RGB")
    width, height = picture.size
    others = {
        "turned": picture.transpose(Image.Transpose.ROTATE_90),
        "large": picture.resize((2 * width, 2 * height), Image.Resampling.BICUBIC),
        "blurred": picture.filter(ImageFilter.GaussianBlur(3)),
        "empty": Image.new("RGB", (200, 200), (90, 120, 200)),
    }
    picture.save(folder / "face.png")
    for name, other in others.items():
        other.save(folder / f"{name}.png")
    rows = [{"image_a": "face.png", "image_b": f"{name}.png"} for name in (*others, "missing")]
    pd.DataFrame(rows).to_csv(folder / "pairs.csv", index=False)
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("details")


@pytest.fixture(scope="module")
def pairs(folder) -> Path:
    return make_pairs(folder)


@pytest.fixture(scope="module")
def cache(folder) -> str:
    return str(folder / "cache")


@pytest.fixture(scope="module")
def rows(pairs, cache) -> pd.DataFrame:
    table = batchverify.score(pairs, cache=cache, details=True, **OPTIONS).to_arrow()
    assert table.schema.names == ["image_a", "image_b", *SCORE_SCHEMA.names, *NAMES]
    return table.to_pandas()


def box(row: pd.Series, side: str) -> np.ndarray:
    return row[[f"face_{name}_{side}" for name in ("x0", "y0", "x1", "y1")]].to_numpy(float)


def test_the_columns_are_those_of_the_upright_original(rows):
    turned, large = rows.iloc[0], rows.iloc[1]
    with Image.open(ADA) as picture:
        width = picture.width
    x0, y0, x1, y1 = box(turned, "a")
    # Turned counterclockwise by a quarter: x becomes the distance to the bottom.
    np.testing.assert_allclose(box(turned, "b"), (y0, width - x1, y1, width - x0), atol=4)
    assert (turned.rotation_a, turned.rotation_b) == (0, 270)
    points, others = (np.reshape(turned[f"landmarks_{side}"], (5, 2)) for side in "ab")
    np.testing.assert_allclose(others, np.stack([points[:, 1], width - 1 - points[:, 0]], 1), atol=4)
    np.testing.assert_allclose(box(large, "b"), 2 * box(large, "a"), atol=8)
    for side in "ab":
        x0, y0, x1, y1 = box(large, side)
        assert large[f"face_size_{side}"] == pytest.approx(np.sqrt((x1 - x0) * (y1 - y0)), rel=1e-5)
        assert large[f"faces_{side}"] == 1 and large[f"confidence_{side}"] > 0.9
        eyes, mouth = np.reshape(large[f"landmarks_{side}"], (5, 2))[[0, 3]]
        assert y0 < eyes[1] < mouth[1] < y1


def test_a_blurred_face_is_less_sharp(rows):
    assert 0 < rows.sharpness_b[2] < rows.sharpness_a[2] / 2


def test_what_is_not_known_of_a_failed_image_is_null(rows):
    empty, missing = rows.iloc[3], rows.iloc[4]
    assert (empty.status, missing.status) == ("no_face", "not_found")
    assert empty.faces_b == 0
    assert [name for name in NAMES if name.endswith("_b") and pd.notna(empty[name])] == ["faces_b"]
    assert not [name for name in NAMES if name.endswith("_b") and pd.notna(missing[name])]
    for row in (empty, missing):
        assert all(pd.notna(row[f"{name}_a"]) for name in ("face_size", "rotation", "sharpness"))


def test_a_cache_of_an_older_version_is_read_and_completed(pairs, rows, folder):
    """Segments without details serve runs without them; with them, images are embedded once more, and once only."""
    root = folder / "older"
    plain = batchverify.score(pairs, cache=str(root), **OPTIONS).to_arrow()
    assert plain.schema.names == ["image_a", "image_b", *SCORE_SCHEMA.names]
    for file in root.glob("v1/*/data/*.parquet"):
        table = pq.read_table(file)
        arguments = {"compression": "none", "write_page_checksum": True}
        pq.write_table(table.drop_columns(CACHED.names), file, **arguments)
    again = batchverify.score(pairs, cache=str(root), **OPTIONS)
    assert (again.cached, again.embedded) == (4, 0)
    assert again.to_arrow().equals(plain)
    for embedded in (4, 0):
        summary = batchverify.score(pairs, cache=str(root), details=True, **OPTIONS)
        assert (summary.embedded, summary.cached) == (embedded, 4 - embedded)
        pd.testing.assert_frame_equal(summary.to_pandas(), rows)
    assert batchverify.score(pairs, cache=str(root), **OPTIONS).to_arrow().equals(plain)


def test_without_a_detector_only_the_sharpness_is_known(cache):
    frame = batchverify.score(FACES, cache=cache, crop="none", limit=2, details=True, quiet=True).to_pandas()
    known = {name for name in DETAIL_SCHEMA.names if frame[f"{name}_a"].notna().any()}
    assert known == {"sharpness"}


def test_mtcnn_has_no_landmarks(cache):
    frame = batchverify.score(FACES, cache=cache, limit=2, details=True, quiet=True).to_pandas()
    known = {name for name in DETAIL_SCHEMA.names if frame[f"{name}_b"].notna().all()}
    assert known == set(DETAIL_SCHEMA.names) - {"landmarks"}
    assert frame.landmarks_b.isna().all()


@pytest.mark.parametrize("name", ["one.parquet", "folder"])
def test_a_stopped_job_is_finished_with_the_same_details(cache, tmp_path, name):
    undisturbed = run(tmp_path / f"other{Path(name).suffix}", cache, details=True).to_arrow()
    out = tmp_path / name
    stopped(out, cache, details=True)
    with pytest.raises(UsageError, match="details: True there, None here"):
        run(out, cache)
    resumed = run(out, cache, details=True)
    assert resumed.resumed_rows > 0
    assert resumed.to_arrow().equals(undisturbed)


def test_images_that_are_tried_again_keep_the_details_of_the_others(pairs, cache, rows, tmp_path):
    out = tmp_path / "out.parquet"
    options = OPTIONS | {"cache": cache, "details": True, "part_rows": 2}
    batchverify.score(pairs, out, **options)
    again = batchverify.score(pairs, out, retry_failed=True, **options)
    assert again.resumed_rows == 2
    pd.testing.assert_frame_equal(again.to_pandas(), rows)


def test_a_column_of_the_same_name_is_refused_with_details_only(cache):
    frame = pd.read_csv(FACES).head(2).assign(faces_b=7)
    options: dict[str, Any] = {"cache": cache, "image_root": SAMPLES, "quiet": True}
    with pytest.raises(ManifestError, match="column 'faces_b' has the name of an output column of --details"):
        batchverify.score(frame, details=True, **options)
    assert batchverify.score(frame, **options).to_pandas().faces_b.tolist() == [7, 7]


def test_of_several_backbones_the_first_says_them(pairs, cache, tmp_path):
    """MTCNN misses the face upside down: RetinaFace's score stands, and the details say that there was none."""
    Image.open(ADA).transpose(Image.Transpose.ROTATE_180).save(tmp_path / "down.png")
    frame = pd.DataFrame({"image_a": [str(pairs.parent / "face.png")], "image_b": [str(tmp_path / "down.png")]})

    def scored(backbone: str) -> pd.Series:
        options = OPTIONS | {"backbone": backbone, "cache": cache, "details": True, "image_root": "/"}
        return batchverify.score(frame, **options).to_pandas().iloc[0]

    retina, both, turned = (scored(each) for each in ("compact", "vggface2+compact", "compact+vggface2"))
    assert (both.status, both.backbones) == ("ok", "compact") and pd.isna(both.error_b)
    assert both.faces_b == 0
    assert [name for name in NAMES if name.endswith("_b") and pd.notna(both[name])] == ["faces_b"]
    assert both.faces_a == 1 and pd.isna(both.landmarks_a)
    assert turned.rotation_b == 180 and turned.probability == both.probability
    for name in NAMES:
        np.testing.assert_array_equal(turned[name], retina[name])


def test_nothing_is_said_of_a_picture_that_another_replaced_between_two_backbones():
    tables = [EmbeddingTable(2, keyed=True, details=number == 0) for number in range(2)]
    for number, own in enumerate(tables):
        for index in range(2):
            entry = Entry(bytes([1 + index + number * index] * 32), np.ones(512, np.float16), confidence=0.9, faces=3)
            own.see(index, entry.key)
            own.put(index, np.ones(512, np.float16))
            own.describe(index, entry)
    carried = pa.record_batch({"image_a": ["same.png"], "image_b": ["replaced.png"]})
    block = Block(0, carried, np.array([0]), np.array([1]))
    none = np.zeros(0, np.float32)
    [row] = result_table(block, FusedTable(tables), (none, none), 0.5, ["x", "y"]).to_pylist()
    assert (row["error_a"], row["error_b"]) == (None, "unreadable")
    assert row["faces_a"] == 3
    assert not [name for name in NAMES if name.endswith("_b") and row[name] is not None]


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_details_come_from_the_workers_of_ray(pairs, rows):
    options = OPTIONS | {"engine": "ray", "no_cache": True, "details": True}
    frame = batchverify.score(pairs, **options).to_pandas()
    assert frame[NAMES].isna().equals(rows[NAMES].isna())
    numbers = [name for name in NAMES if not name.startswith("landmarks")]
    np.testing.assert_allclose(frame[numbers].to_numpy(float), rows[numbers].to_numpy(float), rtol=1e-3, atol=0.1)


def test_predict_says_them_when_asked(cache, rows, pairs):
    call = ["predict", "-i1", str(pairs.parent / "face.png"), "-i2", str(pairs.parent / "turned.png")]
    call += ["--backbone", "compact", "--cache", cache]
    plain = CliRunner().invoke(main, [*call, "--json"])
    assert "details" not in json.loads(plain.stdout)
    document = json.loads(CliRunner().invoke(main, [*call, "--json", "--details"]).stdout)
    assert list(document["details"][1]) == DETAIL_SCHEMA.names
    assert document["details"][1]["rotation"] == 270
    assert document["details"][0]["sharpness"] == rows.sharpness_a[0]
    assert "rotation 270" in CliRunner().invoke(main, [*call, "--details"]).stdout


def test_embed_completes_the_cache(pairs, rows, tmp_path):
    options = OPTIONS | {"cache": str(tmp_path / "cache"), "details": True}
    assert batchverify.embed(pairs, **options).embedded == 4
    summary = batchverify.score(pairs, **options)
    assert (summary.embedded, summary.cached) == (0, 4)
    pd.testing.assert_frame_equal(summary.to_pandas(), rows)
