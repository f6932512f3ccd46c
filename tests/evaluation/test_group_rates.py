"""Error rates of groups against plain loops: counts, matrix, intervals, groups that are too small, the command."""

import json

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from group_samples import group_of, grouped_columns, write_people
from score_tables import draw_columns, write_scores

import batchverify
from batchverify.cli.app import main
from batchverify.evaluation.scores import ScoreFile, read_units

PAIRS, DRAWS = 600, 60


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(columns, what metrics.json says of groups, units): some pairs fail, some groups and labels are not stated."""
    folder, rng = tmp_path_factory.mktemp("groups"), np.random.default_rng(5)
    columns = grouped_columns(PAIRS)
    columns["group_a"] = [None if rng.random() < 0.1 else each for each in columns["group_a"]]
    truth = np.asarray(columns["true_label"])
    columns["true_label"] = pa.array(truth, mask=rng.random(PAIRS) < 0.1)
    path = write_scores(folder / "s.parquet", columns)
    found = batchverify.evaluate(path, group_a="group_a", group_b="group_b", draws=DRAWS).document["groups"]
    return columns, found, read_units(ScoreFile.open(path))


def slow_counts(columns, weights) -> dict[tuple[str, int], list[float]]:
    """(wrong, pairs) by name and truth, row by row: two groups in either order, or another line."""
    counts: dict[tuple[str, int], list[float]] = {}
    for row in range(PAIRS):
        truth, probability = columns["true_label"][row].as_py(), columns["probability"][row].as_py()
        if truth is None or probability is None:
            continue
        a, b = columns["group_a"][row], columns["group_b"][row]
        names = ["not stated"]
        if a is not None and b is not None:
            names = ["-".join(sorted((a, b))), "within" if a == b else "across"]
        for name in names:
            wrong, pairs = counts.setdefault((name, truth), [0.0, 0.0])
            mistaken = (probability >= 0.5) != (truth == 1)
            counts[name, truth] = [wrong + weights[row] * mistaken, pairs + weights[row]]
    return counts


def rows_of(found):
    """Every row with its name in `slow_counts`."""
    named = {f"{row['group']}-{row['group']}": row for row in found["groups"]}
    return named | {name: found[name] for name in ("within", "across")} | {"not stated": found["not_stated"]}


def test_counts_and_rates_are_those_of_a_loop(run):
    columns, found, _ = run
    counts = slow_counts(columns, [1] * PAIRS)
    for name, row in rows_of(found).items():
        wrong, pairs = counts.get((name, 0), [0, 0])
        assert (row["false_non_matches"], row["same"]) == (wrong, pairs)
        assert row["fnmr"] == (pytest.approx(wrong / pairs) if pairs else None)
        wrong, pairs = counts[name, 1]
        assert (row["false_matches"], row["different"]) == (wrong, pairs)
        assert row["fmr"] == pytest.approx(wrong / pairs)
    matrix = found["matrix"]
    for at, one in enumerate("abc"):
        for to, other in enumerate("abc"):
            wrong, pairs = counts["-".join(sorted((one, other))), 1]
            assert (matrix["false_matches"][at][to], matrix["pairs"][at][to]) == (wrong, pairs)
            assert matrix["fmr"][at][to] == pytest.approx(wrong / pairs)


def test_intervals_are_over_draws_of_people(run):
    columns, found, units = run
    drawn = [slow_counts(columns, units.weights((0, number))) for number in range(DRAWS)]
    checked = 0
    for name, row in rows_of(found).items():
        for truth, rate in enumerate(("fnmr", "fmr")):
            if rate in row["exact"] or rate not in row["intervals"]:
                continue
            rates = [each[name, truth][0] / each[name, truth][1] for each in drawn if each[name, truth][1]]
            assert row["intervals"][rate] == pytest.approx(np.quantile(rates, [0.025, 0.975]))
            checked += 1
    assert checked >= 8
    rates = [each["a-b", 1][0] / each["a-b", 1][1] for each in drawn]
    ends = [found["matrix"][end][1][0] for end in ("low", "high")]
    assert ends == pytest.approx(np.quantile(rates, [0.025, 0.975]))
    measure = found["differentials"]["fnmr"]["all"]["measures"]["worst_over_best"]
    fnmr = [[each[f"{name}-{name}", 0][0] / each[f"{name}-{name}", 0][1] for name in "abc"] for each in drawn]
    ratios = [max(row) / min(row) if min(row) else np.inf for row in fnmr]
    low = np.quantile(ratios, 0.025) if max(ratios) < np.inf else sorted(ratios)[1]
    assert measure["interval"][0] == pytest.approx(low)


def test_units_are_the_people_of_the_pairs(run):
    columns, found, _ = run
    for row in found["groups"]:
        people = {
            person
            for at in range(PAIRS)
            for person in (columns["person_a"][at], columns["person_b"][at])
            if columns["group_a"][at] == columns["group_b"][at] == row["group"]
            and columns["true_label"][at].as_py() == 0
            and columns["probability"][at].as_py() is not None
        }
        assert row["units"]["fnmr"] == len(people)
    assert found["unit"] == "identities"


def test_a_group_is_too_small_by_its_people_or_by_the_errors_expected(tmp_path):
    """`c` has 5 people; `b` has 25, but a pair each."""
    people = [f"person {each}" for each in [*range(40)] * 10 + [*range(40, 65)] + [*range(65, 70)] * 50]
    groups = ["a"] * 400 + ["b"] * 25 + ["c"] * 250
    probability = np.where(np.arange(675) % 10 == 0, 0.9, 0.1).astype(np.float32)
    columns = {
        **{"person_a": people, "person_b": people, "group_a": groups, "group_b": groups},
        **{f"image_{side}": [f"{each}-{side}.jpg" for each in range(675)] for side in "ab"},
        **{"true_label": pa.array(np.zeros(675, np.int8)), "probability": probability},
    }
    scores = write_scores(tmp_path / "s.parquet", columns)
    found = batchverify.evaluate(scores, group_a="group_a", group_b="group_b", draws=40).document["groups"]
    small = {row["group"]: row["too_small"] for row in found["groups"]}
    assert small["b"]["fnmr"] == "2.5 errors expected of 25 pairs, fewer than 10"
    assert small["c"]["fnmr"] == "5 identities, fewer than 20"
    assert "fnmr" not in small["a"]
    assert small["a"]["fmr"] == "no different pairs"
    assert found["differentials"]["fnmr"]["large_enough"]["reason"] == "needs two groups"
    assert found["differentials"]["fnmr"]["all"]["groups"] == ["a", "b", "c"]
    assert found["differentials"]["fmr"]["all"]["reason"] == "needs two groups"


def test_a_group_without_errors_has_the_bound_of_its_people_with_and_without_draws(tmp_path):
    columns = grouped_columns(PAIRS, failed=0)
    right = np.array([one == other == "a" for one, other in zip(columns["group_a"], columns["group_b"], strict=True)])
    probability = np.where(right, np.asarray(columns["true_label"]), columns["probability"].fill_null(0.0))
    columns["probability"] = pa.array(probability.astype(np.float32))
    scores = write_scores(tmp_path / "s.parquet", columns)
    for draws in (0, 40):
        found = batchverify.evaluate(scores, group_a="group_a", group_b="group_b", draws=draws).document["groups"]
        row = found["groups"][0]
        assert (row["fnmr"], row["fmr"]) == (0, 0)
        assert row["exact"] == ["fnmr", "fmr"]
        assert row["intervals"]["fnmr"] == pytest.approx([0, 1 - 0.025 ** (1 / row["units"]["fnmr"])])
        # At most one pair of two people for every two people.
        assert row["intervals"]["fmr"][1] >= 1 - 0.025 ** (2 / row["units"]["fmr"])
        measures = found["differentials"]["fnmr"]["all"]["measures"]
        assert measures["worst_over_gmean"]["value"] is None
        assert measures["worst_over_gmean"]["at_least"] >= 1
        assert 0 < measures["gini"]["value"] <= 1
        assert (found["matrix"]["low"][1][1] is None) == (draws == 0)


@pytest.mark.parametrize("threshold", [0.0, 1e-4, 1.0])
def test_no_errors_and_nothing_but_errors_have_bounds_in_every_line(tmp_path, threshold):
    scores = write_scores(tmp_path / "s.parquet", grouped_columns(PAIRS, failed=0))
    options = {"group_a": "group_a", "group_b": "group_b", "draws": 40, "threshold": threshold}
    found = batchverify.evaluate(scores, **options).document["groups"]
    rate = "fnmr" if threshold == 1 else "fmr"
    for row in (*found["groups"], found["within"]):
        assert row[rate] == 0
        assert rate in row["exact"]
        assert row["intervals"][rate][0] == 0 < row["intervals"][rate][1] < 1
    assert found["differentials"][rate]["all"]["reason"] == "no errors"


def test_one_group_and_no_labels_are_measured_as_far_as_they_go(tmp_path):
    one = write_scores(tmp_path / "one.parquet", grouped_columns(80, groups="a"))
    found = batchverify.evaluate(one, group_a="group_a", group_b="group_b", draws=40).document["groups"]
    assert [row["group"] for row in found["groups"]] == ["a"]
    assert found["differentials"]["fmr"]["all"]["reason"] == "needs two groups"
    bare = write_scores(tmp_path / "bare.parquet", grouped_columns(80, true_label=None))
    evaluation = batchverify.evaluate(bare, tmp_path / "out", group_a="group_a", group_b="group_b", no_images=True)
    assert [row["fmr"] for row in evaluation.document["groups"]["groups"]] == [None] * 3
    assert dict(evaluation.lines())["FMR"] == "within one group –, across –"


def test_people_in_two_groups_are_counted(tmp_path):
    columns = grouped_columns(200)
    columns["group_a"] = ["b" if person == "person 0" else group_of(person) for person in columns["person_a"]]
    scores = write_scores(tmp_path / "s.parquet", columns)
    found = batchverify.evaluate(scores, group_a="group_a", group_b="group_b", draws=0).document["groups"]
    assert found["in_several"] == 1


def test_the_command_says_what_a_table_of_people_gives(tmp_path):
    scores = write_scores(tmp_path / "s.parquet", grouped_columns(400))
    people = write_people(tmp_path / "people.csv", people=29)
    arguments = [scores, "-o", str(tmp_path / "out"), "--no-images", "--draws", "40"]
    result = CliRunner().invoke(main, ["evaluate", *arguments, "--people", people, "--group", "origin"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["groups"]
    assert f"3 from {people}: 'origin'" in result.stderr
    assert "1, counted as not stated: person 29" in result.stderr
    assert f"within one group {found['within']['fmr']:.5f}  [" in result.stderr
    assert "FNMR, worst over geometric mean" in result.stderr
    assert "too small for FMR" in result.stderr and "identities, fewer than 20" in result.stderr
    assert found["missing"] == 1
    wrong = CliRunner().invoke(main, ["evaluate", *arguments, "--people", people, "--group", "age"])
    assert wrong.exit_code == 2
    assert "people.csv: no column 'age'; the file has person, origin" in wrong.stderr


def test_a_run_without_groups_is_as_before(tmp_path):
    scores = write_scores(tmp_path / "s.parquet", draw_columns(60))
    document = batchverify.evaluate(scores, draws=0).document
    assert (document["groups"], document["quality"]) == (None, [])
