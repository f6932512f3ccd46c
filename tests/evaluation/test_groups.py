"""Groups of pairs: from columns, from a table of people, and what is refused."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from group_samples import group_of, grouped_columns, write_people
from score_tables import write_scores

from batchverify.errors import ManifestError, UsageError
from batchverify.evaluation.groups import Groups, read_groups
from batchverify.evaluation.scores import ScoreFile
from batchverify.options import EvaluateOptions

COLUMNS = EvaluateOptions(group_a="group_a", group_b="group_b")


def read(tmp_path, options=COLUMNS, **changes) -> Groups:
    columns = grouped_columns(60, **changes)
    found = read_groups(ScoreFile.open(write_scores(tmp_path / "s.parquet", columns)), options)
    assert found is not None
    return found


def names_of(groups: Groups, side: np.ndarray) -> list[str | None]:
    return [None if code < 0 else groups.names[code] for code in side.tolist()]


def test_columns_name_the_groups_of_both_sides(tmp_path):
    columns = grouped_columns(60)
    groups = read(tmp_path)
    assert groups.names == ("a", "b", "c")
    assert names_of(groups, groups.a) == columns["group_a"]
    assert names_of(groups, groups.b) == columns["group_b"]
    assert groups.source == f"{tmp_path / 's.parquet'}: 'group_a' and 'group_b'"


def test_a_cell_is_an_unordered_pair_of_groups_and_the_last_one_is_not_stated():
    sides = np.array([[0, 0, 1, 2, 1, -1, 0], [0, 1, 0, 2, 2, 0, -1]], np.int16)
    groups = Groups("", ("a", "b", "c"), *sides)
    assert groups.cell_of_pairs().tolist() == [0, 1, 1, 5, 4, 6, 6]
    assert groups.table().tolist() == [[0, 1, 2], [1, 3, 4], [2, 4, 5]]


def test_numbers_are_groups_in_their_order_and_blanks_are_not_stated(tmp_path):
    ages = [10.0, 2.0, float("nan"), None, 30.0, 2.0] * 10
    groups = read(tmp_path, group_a=pa.array(ages), group_b=pa.array([2, 10, None] * 20))
    assert groups.names == ("2", "10", "30")
    assert names_of(groups, groups.a)[:6] == ["10", "2", None, None, "30", "2"]
    assert names_of(groups, groups.b)[:3] == ["2", "10", None]
    texts = read(tmp_path, group_a=["", "f", "m"] * 20, group_b=["f"] * 60)
    assert names_of(texts, texts.a)[:3] == [None, "f", "m"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_b": None}, "no column 'group_b'; the file has"),
        ({"group_b": pa.array([["f"]] * 60)}, "column 'group_b' must hold single values, found list"),
        ({"group_a": [""] * 60, "group_b": pa.nulls(60)}, "no group is stated"),
        ({"group_a": list(range(60))}, r"63 groups \('0', '1', '2', …\), at most 50 are compared"),
    ],
)
def test_columns_that_cannot_be_groups_are_refused(tmp_path, changes, message):
    with pytest.raises(ManifestError, match=message) as raised:
        read(tmp_path, **changes)
    assert "s.parquet" in str(raised.value)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_table_of_people_gives_every_pair_the_groups_of_its_people(tmp_path, suffix):
    table, path = pd.read_csv(write_people(tmp_path / "p.csv")), tmp_path / f"people{suffix}"
    if suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="\t" if suffix == ".tsv" else ",", index=False)
    groups = read(tmp_path, EvaluateOptions(people=str(path), group="origin"))
    columns = grouped_columns(60)
    for side, codes in (("a", groups.a), ("b", groups.b)):
        assert names_of(groups, codes) == [group_of(each) for each in columns[f"person_{side}"]]
    assert groups.missing == ()
    assert groups.source == f"{path}: 'origin'"


def test_people_who_are_not_in_the_table_are_not_stated_and_named(tmp_path):
    path = write_people(tmp_path / "people.csv", people=20)
    groups = read(tmp_path, EvaluateOptions(people=path, group="origin"))
    people = {each for side in "ab" for each in grouped_columns(60)[f"person_{side}"]}
    missing = sorted(each for each in people if int(each.split()[1]) >= 20)
    assert list(groups.missing) == missing and missing
    gone = [int(each.split()[1]) >= 20 for each in grouped_columns(60)["person_a"]]
    assert (groups.a < 0).tolist() == gone


def test_names_that_are_numbers_match_however_they_are_written(tmp_path):
    (tmp_path / "people.csv").write_text("person,origin\n1,x\n2,y\n")
    people = pa.array([1.0, 2.0] * 30)
    groups = read(
        tmp_path,
        EvaluateOptions(people=str(tmp_path / "people.csv"), group="origin"),
        person_a=people,
        person_b=people,
    )
    assert names_of(groups, groups.a)[:2] == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,origin\nx,a\n", "no column 'person'; the file has name, origin"),
        ("person,sex\nx,a\n", "no column 'origin'; the file has person, sex"),
        ("person,origin\nperson 1,a\nx,b\nperson 1,b\n",
         "row 3: person 'person 1' has group 'b' here and group 'a' in .*people.csv: row 1"),
        ("person,origin\nperson 1,a\nperson 1,\n", "row 2: person 'person 1' has no group here and group 'a' in"),
        ("person,origin\nperson 1,a\n,b\n", "row 2: column 'person' is blank"),
        ("person,origin\nnobody,a\n", r"states a group of none of the people in .* \('person \d+', 'person"),
        ("person,origin\nperson 1,\n", "states a group of none of the people"),
        ("person,origin\n", "the table has no rows"),
    ],
)  # fmt: skip
def test_a_table_of_people_that_cannot_be_used_is_refused(tmp_path, text, message):
    (tmp_path / "people.csv").write_text(text)
    with pytest.raises(ManifestError, match=message):
        read(tmp_path, EvaluateOptions(people=str(tmp_path / "people.csv"), group="origin"))


def test_a_table_of_people_may_repeat_itself_and_lie_in_several_files(tmp_path):
    folder = tmp_path / "people"
    folder.mkdir()
    for number in (1, 2):
        write_people(folder / f"{number}.csv")
    options = EvaluateOptions(people=str(folder), group="origin")
    assert read(tmp_path, options).names == ("a", "b", "c")
    (folder / "2.csv").write_text("person,origin\nperson 4,c\n")
    with pytest.raises(ManifestError, match=r"2.csv: row 1: person 'person 4' .* in .*1.csv: row 5"):
        read(tmp_path, options)
    nested = pa.table({"person": ["x"], "origin": [["a"]]})
    pq.write_table(nested, tmp_path / "nested.parquet")
    with pytest.raises(ManifestError, match="column 'origin' must hold single values, found list"):
        read(tmp_path, EvaluateOptions(people=str(tmp_path / "nested.parquet"), group="origin"))


def test_scores_without_people_cannot_be_joined(tmp_path):
    options = EvaluateOptions(people=write_people(tmp_path / "people.csv"), group="origin")
    with pytest.raises(ManifestError, match="no column 'person_b'"):
        read(tmp_path, options, person_b=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_a": "x"}, "--group-a and --group-b belong together; only one is given"),
        ({"group": "x"}, "--people and --group belong together; only one is given"),
        ({"people": "x", "group": "y", "group_a": "a", "group_b": "b"}, "not from both"),
        ({"wanted_fnmr": (0.1,)}, "--wanted-fnmr needs --quality"),
        ({"wanted_fnmr": (0.0,), "quality": "q"}, "--wanted-fnmr must lie between 0 and 1, got 0.0"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        EvaluateOptions(**options)
