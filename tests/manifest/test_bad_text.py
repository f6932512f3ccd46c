"""CSV files that nobody would write by hand, drawn by hypothesis: every row comes back exactly, or one clear error.

Each is compared with another reading: Python's `csv`, or the cells that were drawn.
BATCHVERIFY_FUZZ=N tries N times as many, other ones each time.
"""

import bz2
import csv
import gzip
import io
import math
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from bad_manifests import LABELS, damaged, put, read, resolved, tries
from hypothesis import example, given
from hypothesis import strategies as st

OUTPUTS = {"true_label", "probability", "similarity", "status", "error_a", "error_b"}
BREAK_MARKS = "\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bad")


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
NAMES = st.sampled_from(["label", "n", "", " n", "ä", 'q"', "a,b", "x\ny", "image_a", "status", "true_label", "\0"])


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


def test_huge_headers(folder):
    names = [f"column number {number}" for number in range(3_000)]
    for more, is_read in (([], True), (names[:1], False), (["x" * 5_000_000], False)):
        header = ["image_a", "image_b", *names, *more]
        data = written([header, ["x"] * len(header)], {"lineterminator": "\n"}, ends=True).encode()
        path = put(folder, "m.csv", data)
        assert (read(path, str(path)) is not None) == is_read
