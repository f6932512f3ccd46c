"""Manifests that nobody would write by hand, drawn by hypothesis: every row comes back exactly, or one clear error.

Each is compared with another reading: Python's `csv`, pyarrow alone, or the cells that were drawn.
BATCHVERIFY_FUZZ=N tries N times as many, other ones each time.
"""

import bz2
import csv
import datetime
import decimal
import gzip
import io
import math
import os
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batchverify.errors import UsageError
from batchverify.manifest.manifest import Manifest
from batchverify.manifest.paths import ImageRoot
from batchverify.records import Skipped
from batchverify.storage.location import Location

FACTOR = int(os.environ.get("BATCHVERIFY_FUZZ", "1"))
OUTPUTS = {"true_label", "probability", "similarity", "status", "error_a", "error_b"}
LABELS = {"0": 0, "1": 1, "": None, " 1": 1, "TRUE": 1, "f": 0, "NA": None, "0.0": 0}
BREAK_MARKS = "\r\n"


def tries(count: int) -> Callable:
    """Settings of a property: the same examples in every run, unless more are asked for."""
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bad")


Rows = tuple[list[tuple[str | Skipped, str | Skipped]], pa.Table]


def read(source: Any, name: str) -> Rows | None:
    """The images and columns of every row, or None if the manifest is refused with a message that names it."""
    try:
        manifest = Manifest.open(source)
        scan = manifest.scan()
        blocks = list(manifest.blocks(scan))
    except UsageError as exc:
        assert str(exc).startswith(f"{name}: ") and "\n" not in str(exc), str(exc)  # noqa: PT017
        return None
    pairs = [
        (scan.images[a], scan.images[b]) for block in blocks for a, b in zip(block.a, block.b, strict=True)
    ]
    return pairs, pa.Table.from_batches([block.carried for block in blocks], scan.carried)


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def resolved(folder: Path, cells: list[str | None]) -> list[str | Skipped]:
    root = ImageRoot(Location.parse(folder))
    return [root.resolve(cell) for cell in cells]


# Text

Table = list[list[str]]
INTERESTING = (
    *(
        "",
        " ",
        "a.jpg",
        "ä/日.jpg",
        "../x",
        "0",
        "1",
        "007",
        "1.50",
        "-0.0",
        "0.1",
        "9" * 19,
        "nan",
        "NA",
        "true",
    ),
    *(
        "a,b",
        'q"',
        '"',
        '""',
        "x\ny",
        "x\r\ny",
        "\r",
        "\n",
        "\t",
        ";",
        "\0",
        "\ufeff",
        "\u2028",
        "\x1c",
        "s3://b/k",
    ),
)
CELLS = st.sampled_from(INTERESTING) | st.text('ab,";\t\n\r\0é日😀 .0', max_size=6)
NAMES = st.sampled_from(
    ["label", "n", "", " n", "ä", 'q"', "a,b", "x\ny", "image_a", "status", "true_label", "\0"]
)


@st.composite
def tables(draw: Any) -> Table:
    """A header and rows; seldom a row is too short or too long."""
    names = draw(st.permutations(["image_a", "image_b", *draw(st.lists(NAMES, max_size=3))]))
    labels = st.sampled_from(list(LABELS)) if draw(st.booleans()) else CELLS
    row = st.tuples(*(labels if name == "label" else CELLS for name in names)).map(list)
    rows = draw(st.lists(row, max_size=5))
    if rows and not draw(st.integers(0, 9)):
        rows[draw(st.integers(0, len(rows) - 1))][-1:] = draw(
            st.lists(CELLS, max_size=2).filter(lambda x: len(x) != 1)
        )
    return [names, *rows]


DIALECTS = st.fixed_dictionaries(
    {
        "delimiter": st.sampled_from([",", "\t", ";"]),
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
        "lineterminator": st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
    }
)


def written(table: Table, dialect: dict[str, Any], *, ends: bool) -> str:
    """A table as text. ends: with a line break after the last row."""
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows(table)
    text = file.getvalue()
    return text if ends else text.removesuffix(dialect["lineterminator"])


def reading(data: bytes, delimiter: str, *, strict: bool = False) -> Table | None:
    """The table by Python's `csv`, without empty lines; None if it is none. strict: open quotes are refused, too."""
    try:
        text = io.StringIO(data.decode("utf-8-sig"), newline="")
        return [row for row in csv.reader(text, delimiter=delimiter, strict=strict) if row]
    except (UnicodeDecodeError, csv.Error):
        return None


def has_open_quote(data: bytes, delimiter: str) -> bool:
    """Whether a quote that never ends swallows rows."""
    try:
        list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=delimiter, strict=True))
    except csv.Error as exc:
        table = reading(data, delimiter) or [[""]]
        return "unexpected end" in str(exc) and any(mark in table[-1][-1] for mark in BREAK_MARKS)
    except UnicodeDecodeError:
        pass
    return False


def is_good(table: Table | None) -> bool:
    """Whether a table is a manifest beyond doubt, which must be read."""
    if table is None or len(table) < 2 or any(len(row) != len(table[0]) for row in table):
        return False
    names = table[0]
    if len(set(names)) < len(names) or not {"image_a", "image_b"} <= set(names) or OUTPUTS & set(names):
        return False
    return "label" not in names or all(row[names.index("label")] in LABELS for row in table[1:])


def same_cell(value: Any, cell: str) -> bool:
    """Whether a value of a carried column is what the cell of a CSV says."""
    if isinstance(value, float):
        return float(cell) == value and math.copysign(1, float(cell)) == math.copysign(1, value)
    return cell == ("" if value is None else str(value))


def check_text(path: Path, data: bytes) -> None:
    """Read a text file that holds `data`, perhaps packed, and compare."""
    delimiter = "\t" if ".tsv" in path.name else ","
    found, table = read(path, str(path)), reading(data, delimiter)
    if found is None:
        assert not is_good(reading(data, delimiter, strict=True)), "a good manifest is refused"
        return
    assert table is not None and not has_open_quote(data, delimiter), "read, though it is broken"
    (names, *rows), (pairs, carried) = table, found
    assert all(len(row) == len(names) for row in rows) and len(rows) == len(pairs), "rows are lost"
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    sides = [resolved(path.parent, list(columns[name])) for name in ("image_a", "image_b")]
    assert pairs == list(zip(*sides, strict=True))
    assert carried.column_names == ["true_label" if name == "label" else name for name in names]
    for name, cells in columns.items():
        values = carried["true_label" if name == "label" else name].to_pylist()
        if name == "label":
            assert all(LABELS.get(cell, value) == value for cell, value in zip(cells, values, strict=True))
        else:
            assert all(map(same_cell, values, cells)), (name, values, cells)


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress}
ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp1252", "utf-7")


@tries(150)
@given(tables(), DIALECTS, st.booleans())
@example([["image_a", "image_b"], ["x", "y\n"]], {"delimiter": ","}, False)
def test_text_of_every_dialect_encoding_and_packing(folder, table, dialect, ends):
    text = written(table, {"lineterminator": "\n", **dialect}, ends=ends)
    data = text.encode()
    name = {"\t": "m.tsv"}.get(dialect["delimiter"], "m.csv")
    check_text(put(folder, name, data), data)
    for suffix, pack in PACKERS.items():
        check_text(put(folder, name + suffix, pack(data)), data)
    for encoding in ENCODINGS:
        encoded = text.encode(encoding, "replace")
        check_text(put(folder, name, encoded), encoded)


SPICE = (
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xc3",
    b'""',
    b"\r\n\r\n",
    b"x",
    b"sep=,\n",
    b" ",
)


def damaged(data: bytes, chance: random.Random, spice: tuple[bytes, ...] = SPICE) -> bytes:
    """Data with one to three cuts, insertions, deletions, repetitions or flipped bits."""
    for _ in range(chance.randint(1, 3)):
        at, size = chance.randrange(len(data) + 1), chance.randint(1, 4)
        kind = chance.randrange(5)
        if kind == 0:
            data = data[:at] + chance.choice(spice) + data[at:]
        elif kind == 1:
            data = data[:at] + data[at + size :]
        elif kind == 2:
            data = data[:at] + data[at : at + 8 * size] * 2 + data[at + 8 * size :]
        elif kind == 3 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        elif at > len(data) // 2:
            data = data[:at]
    return data


@tries(250)
@given(tables(), DIALECTS, st.booleans(), st.integers(0, 2**32))
def test_text_with_damaged_bytes(folder, table, dialect, ends, seed):
    data = written(table, dialect, ends=ends).encode()
    chance = random.Random(seed)
    for _ in range(12):
        broken = damaged(data, chance)
        check_text(put(folder, "m.csv", broken), broken)


LONG = "image_a,image_b,n\n" + "".join(f"{number}.jpg,x.jpg,{number}\n" for number in range(500))


def unpacked(data: bytes, suffix: str) -> bytes | None:
    """The content of a packed file, by Python alone; None if it is damaged. zstd: unknown."""
    try:
        return gzip.decompress(data) if suffix == ".gz" else bz2.decompress(data)
    except (OSError, EOFError, ValueError, zlib.error):
        return None


@tries(100)
@given(st.sampled_from(sorted(PACKERS)), st.integers(0, 2**32))
def test_packed_files_with_damaged_bytes(folder, suffix, seed):
    chance, whole = random.Random(seed), PACKERS[suffix](LONG.encode())
    for _ in range(12):
        # zstd as pyarrow writes it has no checksum: of flipped bytes nobody can know.
        cut = suffix == ".zst" or chance.random() < 0.3
        broken = whole[: chance.randrange(1, len(whole))] if cut else damaged(whole, chance, (b"\0", b"x"))
        path = put(folder, f"m.csv{suffix}", broken)
        if read(path, str(path)) is not None:
            content = unpacked(broken, suffix) if suffix != ".zst" else None
            assert content is not None, "a damaged file is read"
            check_text(path, content)


# Parquet and tables in memory

MOMENT = datetime.datetime(2024, 1, 2, 3, 4, 5, 678)
WORDS = ["x", None, "ä", ""]
NUMBERS = [1, None, -3, 7]
PATHS = {
    "string": pa.array(["a.jpg", None, "../b.jpg", ""]),
    "large": pa.array(["a.jpg", "é/日.jpg", "x\0y", "s3://b/k"], pa.large_string()),
    "view": pa.array(["a.jpg", None, "a much longer path than twelve bytes.jpg", "c"], pa.string_view()),
    "dictionary": pa.array(["a.jpg", "b.jpg", None, "a.jpg"]).dictionary_encode(),
    "large dictionary": pa.array(["a", "b", None, "a"], pa.large_string()).dictionary_encode(),
    "nulls in a dictionary": pa.DictionaryArray.from_arrays(
        pa.array([0, 1, None, 1], pa.int8()), ["a", None]
    ),
    "nulls": pa.nulls(4),
    "not UTF-8": pa.array([b"a.jpg", b"\xff", b"b", None]).view(pa.string()),
    "bytes": pa.array([b"a", b"b", b"c", None]),
    "numbers": pa.array(NUMBERS),
}
LABELLED = {
    "int8": pa.array([0, 1, None, 1], pa.int8()),
    "uint64": pa.array([0, 1, None, 1], pa.uint64()),
    "bool": pa.array([False, True, None, True]),
    "half": pa.array([np.float16(value) for value in (0, 1, np.nan, 1)], pa.float16()),
    "float": pa.array([-0.0, 1, math.nan, None], pa.float32()),
    "decimal": pa.array(
        [decimal.Decimal(0), decimal.Decimal(1), None, decimal.Decimal(1)], pa.decimal128(9, 2)
    ),
    "wide decimal": pa.array([decimal.Decimal(0), None, None, decimal.Decimal(1)], pa.decimal256(60, 2)),
    "text": pa.array(["0", "true", None, " NA "]),
    "views": pa.array(["0", "1", None, ""], pa.string_view()),
    "dictionary": pa.array(["0", "1", None, "1"]).dictionary_encode(),
    "numbers in a dictionary": pa.array([0, 1, None, 1]).dictionary_encode(),
    "nulls": pa.nulls(4),
    "two": pa.array([0, 1, 2, None]),
    "words": pa.array(["0", "same", None, "1"]),
    "list": pa.array([[0], [1], None, []]),
    "moments": pa.array([MOMENT, None, MOMENT, MOMENT]),
    "not UTF-8": pa.array([b"0", b"\xff", None, b"1"]).view(pa.string()),
}
PAIRS = pa.array([{"x": 1, "y": "z"}, None, {"x": None, "y": "é"}, {"x": 2, "y": None}])
CARRIED = {
    "int": pa.array(NUMBERS),
    "uint64": pa.array([2**64 - 1, None, 0, 1], pa.uint64()),
    "half": pa.array([np.float16(1.5), None, np.float16(np.inf), np.float16(np.nan)], pa.float16()),
    "double": pa.array([math.nan, None, -0.0, 1e300]),
    "bool": pa.array([True, None, False, True]),
    "text": pa.array(WORDS),
    "view": pa.array(["more than twelve bytes", None, "", "x"], pa.string_view()),
    "bytes": pa.array([b"\xff\0", None, b"", b"x"]),
    "bytes view": pa.array([b"\xff more than twelve bytes", None, b"", b"x"], pa.binary_view()),
    "fixed bytes": pa.array([b"abc", None, b"\0\0\0", b"xyz"], pa.binary(3)),
    "not UTF-8": pa.array([b"a", b"\xff", None, b"b"]).view(pa.string()),
    "not UTF-8 inside": pa.array([[b"a"], [b"\xff"], None, []])
    .cast(pa.list_(pa.binary()))
    .view(pa.list_(pa.string())),
    "nulls": pa.nulls(4),
    "decimal": pa.array(
        [decimal.Decimal("1.50"), None, decimal.Decimal(-2), decimal.Decimal(0)], pa.decimal128(9, 2)
    ),
    "wide decimal": pa.array(
        [decimal.Decimal(10) ** 70, None, None, decimal.Decimal(0)], pa.decimal256(76, 2)
    ),
    "small decimal": pa.array([decimal.Decimal("1.5"), None, None, decimal.Decimal(0)], pa.decimal128(4, 1)),
    "day": pa.array([MOMENT.date(), None, datetime.date(1, 1, 1), datetime.date(9999, 12, 31)]),
    "day64": pa.array([MOMENT.date(), None, datetime.date(1, 1, 1), MOMENT.date()], pa.date64()),
    "time": pa.array([MOMENT.time(), None, datetime.time(0), datetime.time(23, 59)], pa.time64("us")),
    "moment": pa.array([MOMENT, None, datetime.datetime(1, 1, 1), MOMENT], pa.timestamp("us")),
    "zone": pa.array([MOMENT, None, MOMENT, MOMENT], pa.timestamp("ms", "Asia/Kathmandu")),
    "offset": pa.array([MOMENT, None, MOMENT, MOMENT], pa.timestamp("us", "+05:45")),
    "no zone": pa.array([1, None, 2, 3], pa.timestamp("us", "Mars/Olympus")),
    "nanoseconds": pa.array([1, None, 2**62, -(2**62)], pa.timestamp("ns")),
    "seconds": pa.array([1, None, 2, 3], pa.timestamp("s")),
    "far seconds": pa.array([2**62, None, 0, 1], pa.timestamp("s")),
    "span": pa.array([1, None, -1, 2**62], pa.duration("ns")),
    "interval": pa.array([(1, 2, 3), None, (0, 0, 0), (-1, 0, 0)], pa.month_day_nano_interval()),
    "list": pa.array([[1, None], None, [], [2]], pa.list_(pa.int16())),
    "large list": pa.array([["x"], None, [], [None]], pa.large_list(pa.string())),
    "fixed list": pa.array([[1, 2], None, [3, None], [4, 5]], pa.list_(pa.int8(), 2)),
    "list view": pa.array([[1], None, [], [2, 3]], pa.list_view(pa.int32())),
    "map": pa.array([[("k", 1)], None, [], [("k", None)]], pa.map_(pa.string(), pa.int64())),
    "struct": PAIRS,
    "no fields": pa.array([{}, None, {}, {}], pa.struct([])),
    "deep": pa.array([[{"x": [{"y": None}]}], None, [], [{"x": None}]]),
    "dictionary": pa.array(WORDS).dictionary_encode(),
    "number dictionary": pa.array(NUMBERS).dictionary_encode(),
    "list of dictionary": pa.array(
        [["x"], None, [], ["y", "x"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))
    ),
    "sparse union": pa.UnionArray.from_sparse(
        pa.array([0, 1, 0, 1], pa.int8()), [pa.array(NUMBERS), pa.array(WORDS)]
    ),
    "dense union": pa.UnionArray.from_dense(
        pa.array([0, 1, 0, 1], pa.int8()),
        pa.array([0, 0, 1, 1], pa.int32()),
        [pa.array([1, 2]), pa.array(["x", None])],
    ),
    "runs": pa.RunEndEncodedArray.from_arrays(pa.array([1, 3, 4], pa.int32()), pa.array(["x", None, "y"])),
    "uuid": pa.ExtensionArray.from_storage(
        pa.uuid(), pa.array([b"0" * 16, None, b"1" * 16, b"2" * 16], pa.binary(16))
    ),
    "tensor": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int32(), [2]),
        pa.array([[1, 2], None, [3, 4], [5, 6]], pa.list_(pa.int32(), 2)),
    ),
}
if hasattr(pa, "json_"):
    CARRIED["json"] = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', None, "[]", "1"]))
NOT_UTF8 = {"not UTF-8", "not UTF-8 inside"}
BAD_PATHS, BAD_LABELS = {"not UTF-8", "bytes", "numbers"}, {"two", "words", "list", "moments", "not UTF-8"}


@st.composite
def drawn_tables(draw: Any) -> tuple[pa.Table, bool]:
    """Up to four rows of image columns, perhaps a label, and other columns; whether they must be refused."""
    start, stop = sorted(draw(st.tuples(st.integers(0, 4), st.integers(0, 4))))
    kinds = {"image_a": PATHS, "image_b": PATHS, **({"label": LABELLED} if draw(st.booleans()) else {})}
    kinds |= dict.fromkeys(draw(st.lists(st.sampled_from(["n", "", "a.b", "é"]), max_size=3)), CARRIED)
    chosen = {name: draw(st.sampled_from(sorted(arrays))) for name, arrays in kinds.items()}
    cells = {name: arrays[chosen[name]].slice(start, stop - start) for name, arrays in kinds.items()}
    good = stop > start and not {chosen["image_a"], chosen["image_b"]} & BAD_PATHS
    good = good and not NOT_UTF8 & set(chosen.values()) and chosen.get("label") not in BAD_LABELS
    return pa.table(cells), good


def check_table(found: Rows | None, expected: pa.Table, root: Path, *, good: bool) -> None:
    """Compare what was read with a table that pyarrow read, or that was given."""
    if found is None:
        assert not good, "a good manifest is refused"
        return
    pairs, carried = found
    sides = [resolved(root, expected[name].cast(pa.string()).to_pylist()) for name in ("image_a", "image_b")]
    assert pairs == list(zip(*sides, strict=True))
    for name in expected.column_names:
        if name != "label":
            assert printed(carried[name]) == printed(expected[name]), name
        else:
            assert carried["true_label"].to_pylist() == [
                as_label(cell) for cell in expected["label"].to_pylist()
            ]
    for field in carried.schema:
        assert (
            field.name == "true_label"
            or pa.types.is_string(field.type)
            or field == expected.field(field.name)
        )


def printed(cells: pa.ChunkedArray) -> str:
    """Cells as text, in which NaN equals NaN; moments as numbers, since Python's own end in the year 9999."""
    return str((cells.cast(pa.int64()) if pa.types.is_timestamp(cells.type) else cells).to_pylist())


def as_label(value: Any) -> int | None:
    if value is None or value != value:
        return None
    return LABELS[value.strip()] if isinstance(value, str) and value not in ("true",) else int(bool(value))


WRITERS = st.fixed_dictionaries(
    {
        "version": st.sampled_from(["1.0", "2.4", "2.6"]),
        "data_page_version": st.sampled_from(["1.0", "2.0"]),
        "compression": st.sampled_from(["none", "snappy", "gzip", "zstd", "lz4", "brotli"]),
        "use_dictionary": st.booleans(),
        "use_deprecated_int96_timestamps": st.booleans(),
        "row_group_size": st.sampled_from([1, 2, 100]),
        "store_schema": st.booleans(),
        "write_page_checksum": st.booleans(),
    }
)


@tries(450)
@given(drawn_tables(), WRITERS)
def test_parquet_of_every_type(folder, drawn, options):
    table, good = drawn
    path = folder / "m.parquet"
    try:
        pq.write_table(table, path, **options)
        expected = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException):
        good, expected = False, table
    # Without its schema, a file holds bytes where Parquet has no such type.
    check_table(read(path, str(path)), expected, folder, good=good and options["store_schema"])


@tries(450)
@given(drawn_tables(), st.integers(0, 4), st.sampled_from(["table", "chunks", "reader", "batch"]))
def test_tables_in_memory(monkeypatch, folder, drawn, cut, kind):
    table, good = drawn
    monkeypatch.chdir(folder)
    source: Any = table
    if kind == "chunks":
        source = table = pa.concat_tables([table.slice(0, cut), table.slice(0, 0), table.slice(cut)])
    elif kind == "reader":
        source = pa.RecordBatchReader.from_batches(table.schema, table.to_batches())
    elif kind == "batch":
        source = pa.RecordBatch.from_arrays(
            [column.combine_chunks() for column in table.columns], table.column_names
        )
    check_table(read(source, "the table"), table, folder, good=good)


OBJECTS = {
    "paths": [Path("a.jpg"), Path("/b.jpg"), Path("c")],
    "words": ["x", "ä", ""],
    "mixed paths": [Path("a.jpg"), "b.jpg", None],
    "missing": ["x", None, math.nan],
    "pandas missing": ["x", pd.NA, pd.NaT],
    "mixed": ["x", 3, None],
    "bytes": [b"x", b"y", None],
    "numbers": [1, 0, 1],
    "floats": [1.0, math.nan, 0.0],
    "bools": [True, False, None],
    "big": [2**70, 1, 0],
    "complex": [1j, 0, 1],
    "arrays": [np.zeros(2), np.zeros(2), np.zeros(2)],
    "images": [np.zeros((2, 2, 3), np.uint8)] * 3,
    "lone surrogate": pd.Series(["\ud800", "x", "y"], dtype=object),
    "path that is not UTF-8": [Path("\udcff.jpg"), Path("x"), "y"],
    "dicts": [{"x": 1}, {}, None],
    "sets": [{1}, set(), None],
    "objects": [object(), object(), None],
    "moments": [MOMENT, MOMENT.replace(tzinfo=datetime.timezone.utc), None],
    "decimals": [decimal.Decimal(1), decimal.Decimal("NaN"), None],
    "category": pd.Categorical(["x", "y", None]),
    "strings": pd.array(["x", None, "y"], "string"),
    "periods": pd.period_range("2024", periods=3, freq="D"),
    "intervals": pd.interval_range(0, 3),
    "sparse": pd.arrays.SparseArray([0, 1, 0]),
    "zones": pd.date_range("2024", periods=3, tz="Asia/Kathmandu"),
}


def is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


@tries(350)
@given(
    *(st.sampled_from(sorted(OBJECTS)) for _ in range(3)),
    st.sampled_from(["n", "label", 7, "image_a", ("a", "b")]),
    st.integers(0, 3),
)
def test_frames(monkeypatch, folder, a, b, other, name, rows):
    monkeypatch.chdir(folder)
    frame = pd.concat([pd.Series(OBJECTS[kind]) for kind in (a, b, other)], axis=1)[:rows]
    frame.columns = pd.Index(["image_a", "image_b", name], tupleize_cols=False)
    found = read(frame, "the table")
    if found is None:
        good = {a, b, other} <= {"paths", "words", "mixed paths", "missing", "category", "strings"}
        assert not (good and rows and name in ("n", 7)), "a good frame is refused"
        return
    cells = [
        [os.fspath(cell) if is_path(cell) else None for cell in pd.Series(OBJECTS[kind])[:rows]]
        for kind in (a, b)
    ]
    assert found[0] == list(zip(*(resolved(folder, side) for side in cells), strict=True))


def parquet_samples() -> Iterator[bytes]:
    """Files of all pages, codecs and nested types, small enough that each damaged byte matters."""
    table = pa.table(
        {
            "image_a": [f"folder/{number}.jpg" for number in range(40)],
            "image_b": pa.array(["x.jpg", "y.jpg"] * 20).dictionary_encode(),
            "label": [0, 1] * 20,
            "list": [[number, None] for number in range(40)],
            "struct": [{"x": number, "y": f"{number}"} for number in range(40)],
            "moment": pa.array([MOMENT] * 40, pa.timestamp("ms", "UTC")),
        }
    )
    for options in (
        {"compression": "none", "use_dictionary": False},
        {"compression": "snappy", "row_group_size": 15},
        {"compression": "zstd", "data_page_version": "2.0", "store_schema": False},
        {"compression": "gzip", "use_deprecated_int96_timestamps": True, "write_page_checksum": True},
    ):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **options)
        yield sink.getvalue().to_pybytes()


SAMPLES = list(parquet_samples())
NUMBERS_BETWEEN = (b"\0", b"\xff", b"\x7f", b"\x15", b"PAR1", b"\x80\x80\x80\x80\x08")


def by_pyarrow(data: bytes) -> pa.Table | None:
    """A Parquet file by pyarrow alone; None if it cannot be read or its texts are not UTF-8."""
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        table.validate(full=True)
    except Exception:  # noqa: BLE001  damaged files make pyarrow raise many types
        return None
    return table


@tries(120)
@given(st.sampled_from(range(len(SAMPLES))), st.integers(0, 2**32))
def test_parquet_with_damaged_bytes(folder, sample, seed):
    chance = random.Random(seed)
    for _ in range(20):
        whole = SAMPLES[sample]
        if chance.random() < 0.5:
            # The footer, which says where everything is.
            middle = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
            broken = whole[:middle] + damaged(whole[middle:-8], chance, NUMBERS_BETWEEN) + whole[-8:]
        else:
            broken = damaged(whole, chance, NUMBERS_BETWEEN)
        path = put(folder, "m.parquet", broken)
        found = read(path, str(path))
        if found is not None:
            expected = by_pyarrow(broken)
            assert expected is not None, "a damaged file is read"
            check_table(found, expected, folder, good=False)


def test_huge_headers(folder):
    names = [f"column number {number}" for number in range(3_000)]
    for more, is_read in (([], True), (names[:1], False), (["x" * 5_000_000], False)):
        header = ["image_a", "image_b", *names, *more]
        data = written([header, ["x"] * len(header)], {"lineterminator": "\n"}, ends=True).encode()
        path = put(folder, "m.csv", data)
        assert (read(path, str(path)) is not None) == is_read
