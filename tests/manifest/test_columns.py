"""The columns of a manifest: names, types, labels of every type, lossless numbers."""

import decimal

import pyarrow as pa
import pytest

from batchverify.errors import ManifestError
from batchverify.manifest.columns import (
    LosslessTypes,
    check_label_type,
    check_names,
    check_same_names,
    common_type,
    convert,
    read_labels,
    read_paths,
)


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["0", "-1", "7"], "int64"),
        (["999999999999999999", "-999999999999999999"], "int64"),
        (["1", "", "2"], "int64"),
        (["1", "007"], "string"),
        (["1", "+3"], "string"),
        (["-0"], "string"),
        (["1 "], "string"),
        (["1\n"], "string"),
        (["1_000"], "string"),
        (["١"], "string"),
        (["1", "9223372036854775808"], "string"),
        (["1", "2.0"], "string"),
        (["0.5", "-1.0", "", "100.0", "-0.0"], "double"),
        (["0.8374651928374651", "0.1"], "double"),
        (["123456.789012345678901"], "string"),
        (["0.10000000000000000001"], "string"),
        (["1.50"], "string"),
        ([".5"], "string"),
        (["1."], "string"),
        (["1e5"], "string"),
        (["nan"], "string"),
        (["True"], "string"),
        (["", ""], "string"),
    ],
)
def test_numbers_become_numbers_only_where_nothing_is_lost(cells, kind):
    types = LosslessTypes(["x"])
    for cell in cells:
        types.see(pa.record_batch({"x": pa.array([cell])}))
    assert str(types.types()["x"]) == kind
    back = convert(pa.array(cells), types.types()["x"]).to_pylist()
    assert ["" if each is None else str(each) for each in back] == cells


def test_a_column_without_any_row_is_a_string():
    assert LosslessTypes(["x"]).types() == {"x": pa.string()}


LABELS = [
    pa.array(["0", "1", "", None]),
    pa.array(["0.0", "1.0", "nan", None], pa.large_string()),
    pa.array(["0", "1", "", None], pa.string_view()),
    pa.array(["False", "True", "", None]),
    pa.array(["0", "1", "", None]).dictionary_encode(),
    pa.array([0, 1, None, None], pa.int8()),
    pa.array([0, 1, None, None], pa.uint64()),
    pa.array([0, 1, None, None]).dictionary_encode(),
    pa.array([0.0, 1.0, float("nan"), None]),
    pa.array([-0.0, 1.0, float("nan"), None], pa.float32()),
    pa.array([False, True, None, None]),
    pa.array([decimal.Decimal("0.0"), decimal.Decimal("1.0"), None, None]),
]


@pytest.mark.parametrize("cells", LABELS, ids=lambda cells: str(cells.type))
def test_labels_of_every_type(cells):
    check_label_type("x.csv", cells.type)
    labels = read_labels(cells, "x.csv", 0)
    assert labels.type == pa.int8()
    assert labels.to_pylist() == [0, 1, None, None]


@pytest.mark.parametrize(
    ("spellings", "label"),
    [
        (["0", " 0", "0 ", "0.0", "0.", "0.00", "0e0", "0.000000000000000000e+00"], 0),
        (["1", " 1 ", "1\t", "\u00a01", "1.0", "1.00", "1E+00"], 1),
        (["False", "false", "FALSE", " false ", "f", "F"], 0),
        (["True", "true", "TRUE", "t", "T"], 1),
        (["", "  ", "nan", "NaN", "NA", "na", "null", "NULL", "<NA>", "None", "N/A", "#N/A", "\\N"], None),
    ],
)
def test_every_writers_spelling_of_a_label_is_read(spellings, label):
    assert read_labels(pa.array(spellings), "x.csv", 0).to_pylist() == [label] * len(spellings)


def test_labels_that_are_all_blank():
    assert read_labels(pa.nulls(2), "x.csv", 0).to_pylist() == [None, None]
    assert read_labels(pa.array([], pa.string()), "x.csv", 0).to_pylist() == []


def test_a_dictionary_entry_that_no_row_uses_is_no_bad_label():
    cells = pa.DictionaryArray.from_arrays(pa.array([0, 0], pa.int8()), pa.array(["1", "yes"]))
    assert read_labels(cells, "x.csv", 0).to_pylist() == [1, 1]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (pa.array(["0", "yes", "no"]), "x.csv: row 12: label must be 0 or 1, got 'yes'"),
        (pa.array(["0", "-1"]), "x.csv: row 12: label must be 0 or 1, got '-1'"),
        (pa.array(["0", "1 0"]), "x.csv: row 12: label must be 0 or 1, got '1 0'"),
        (pa.array(["0", "same"]), "x.csv: row 12: label must be 0 or 1, got 'same'"),
        (pa.array(["0", "y" * 500]), f"x.csv: row 12: label must be 0 or 1, got '{'y' * 79}…"),
        (pa.array(["0", "01"]).dictionary_encode(), "x.csv: row 12: label must be 0 or 1, got '01'"),
        (pa.array(["0", None, "line\nbreak"]), "x.csv: row 13: label must be 0 or 1, got 'line\\nbreak'"),
        (pa.array([0, None, 2]), "x.csv: row 13: label must be 0 or 1, got 2"),
        (pa.array([-1, 1]), "x.csv: row 11: label must be 0 or 1, got -1"),
        (pa.array([1.0, 0.5]), "x.csv: row 12: label must be 0 or 1, got 0.5"),
        (pa.array([1.0, float("inf")]), "x.csv: row 12: label must be 0 or 1, got inf"),
    ],
)
def test_bad_labels_are_named_by_row(cells, message):
    with pytest.raises(ManifestError) as caught:
        read_labels(cells, "x.csv", 10)
    assert str(caught.value) == message


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.binary(), pa.timestamp("s")], ids=str)
def test_labels_of_other_types_are_refused(kind):
    with pytest.raises(ManifestError, match=r"x\.csv: column 'label' must hold 0 or 1, found "):
        check_label_type("x.csv", kind)


@pytest.mark.parametrize(
    ("names", "sides", "message"),
    [
        ([], ("a", "b"), "no column 'a' (--column-a); the file has no columns"),
        (["a", "c"], ("a", "b"), "no column 'b' (--column-b); the file has a, c"),
        (["a", "b"], ("a", "a"), "column 'a' is given for both images"),
        (["a", " b"], ("a", "b"), "no column 'b' (--column-b); the file has a, ' b'"),
        (["a", "b\x00"], ("a", "b"), "no column 'b' (--column-b); the file has a, 'b\\x00'"),
        (
            ["a", "b", "", "", ""],
            ("a", "b"),
            "3 columns have no name; name or remove them (in a CSV, the commas",
        ),
        (["a", "label"], ("a", "label"), "column 'label' (--column-b) holds the truth, not paths"),
        (["a", "b", "c", "c", "c"], ("a", "b"), "column 'c' appears 3 times"),
        (
            ["a", "b", "status"],
            ("a", "b"),
            "column 'status' is a name of an output column; rename it in the manifest",
        ),
        (
            ["a", "b", "true_label"],
            ("a", "b"),
            "column 'true_label' is a name of an output column; rename",
        ),
        (["a", "b", " label"], ("a", "b"), "column ' label' has blanks around its name; name it 'label'"),
        (["a", "b", "label\u00a0"], ("a", "b"), "column 'label\\xa0' has blanks around its name"),
    ],
)
def test_names_that_are_refused(names, sides, message):
    with pytest.raises(ManifestError) as caught:
        check_names("x.csv", names, *sides)
    assert str(caught.value).startswith(f"x.csv: {message}")


def test_a_name_like_that_of_the_label_is_another_column_beside_it():
    check_names("x.csv", ["a", "b", "label", " label"], "a", "b")


def test_forty_thousand_names_are_checked_and_the_first_ones_listed():
    names = [f"n{number}" for number in range(40_000)]
    with pytest.raises(ManifestError) as caught:
        check_names("x.csv", names, "a", "b")
    assert str(caught.value).endswith("n18, n19, and 39,980 more")
    check_names("x.csv", names, "n0", "n39999")
    check_same_names("y.csv", names[::-1], "x.csv", names)


def test_files_with_other_columns_than_the_first_are_refused():
    check_same_names("y.csv", ["b", "a"], "x.csv", ["a", "b"])
    with pytest.raises(ManifestError) as caught:
        check_same_names("y.csv", ["a", "d"], "x.csv", ["a", "b"])
    assert str(caught.value) == "y.csv: columns differ from those of x.csv: 'b' is missing, 'd' is new"


def test_the_common_type_of_a_column():
    text, large, whole = pa.string(), pa.large_string(), pa.int64()
    assert common_type("n", {"x": whole, "y": pa.null(), "z": whole}, paths=False) == whole
    assert common_type("n", {"x": pa.null()}, paths=False) == pa.null()
    assert common_type("n", {"x": pa.string_view()}, paths=False) == text
    assert common_type("a", {"x": large, "y": pa.dictionary(pa.int8(), text)}, paths=True) == text
    assert common_type("a", {"x": large, "y": large}, paths=True) == large
    with pytest.raises(ManifestError, match="z: column 'n' holds double, in x it holds int64"):
        common_type("n", {"x": whole, "y": pa.null(), "z": pa.float64()}, paths=False)
    with pytest.raises(ManifestError, match=r"y: column 'a' must hold paths \(strings\), found binary"):
        common_type("a", {"x": text, "y": pa.binary()}, paths=True)


def test_paths_that_are_not_utf8_are_named_by_row():
    cells = pa.array([b"ok", b"x", b"\xff"]).view(pa.string())
    for each, row in ((cells, 10), (cells.slice(1), 11), (cells.cast(pa.large_string()), 10)):
        with pytest.raises(ManifestError) as caught:
            read_paths(each, "x.parquet", row, "image_a")
        assert str(caught.value) == "x.parquet: row 13: column 'image_a': not UTF-8"
    assert read_paths(pa.array(["ä", None], pa.string_view()), "x", 0, "a").to_pylist() == ["ä", None]
