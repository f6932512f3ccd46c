"""Messages about bad manifests, as (file, message) pairs, and about files that change during a run."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchverify.errors import ManifestError, UsageError
from batchverify.manifest.manifest import Manifest
from batchverify.manifest.tables import BATCH_ROWS, BLOCK_BYTES

PAIR = "image_a,image_b\nx,y\n"
ONE_FILE = [
    ("image_a,other\nx,y\n", "no column 'image_b' (--column-b); the file has image_a, other"),
    ("image_a;image_b\nx;y\n", "the columns are separated by semicolons; save the file with commas"),
    (
        "image_a;image_b;note\nx;y;a,b\n",
        "the columns are separated by semicolons; save the file with commas",
    ),
    (
        "\ufeffimage_a\timage_b\nx\ty\n",
        "the columns are separated by tabs; save the file with commas or give it a name that ends in .tsv",
    ),
    ("sep=,\nimage_a,image_b\nx,y\n", "the first line is 'sep=,', which only Excel reads; remove it"),
    (
        '\ufeff"sep=;"\nimage_a;image_b\nx;y\n',
        "the first line is '\"sep=;\"', which only Excel reads; remove it",
    ),
    (
        "image_a,image_b,label,,\nx,y,0,,\n",
        "2 columns have no name; name or remove them (in a CSV, the commas at the ends of lines)",
    ),
    ("image_a, image_b\nx, y\n", "no column 'image_b' (--column-b); the file has image_a, ' image_b'"),
    ("image_a,image_b,image_b\nx,y,z\n", "column 'image_b' appears 2 times"),
    (
        "image_a,image_b,probability\nx,y,1\n",
        "column 'probability' is a name of an output column; rename it in the manifest",
    ),
    ("image_a,image_b\n", "the manifest has no rows"),
    ("image_a,image_b,label\nx,y,0\nx,y,yes\n", "row 2: label must be 0 or 1, got 'yes'"),
    ("image_a,image_b,label\nx,y,0\nx,y,2\n", "row 2: label must be 0 or 1, got '2'"),
    ("image_a,image_b,label\nx,y, 2\n", "row 1: label must be 0 or 1, got ' 2'"),
    ("image_a,image_b\nx,y\nx\n", "row 2: expected 2 columns, found 1: 'x'"),
    ("", "the file has no rows; it needs a header with image_a and image_b, and rows below it"),
]


def message_of(source: object) -> str:
    """The one-line message with which opening and reading a manifest fails."""
    with pytest.raises(ManifestError) as caught:
        Manifest.open(source).scan()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("text", "message"), ONE_FILE)
def test_one_file(tmp_path, text, message):
    path = tmp_path / "pairs.csv"
    path.write_text(text, encoding="utf-8")
    assert message_of(path) == f"{path}: {message}"


SECOND_FILE = [
    ("b.csv", "image_a,other\nx,y\n", "no column 'image_b' (--column-b); the file has image_a, other"),
    ("b.csv", "image_a,image_b,n\nx,y,1\n", "columns differ from those of {first}: 'n' is new"),
    ("b.csv", "image_a,image_b\nx,y,1\n", "row 1: expected 2 columns, found 3: 'x,y,1'"),
    ("b.tsv", "image_a,image_b\nx,y\n", "the columns are separated by commas; save the file with tabs"),
    ("b.csv", "", "the file has no rows; it needs a header with image_a and image_b, and rows below it"),
]


@pytest.mark.parametrize(("name", "text", "message"), SECOND_FILE)
def test_the_second_file(tmp_path, name, text, message):
    first = tmp_path / "a.csv"
    first.write_text(PAIR, encoding="utf-8")
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert message_of(tmp_path) == f"{tmp_path / name}: {message.format(first=first)}"


def test_files_without_rows(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.csv").write_text("image_a,image_b\n", encoding="utf-8")
    assert message_of(tmp_path) == f"{tmp_path}/a.csv and 2 more: the manifest has no rows"


def test_rows_are_counted_in_the_second_block_of_the_second_file(tmp_path):
    good = "image_a,image_b,label\n" + "x,y,0\n" * 800_000
    assert len(good) > BLOCK_BYTES
    (tmp_path / "a.csv").write_text(good, encoding="utf-8")
    (tmp_path / "b.csv").write_text(good + "x,y,maybe\n", encoding="utf-8")
    assert message_of(tmp_path) == f"{tmp_path}/b.csv: row 800001: label must be 0 or 1, got 'maybe'"


PARQUET = [
    ({"image_a": [1], "image_b": ["y"]}, "column 'image_a' must hold paths (strings), found int64"),
    ({"image_a": [b"x"], "image_b": ["y"]}, "column 'image_a' must hold paths (strings), found binary"),
    ({"image_a": ["x"], "image_b": ["y"], "label": [2]}, "row 1: label must be 0 or 1, got 2"),
    ({"image_a": ["x"], "image_b": ["y"], "label": [0.5]}, "row 1: label must be 0 or 1, got 0.5"),
    (
        {"image_a": ["x"], "image_b": ["y"], "label": [[0]]},
        "column 'label' must hold 0 or 1, found list<element: int64>",
    ),
    ({"image_a": ["x"]}, "no column 'image_b' (--column-b); the file has image_a"),
    ({"image_a": ["x"] * 0, "image_b": ["y"] * 0}, "the manifest has no rows"),
]


@pytest.mark.parametrize(("columns", "message"), PARQUET)
def test_parquet(tmp_path, columns, message):
    path = tmp_path / "pairs.parquet"
    types = {"image_a": pa.string(), "image_b": pa.string()} if not columns["image_a"] else {}
    pq.write_table(pa.table({name: pa.array(cells, types.get(name)) for name, cells in columns.items()}), path)
    assert message_of(path) == f"{path}: {message}"


def test_parquet_that_is_not_utf8_is_named_by_row_in_a_later_batch(tmp_path):
    rows = 2 * BATCH_ROWS + 6
    cells = pa.array([b"x"] * (rows - 1) + [b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"image_a": ["x"] * rows, "image_b": cells}), tmp_path / "a.parquet")
    assert message_of(tmp_path) == f"{tmp_path}/a.parquet: row {rows}: column 'image_b': not UTF-8"


def test_parquet_files_of_other_types(tmp_path):
    both = {"image_a": ["x"], "image_b": ["y"]}
    pq.write_table(pa.table({**both, "n": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({**both, "n": ["1"]}), tmp_path / "b.parquet")
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    assert message_of(tmp_path) == f"{b}: column 'n' holds string, in {a} it holds int64"


def test_text_and_parquet_do_not_mix(tmp_path):
    (tmp_path / "a.csv").write_text(PAIR, encoding="utf-8")
    pq.write_table(pa.table({"image_a": ["x"], "image_b": ["y"]}), tmp_path / "b.parquet")
    assert message_of(tmp_path) == (
        f"{tmp_path}/b.parquet: {tmp_path}/a.csv has another format; give files of one format only"
    )


def test_tables_in_memory():
    assert message_of(pd.DataFrame({"image_a": ["x"]})) == (
        "the table: no column 'image_b' (--column-b); the file has image_a"
    )
    assert message_of(pd.DataFrame([["x", "y"]], columns=["image_a", "image_a"])).startswith(
        "the table: Duplicate column"
    )
    assert message_of(pd.DataFrame({"image_a": ["x", 3], "image_b": ["y", "z"]})).startswith("the table: ")
    assert message_of(pa.table({"image_a": ["x"], "image_b": ["y"], "label": ["no"]})) == (
        "the table: row 1: label must be 0 or 1, got 'no'"
    )
    with pytest.raises(UsageError, match="a manifest is a path, a DataFrame or an Arrow table, not list"):
        Manifest.open([1])


def test_a_frame_may_hold_paths_but_no_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame = pd.DataFrame(
        {
            "image_a": [Path("a.jpg"), None],
            "image_b": ["b.jpg", Path("/c.jpg")],
            "n": pd.Categorical(["x", "y"]),
        }
    )
    manifest = Manifest.open(frame)
    scan = manifest.scan()
    assert [str(image) for image in scan.images][::2] == [f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg"]
    (block,) = manifest.blocks(scan)
    assert block.carried.to_pylist() == [
        {"image_a": "a.jpg", "image_b": "b.jpg", "n": "x"},
        {"image_a": None, "image_b": "/c.jpg", "n": "y"},
    ]
    image = Image.new("RGB", (4, 4))
    wanted = "Arrow cannot hold these in one column; image columns hold paths (strings)"
    for column, kind in (
        ([image], "Image"),
        (["x", 3], "int, str"),
        (["\ud800"], "str"),
        ([2**70], "int"),
        ([np.zeros((2, 2, 3))], "ndarray"),
    ):
        pair = pd.DataFrame({"image_a": column, "image_b": ["y"] * len(column)}, dtype=object)
        assert message_of(pair) == f"the table: column 'image_a' holds {kind}: {wanted}"
    assert message_of(pd.DataFrame({"image_a": [b"x"], "image_b": ["y"]})) == (
        "the table: column 'image_a' must hold paths (strings), found binary"
    )


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UsageError, match="scheme 'http' is not supported"):
        Manifest.open("http://example.org/pairs.csv")


BEFORE = "image_a,image_b,n\nx,y,1\ny,z,2\n"
CHANGES = [
    ("image_a,image_b,n\nx,y,1\n", "2 rows at first, 1 now"),
    ("image_a,image_b,n\n", "2 rows at first, 0 now"),
    (BEFORE + "x,z,3\n", "2 rows at first, more now"),
    ("image_a,image_b,n\nx,y,1\ny,new,2\n", "an image is new"),
    ("image_a,image_b,n\nx,y,1\ny,z,two\n", "column 'n' no longer holds int64"),
    ("image_a,image_b,m\nx,y,1\ny,z,2\n", "other columns"),
]


@pytest.mark.parametrize(("text", "message"), CHANGES)
def test_a_file_that_changes_after_the_first_reading(tmp_path, text, message):
    path: Path = tmp_path / "pairs.csv"
    path.write_text(BEFORE, encoding="utf-8")
    manifest = Manifest.open(path)
    scan = manifest.scan()
    assert len(list(manifest.blocks(scan))) == 1
    path.write_text(text, encoding="utf-8")
    for _ in range(2):
        with pytest.raises(ManifestError) as caught:
            list(manifest.blocks(scan))
        assert str(caught.value) == f"{path}: the file changed while it was read: {message}"
    assert len(scan.images) == 3
