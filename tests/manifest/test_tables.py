"""Manifest files of every kind: which are found, how they are read, and messages about bad ones."""

import bz2
import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import s3_client, s3_options, s3_server

from batchverify.errors import ManifestError, UsageError
from batchverify.manifest.check import look_up
from batchverify.manifest.manifest import Manifest
from batchverify.manifest.tables import BLOCK_BYTES, TableFile, find_files, table_of
from batchverify.records import Limits, Reason
from batchverify.storage.location import Location

HEADER = b"image_a,image_b\n"
ROWS = b"".join(b"row%d.jpg,y.jpg\n" % number for number in range(100))
# More than a block of 300,000 rows.
LONG = ROWS * 3000


def read(path: Path) -> list[dict[str, str]]:
    file = TableFile(Location.parse(path))
    return [row for batch in file.batches(file.schema()) for row in batch.to_pylist()]


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


PAIR = {"image_a": "x", "image_b": "y"}
READABLE = {
    "plain.csv": (b"image_a,image_b\nx,y\n", [PAIR]),
    "no_end.csv": (b"image_a,image_b\nx,y", [PAIR]),
    "mark.csv": (b"\xef\xbb\xbfimage_a,image_b\nx,y\n", [PAIR]),
    "dos.csv": (b"image_a,image_b\r\nx,y\r\n\r\n", [PAIR]),
    "mac.csv": (b"image_a,image_b\rx,y\r", [PAIR]),
    "tabs.tsv": (b"image_a\timage_b\nx,1\ty\n", [{"image_a": "x,1", "image_b": "y"}]),
    "tabs.tab.gz": (gzip.compress(b"image_a\timage_b\nx\ty\n"), [PAIR]),
    "LOUD.CSV.GZ": (gzip.compress(b"image_a,image_b\nx,y\n"), [PAIR]),
    "packed.csv.bz2": (bz2.compress(b"image_a,image_b\nx,y\n"), [PAIR]),
    "two_members.csv.gz": (gzip.compress(HEADER + b"x,y\n") + gzip.compress(b"x,y\n"), [PAIR, PAIR]),
    "no_ending": (b"image_a,image_b\nx,y\n", [PAIR]),
    "quotes.csv": (b'image_a,image_b\n"x ""1"", 2",y\n', [{"image_a": 'x "1", 2', "image_b": "y"}]),
    "blank.csv": (
        b"image_a,image_b,c\nx,y,\n,,\n",
        [{**PAIR, "c": ""}, {"image_a": "", "image_b": "", "c": ""}],
    ),
    "words.csv": (b"image_a,image_b\nNA,null\n", [{"image_a": "NA", "image_b": "null"}]),
    "unicode.csv": ("image_a,image_b\nä é,日\n".encode(), [{"image_a": "ä é", "image_b": "日"}]),
    "last_break.csv": (b'image_a,image_b\nx,"y\n"\n', [{"image_a": "x", "image_b": "y\n"}]),
    "last_break_inside.csv": (b'image_a,image_b\nx,"y\nz"', [{"image_a": "x", "image_b": "y\nz"}]),
    "after_a_quote.csv": (b'image_a,image_b\nx,"y\n"z\n', [{"image_a": "x", "image_b": "y\nz"}]),
    "one_without_name.csv": (b",image_a,image_b\n0,x,y\n", [{"": "0", **PAIR}]),
    "quoted_names.csv": (b'"a;\nb",image_a,image_b\n0,x,y\n', [{"a;\nb": "0", **PAIR}]),
    "header_only.csv": (HEADER, []),
}


@pytest.mark.parametrize("name", READABLE)
def test_reads(tmp_path, name):
    data, rows = READABLE[name]
    assert read(put(tmp_path / name, data)) == rows


BROKEN = [
    ("a.csv", b"", "the file has no rows; it needs a header with image_a and image_b, and rows below it"),
    ("a.csv", b"\n\n", "the file has no rows"),
    ("a.csv", b"\xef\xbb\xbf", "the file has no rows"),
    ("a.csv", b"image_a,image_b", "the file has no rows"),
    ("a.csv", HEADER + b"x,y\n\n\nx,y,z\n", "row 2: expected 2 columns, found 3: 'x,y,z'"),
    ("a.csv", HEADER + ROWS + b"q\n", "row 101: expected 2 columns, found 1: 'q'"),
    ("a.csv", HEADER + b"x,y\nx,\xff\n", "row 2: column 'image_b': not UTF-8"),
    ("a.csv", b"image_\xff,image_b\nx,y\n", "the column names are not UTF-8"),
    (
        "a.csv",
        HEADER + b'x,"y\n' + ROWS,
        "row 1: column 'image_b' runs to the end of the file; is a quote left open?",
    ),
    (
        "a.csv",
        HEADER + b'x,"y\nz,w',
        "row 1: column 'image_b' runs to the end of the file; is a quote left open?",
    ),
    ("a.csv", HEADER + b'x,"y\nz,""\n', "row 1: column 'image_b' runs to the end of the file"),
    ("a.csv", "image_a,image_b\nx,y\n".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    ("a.csv", b"PK\x03\x04rest", "a zip or Excel file; save it as CSV"),
    ("a.csv", b"PAR1rest", "a Parquet file; give it a name that ends in .parquet"),
    ("a.csv", gzip.compress(HEADER, mtime=0), "compressed; give it a name that ends in .csv.gz"),
    ("a.csv.gz", HEADER + ROWS, "cannot be read: zlib inflate failed: incorrect header check"),
    ("a.csv.gz", gzip.compress(HEADER + ROWS, mtime=0)[:-20], "cannot be read: Truncated compressed stream"),
    ("a.parquet", b"", "not a readable Parquet file: Parquet file size is 0 bytes"),
    ("a.parquet", HEADER + ROWS, "not a readable Parquet file: Parquet magic bytes not found in footer."),
    ("a.parquet.gz", b"\x1f\x8b", "a compressed Parquet file; unpack it first"),
]


@pytest.mark.parametrize(("name", "data", "message"), BROKEN)
def test_broken_files_are_named_in_one_line(tmp_path, name, data, message):
    path = put(tmp_path / name, data)
    with pytest.raises(ManifestError) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: {message}")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (b"q\n", "row 300001: expected 2 columns, found 1: 'q'"),
        (b"q,\xff\n", "row 300001: column 'image_b': not UTF-8"),
        (b'q,"' + b"x" * 2 * BLOCK_BYTES + b'"\n', "row 300001: longer than 4 MB"),
    ],
)
def test_rows_are_counted_across_blocks(tmp_path, last, message):
    path = put(tmp_path / "a.csv", HEADER + LONG + last)
    with pytest.raises(ManifestError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_an_open_quote_in_a_large_file_is_named_by_its_row(tmp_path):
    path = put(tmp_path / "a.csv", HEADER + ROWS + b'x,"y\n' + ROWS * 7000)
    with pytest.raises(ManifestError, match=r"row 101: longer than 4 MB; is a quote left open\?"):
        read(path)


@pytest.mark.parametrize("shift", range(12))
def test_quoted_line_breaks_across_block_borders(tmp_path, shift):
    # Each shift moves the border of the blocks to another byte of a row.
    first = {"image_a": "s" * shift, "image_b": "t"}
    expected = [
        first,
        *({"image_a": f"{number:07}\n\n{number}", "image_b": "a,b\nc"} for number in range(170_000)),
    ]
    text = "".join(f'"{row["image_a"]}","{row["image_b"]}"\n' for row in expected)
    path = put(tmp_path / "a.csv", HEADER + text.encode())
    assert len(text) > BLOCK_BYTES
    file = TableFile(Location.parse(path))
    batches = list(file.batches(file.schema()))
    assert len(batches) > 1
    assert [row for batch in batches for row in batch.to_pylist()] == expected


def test_a_damaged_parquet_page_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"image_a": [f"{number}" for number in range(5000)], "image_b": ["y"] * 5000})
    pq.write_table(table, path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[200:2000] = bytes(1800)
    path.write_bytes(data)
    with pytest.raises(ManifestError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_with_other_columns_than_before_is_refused(tmp_path):
    path = put(tmp_path / "a.csv", HEADER + b"x,y\n")
    file = TableFile(Location.parse(path))
    schema = file.schema()
    put(path, b"image_b,image_a\ny,x\n")
    with pytest.raises(ManifestError, match=r"a\.csv: the file changed while it was read: other columns"):
        list(file.batches(schema))
    path.unlink()
    with pytest.raises(ManifestError, match=r"a\.csv: no such file"):
        list(file.batches(schema))


@pytest.fixture
def tree(tmp_path):
    for name in (
        "b.csv",
        "a.csv",
        "c.parquet",
        "d.tsv.gz",
        "_e.csv",
        ".f.csv",
        "readme.txt",
        "sub/g.csv",
        "[h].csv",
    ):
        put(tmp_path / name, HEADER)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a.csv", ["a.csv"]),
        ("readme.txt", ["readme.txt"]),
        ("[h].csv", ["[h].csv"]),
        ("", ["[h].csv", "a.csv", "b.csv", "c.parquet", "d.tsv.gz"]),
        ("*.csv", ["[h].csv", "a.csv", "b.csv"]),
        ("[ab].csv", ["a.csv", "b.csv"]),
        ("**/*.csv", ["[h].csv", "a.csv", "b.csv", "sub/g.csv"]),
        ("s?b/*", ["sub/g.csv"]),
    ],
)
def test_find_files(tree, source, expected):
    assert [each.path for each in find_files(f"{tree}/{source}")] == [f"{tree}/{name}" for name in expected]
    uri = f"file://{tree}/{source}"
    assert [each.path for each in find_files(uri)] == [f"{tree}/{name}" for name in expected]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nope.csv", "no such file or folder"),
        ("a.csv/b.csv", "no such file or folder"),
        ("empty", "the folder holds no .csv, .tsv or .parquet file"),
        ("*.xlsx", "no .csv, .tsv or .parquet file matches"),
        ("*.txt", "no .csv, .tsv or .parquet file matches"),
        ("x" * 300, "cannot be read: "),
    ],
)
def test_nothing_found(tree, source, message):
    with pytest.raises(ManifestError) as caught:
        find_files(f"{tree}/{source}")
    assert str(caught.value).startswith(f"{tree}/{source}: {message}")


def test_pipes_devices_and_sockets_are_called_what_they_are(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    inside, outside = os.pipe()
    try:
        for source, kind in (
            (tmp_path / "a.csv", "a pipe"),
            (f"/dev/fd/{inside}", "a pipe"),
            ("/dev/null", "a device"),
        ):
            with pytest.raises(ManifestError) as caught:
                find_files(str(source))
            message = f"{source}: {kind}; a manifest is read more than once: save it to a file"
            assert str(caught.value) == message
    finally:
        os.close(inside)
        os.close(outside)
    with pytest.raises(UsageError, match="-: standard input and output cannot be read twice"):
        find_files("-")


@pytest.fixture(scope="module")
def bucket():
    """A real S3 server on this machine: `bucket(path)` is a URI."""
    with s3_server() as address:
        client = s3_client(address)
        client.create_bucket(Bucket="faces")
        for key in (
            "m/a.csv",
            "m/b.csv",
            "m/_SUCCESS",
            "m/sub/c.csv",
            "m/sub/deep/d.csv",
            "n/e.parquet",
            "n/notes.md",
        ):
            client.put_object(Bucket="faces", Key=key, Body=HEADER + b"x,y\n")
        yield lambda path: f"s3://{path}{s3_options(address)}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("faces/m/a.csv", ["m/a.csv"]),
        ("faces/m", ["m/a.csv", "m/b.csv"]),
        ("faces/m/*.csv", ["m/a.csv", "m/b.csv"]),
        ("faces/*/[a-c].csv", ["m/a.csv", "m/b.csv"]),
        ("faces/m/**/*.csv", ["m/a.csv", "m/b.csv", "m/sub/c.csv", "m/sub/deep/d.csv"]),
        ("faces/**/e.*", ["n/e.parquet"]),
    ],
)
def test_find_files_in_an_object_store(bucket, source, expected):
    found = find_files(bucket(source))
    assert [each.path for each in found] == [f"faces/{key}" for key in expected]
    file = TableFile(find_files(bucket("faces/m/a.csv"))[0])
    assert [batch.to_pylist() for batch in file.batches(file.schema())] == [[PAIR]]


def test_a_manifest_in_an_object_store_is_read_and_checked(bucket):
    manifest = Manifest.open(bucket("faces/m"))
    scan = manifest.scan()
    assert list(scan.images) == [bucket("faces/m/x"), bucket("faces/m/y")]
    assert scan.file_rows == (1, 1)
    assert [(block.first, block.a.tolist(), block.b.tolist()) for block in manifest.blocks(scan)] == [
        (0, [0], [1]),
        (1, [0], [1]),
    ]
    found = look_up([bucket("faces/m/x"), bucket("faces/m/a.csv"), bucket("nobucket/x")], Limits())
    assert {position: skipped.reason for position, skipped in found.items()} == {
        0: Reason.NOT_FOUND,
        2: Reason.NOT_FOUND,
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("faces/m/nope.csv", "no such file or folder"),
        ("faces/m/*.tsv", "no .csv, .tsv or .parquet file matches"),
        ("nobucket/a.csv", "no such file or folder"),
    ],
)
def test_nothing_found_in_an_object_store(bucket, source, message):
    with pytest.raises(ManifestError, match=message):
        find_files(bucket(source))


def test_what_is_no_table_is_refused():
    with pytest.raises(UsageError, match="a manifest is a path, a DataFrame or an Arrow table, not int"):
        table_of(3)
