"""Parquet files and tables in memory that nobody would write by hand, drawn by hypothesis.

Every row comes back exactly, or one clear error. Each is compared with another reading: pyarrow alone, or the cells
that were drawn. BATCHVERIFY_FUZZ=N tries N times as many, other ones each time.
"""

import datetime
import decimal
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_manifests import LABELS, Rows, damaged, put, read, resolved, tries
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bad")


MOMENT = datetime.datetime(2024, 1, 2, 3, 4, 5, 678)
WORDS = ["x", None, "ä", ""]
NUMBERS = [1, None, -3, 7]
PATHS = {
    "string": pa.array(["a.jpg", None, "../b.jpg", ""]),
    "large": pa.array(["a.jpg", "é/日.jpg", "x\0y", "s3://b/k"], pa.large_string()),
    "view": pa.array(["a.jpg", None, "a much longer path than twelve bytes.jpg", "c"], pa.string_view()),
    "dictionary": pa.array(["a.jpg", "b.jpg", None, "a.jpg"]).dictionary_encode(),
    "large dictionary": pa.array(["a", "b", None, "a"], pa.large_string()).dictionary_encode(),
    "nulls in a dictionary": pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 1], pa.int8()), ["a", None]),
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
    "decimal": pa.array([decimal.Decimal(0), decimal.Decimal(1), None, decimal.Decimal(1)], pa.decimal128(9, 2)),
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
    "wide decimal": pa.array([decimal.Decimal(10) ** 70, None, None, decimal.Decimal(0)], pa.decimal256(76, 2)),
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
    "list of dictionary": pa.array([["x"], None, [], ["y", "x"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
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
            assert carried["true_label"].to_pylist() == [as_label(cell) for cell in expected["label"].to_pylist()]
    for field in carried.schema:
        assert field.name == "true_label" or pa.types.is_string(field.type) or field == expected.field(field.name)


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
        source = pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], table.column_names)
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
        [os.fspath(cell) if is_path(cell) else None for cell in pd.Series(OBJECTS[kind])[:rows]] for kind in (a, b)
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
