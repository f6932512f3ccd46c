"""Manifests of every kind, read twice: their unique images, their rows, the columns in the output."""

import csv
import datetime
import decimal
import gzip
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchverify.errors import UsageError
from batchverify.manifest.manifest import Columns, Manifest
from batchverify.manifest.paths import ImageRoot
from batchverify.manifest.unique_images import UniqueImages
from batchverify.records import Reason, Skipped
from batchverify.storage.location import Location


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def rows_of(manifest: Manifest) -> tuple[list, pa.Table]:
    """The pairs of images and the carried columns, after two equal readings."""
    scan = manifest.scan()
    readings = []
    for _ in range(2):
        blocks = list(manifest.blocks(scan))
        assert [block.first for block in blocks] == [0, *np.cumsum([len(block.a) for block in blocks])[:-1]]
        pairs = [(scan.images[a], scan.images[b]) for block in blocks for a, b in zip(block.a, block.b, strict=True)]
        readings.append((pairs, pa.Table.from_batches([block.carried for block in blocks])))
    assert readings[0] == readings[1]
    assert len(readings[0][0]) == scan.rows
    return readings[0]


TEXT = "image_a,label,image_b,n,name\na.jpg,0,b.jpg,1,007\nb.jpg,,c.jpg,,\na.jpg,1,,3,x\n"
TYPES = ["string", "int8", "string", "int64", "string"]


def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_a": ["a.jpg", "b.jpg", "a.jpg"],
            "label": [0, np.nan, 1],
            "image_b": ["b.jpg", "c.jpg", None],
            "n": pd.array([1, None, 3], "Int64"),
            "name": ["007", "", "x"],
        }
    )


def sources(folder: Path) -> dict:
    table = pa.Table.from_pandas(frame())
    path = folder / "m.parquet"
    pq.write_table(table, path)
    packed = folder / "m.csv.gz"
    packed.write_bytes(gzip.compress(TEXT.encode()))
    return {
        "csv": write(folder / "m.csv", TEXT),
        "text": str(write(folder / "t.csv", TEXT)),
        "tsv": write(folder / "m.tsv", TEXT.replace(",", "\t").replace("\n", "\r\n")),
        "gz": packed,
        "parquet": path,
        "uri": path.as_uri(),
        "frame": frame(),
        "table": table,
        "stream": pa.RecordBatchReader.from_batches(table.schema, table.to_batches()),
    }


@pytest.mark.parametrize("name", ["csv", "text", "tsv", "gz", "parquet", "uri", "frame", "table", "stream"])
def test_every_kind_gives_the_same_rows(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    manifest = Manifest.open(sources(tmp_path)[name])
    pairs, carried = rows_of(manifest)
    root, empty = f"{tmp_path}/", Skipped(Reason.NOT_FOUND, "the cell is empty")
    assert pairs == [
        (root + "a.jpg", root + "b.jpg"),
        (root + "b.jpg", root + "c.jpg"),
        (root + "a.jpg", empty),
    ]
    assert carried.schema.names == ["image_a", "true_label", "image_b", "n", "name"]
    assert [str(kind).replace("large_", "") for kind in carried.schema.types] == TYPES
    assert carried["true_label"].to_pylist() == [0, None, 1]
    assert carried["n"].to_pylist() == [1, None, 3]
    assert carried["name"].to_pylist() == ["007", "", "x"]
    assert manifest.has_label and len(manifest.fingerprint) == 64


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str
)
def test_paths_of_every_string_type(kind):
    cells = pa.array(["a.jpg", "b.jpg", None]).cast(kind) if not pa.types.is_dictionary(kind) else None
    cells = pa.array(["a.jpg", "b.jpg", None]).dictionary_encode() if cells is None else cells
    manifest = Manifest.open(pa.table({"image_a": cells, "image_b": cells}))
    pairs, carried = rows_of(manifest)
    assert [Path(a).name if isinstance(a, str) else a.reason for a, _ in pairs] == [
        "a.jpg",
        "b.jpg",
        "not_found",
    ]
    assert carried["image_a"].to_pylist() == ["a.jpg", "b.jpg", None]


def test_carried_parquet_types_are_unchanged(tmp_path):
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5, 678)
    table = pa.table(
        {
            "image_a": ["a", "b"],
            "image_b": ["b", "c"],
            "time": pa.array([moment, None], pa.timestamp("us", "UTC")),
            "day": pa.array([moment.date(), None]),
            "list": pa.array([[1, 2], []], pa.list_(pa.int16())),
            "struct": pa.array([{"x": 1, "y": "z"}, None]),
            "decimal": pa.array([decimal.Decimal("1.50"), None], pa.decimal128(9, 2)),
            "dictionary": pa.array(["u", "v"]).dictionary_encode(),
            "nothing": pa.nulls(2),
            "bytes": pa.array([b"\xff", None]),
            "small": pa.array([1, 2], pa.uint8()),
            "half": pa.array(np.array([1.5, 2], np.float16)),
            "": pa.array([True, None]),
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    _, carried = rows_of(Manifest.open(tmp_path / "m.parquet"))
    assert carried.schema.equals(table.schema)
    assert carried.equals(table)


def test_several_files_are_read_in_order_with_their_own_roots(tmp_path):
    write(tmp_path / "y" / "b.csv", "image_b,image_a,n\n2.jpg,../x/1.jpg,2.5\n")
    write(tmp_path / "x" / "a.csv", "image_a,image_b,n\n1.jpg,./2.jpg,1\n2.jpg,1.jpg,\n")
    write(tmp_path / "z" / "c.csv", "image_a,image_b,n\n")
    manifest = Manifest.open(f"{tmp_path}/**/*.csv")
    pairs, carried = rows_of(manifest)
    one, two, other = (str(tmp_path / name) for name in ("x/1.jpg", "x/2.jpg", "y/2.jpg"))
    assert pairs == [(one, two), (two, one), (one, other)]
    assert list(manifest.scan().images) == [one, two, other]
    assert carried.column_names == ["image_a", "image_b", "n"]
    assert carried["n"].to_pylist() == ["1", "", "2.5"]
    assert manifest.scan().file_rows == (2, 1, 0)


def test_locate_names_file_and_row(tmp_path):
    for name, rows in (("a", 2), ("b", 0), ("c", 3)):
        write(tmp_path / f"{name}.csv", "image_a,image_b\n" + "x,y\n" * rows)
    manifest = Manifest.open(tmp_path)
    scan = manifest.scan()
    located = [manifest.locate(scan, row) for row in range(5)]
    a, c = str(tmp_path / "a.csv"), str(tmp_path / "c.csv")
    assert located == [(a, 1), (a, 2), (c, 1), (c, 2), (c, 3)]


def test_parquet_files_share_their_types(tmp_path):
    both = {"image_a": ["a"], "image_b": ["b"]}
    pq.write_table(
        pa.table({**both, "n": pa.nulls(1), "image_a": pa.array(["a"], pa.large_string())}), tmp_path / "a.pq"
    )
    pq.write_table(pa.table({**both, "n": pa.array([2], pa.int32())}), tmp_path / "b.pq")
    _, carried = rows_of(Manifest.open(tmp_path))
    assert [str(kind) for kind in carried.schema.types] == ["string", "string", "int32"]
    assert carried["n"].to_pylist() == [None, 2]


def test_an_image_root_is_a_fence_the_manifests_folder_is_none(tmp_path):
    outside = tmp_path / "other" / "c.jpg"
    path = write(tmp_path / "m" / "m.csv", f"image_a,image_b\na.jpg,../b.jpg\n{outside},sub/../a.jpg\n")
    inside = [(f"{tmp_path}/m/a.jpg", f"{tmp_path}/b.jpg"), (str(outside), f"{tmp_path}/m/a.jpg")]
    assert rows_of(Manifest.open(path))[0] == inside
    fenced, _ = rows_of(Manifest.open(path, image_root=tmp_path / "faces"))
    assert fenced[0][0] == fenced[1][1] == f"{tmp_path}/faces/a.jpg"
    assert [each.reason for each in (fenced[0][1], fenced[1][0])] == [Reason.FORBIDDEN] * 2


def test_unique_images_agree_with_a_slow_loop():
    generator, images, slow = random.Random(0), UniqueImages(), {}
    roots = [ImageRoot(Location.parse("/x")), ImageRoot(Location.parse("/y"))]
    for _ in range(30):
        root = generator.choice(roots)
        cells = [generator.choice([None, "", *map(str, range(40)), "./7", "/x/7"]) for _ in range(50)]
        kept = generator.randrange(50)
        expected = [slow.setdefault(root.resolve(cell), len(slow)) for cell in cells[kept:]]
        assert images.indices(root, pa.array(cells, pa.string()).slice(kept)).tolist() == expected
    assert list(images) == list(slow)
    assert len(images) == len(slow)
    assert images.indices(roots[0], pa.array(["3", "new", None]), add=False)[1] == -1
    assert list(images) == list(slow)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 99])
def test_limit_is_that_of_the_whole_manifest(tmp_path, limit):
    write(tmp_path / "a.csv", "image_a,image_b,n\na,b,1\nb,c,2\n")
    write(tmp_path / "b.csv", "image_a,image_b,n\nd,e,3\nf,g,x\n")
    pairs, carried = rows_of(Manifest.open(tmp_path, limit=limit))
    assert len(pairs) == min(limit, 4)
    assert carried["n"].to_pylist() == ([1, 2, 3][:limit] if limit < 4 else ["1", "2", "3", "x"])
    with pytest.raises(UsageError, match="limit must be at least 1, got 0"):
        Manifest.open(tmp_path, limit=0)


def test_a_large_csv_is_read_in_blocks(tmp_path):
    generator = random.Random(1)
    expected = [
        {
            "image_a": f"{generator.randrange(50)}",
            "image_b": f"{generator.randrange(50)}",
            "note": f'"{i}",\n' + 1000 * "-",
        }
        for i in range(13_000)
    ]
    with open(tmp_path / "m.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["image_a", "image_b", "note"])
        writer.writeheader()
        writer.writerows(expected)
    pairs, carried = rows_of(Manifest.open(tmp_path / "m.csv"))
    assert carried.to_pylist() == expected
    assert pairs == [tuple(f"{tmp_path}/{row[name]}" for name in ("image_a", "image_b")) for row in expected]
    assert len(list(carried.to_batches())) > 2


def test_other_columns_may_hold_the_images(tmp_path):
    path = write(tmp_path / "m.csv", "left,right,image_a\na,b,1\n")
    pairs, carried = rows_of(Manifest.open(path, columns=Columns("left", "right")))
    assert pairs == [(f"{tmp_path}/a", f"{tmp_path}/b")]
    assert carried.to_pylist() == [{"left": "a", "right": "b", "image_a": 1}]


def test_the_fingerprint_is_that_of_the_bytes(tmp_path):
    path = write(tmp_path / "m.csv", TEXT)
    first = Manifest.open(path).fingerprint
    assert Manifest.open(write(tmp_path / "n.csv", TEXT)).fingerprint == first
    assert Manifest.open(write(tmp_path / "m.csv", TEXT + "a,0,b,1,x\n")).fingerprint != first
    renamed = frame().rename(columns={"name": "other"})
    assert Manifest.open(frame()).fingerprint == Manifest.open(frame()).fingerprint
    assert Manifest.open(frame()).fingerprint != Manifest.open(renamed).fingerprint


def test_the_fingerprint_of_a_table_knows_what_its_categories_stand_for():
    def fingerprint(*names: str) -> str:
        cells = pd.Categorical.from_codes([0, 1, 0], pd.Index(names))
        return Manifest.open(pd.DataFrame({"image_a": cells, "image_b": ["x", "y", "z"]})).fingerprint

    assert fingerprint("a.jpg", "b.jpg") == fingerprint("a.jpg", "b.jpg")
    assert fingerprint("a.jpg", "b.jpg") != fingerprint("b.jpg", "a.jpg")
