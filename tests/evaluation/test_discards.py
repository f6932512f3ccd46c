"""Error versus discard against plain loops: ties, thresholds at a rate, wanted rates, columns that are no quality."""

import math

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from group_samples import grouped_columns
from score_tables import write_scores

import batchverify
from batchverify.cli.app import main
from batchverify.errors import ManifestError
from batchverify.evaluation.discards import DiscardSample
from batchverify.evaluation.qualities import read_quality
from batchverify.evaluation.scores import ScoreFile, read_scores, read_units

PAIRS = 500


def found_of(tmp_path, quality="sharpness", *, draws=0, wanted=(), **changes):
    columns = grouped_columns(PAIRS, **changes)
    scores = write_scores(tmp_path / "s.parquet", columns)
    document = batchverify.evaluate(scores, quality=quality, draws=draws, wanted_fnmr=wanted).document
    return columns, document["quality"][0]


def judged(columns) -> list[tuple[float, int, bool, float]]:
    """(quality of the worse side, truth, wrong, probability) of the scored pairs."""
    rows = []
    for at in range(PAIRS):
        probability = columns["probability"][at].as_py()
        if probability is not None:
            truth = int(columns["true_label"][at].as_py())
            worse = min(columns["sharpness_a"][at], columns["sharpness_b"][at])
            rows.append((worse, truth, (probability >= 0.5) != (truth == 1), probability))
    return rows


def slow_rates(rows, share) -> tuple[float, float]:
    """(FNMR, FMR) without the worst pairs; a share that ends within a pair takes a part of it."""
    weights = [min(max(at + 1 - share * len(rows), 0), 1) for at in range(len(rows))]
    rates = []
    for kind in (0, 1):
        mine = [(weight, row) for weight, row in zip(weights, sorted(rows), strict=True) if row[1] == kind]
        rates.append(sum(weight * row[2] for weight, row in mine) / sum(weight for weight, _ in mine))
    return rates[0], rates[1]


def test_rates_are_those_of_a_loop(tmp_path):
    columns, found = found_of(tmp_path)
    rows = judged(columns)
    assert (found["pairs"], found["without"], found["bad"]) == (len(rows), 0, "low")
    assert found["values"] == ["sharpness_a", "sharpness_b"]
    for at, share in enumerate(found["shares"]):
        assert (found["fnmr"][at], found["fmr"][at]) == pytest.approx(slow_rates(rows, share))
        kept = sorted(rows)[int(share * len(rows)) :]
        assert found["cuts"][at] == kept[0][0]
    assert found["shares"][-1] == 0.5
    # The quality of the samples tells of errors.
    assert found["fnmr"][50] < found["fnmr"][0] * 0.7
    area = sum((one + other) / 200 for one, other in zip(found["fnmr"], found["fnmr"][1:], strict=False))
    assert found["area"] == pytest.approx(area)
    assert found["area_over_random"] == pytest.approx(area / (0.5 * found["fnmr"][0]))


def test_pairs_of_equal_quality_go_in_proportion(tmp_path):
    """Of two values the lower has 40 % of the pairs: at 20 % half of them is discarded, whatever their order."""
    columns, found = found_of(tmp_path, "stars", failed=0, stars=[int(at % 5 > 1) for at in range(PAIRS)])
    worst, rest = [[0, 0], [0, 0]], [[0, 0], [0, 0]]
    for at in range(PAIRS):
        truth, probability = columns["true_label"][at].as_py(), columns["probability"][at].as_py()
        part = (rest if columns["stars"][at] else worst)[truth]
        part[0] += (probability >= 0.5) != (truth == 1)
        part[1] += 1
    for share, left in ((0, 1), (20, 0.5), (30, 0.25), (40, 0)):
        for kind, name in ((0, "fnmr"), (1, "fmr")):
            wrong, pairs = (left * worst[kind][place] + rest[kind][place] for place in (0, 1))
            assert found[name][share] == pytest.approx(wrong / pairs)
    assert found["values"] == ["stars"]


def test_a_sign_turns_the_order_round(tmp_path):
    columns = grouped_columns(PAIRS)
    turned = {f"blur_{side}": -np.asarray(columns[f"sharpness_{side}"]) for side in "ab"}
    _, plain = found_of(tmp_path)
    _, found = found_of(tmp_path, "-blur", **turned)
    assert (found["column"], found["bad"], found["values"]) == ("blur", "high", ["blur_a", "blur_b"])
    assert found["fnmr"] == plain["fnmr"]
    assert found["cuts"] == [-cut for cut in plain["cuts"]]
    # A column that has such a name is itself.
    _, odd = found_of(tmp_path, "-odd", **{"-odd": np.arange(PAIRS)})
    assert (odd["column"], odd["bad"]) == ("-odd", "low")


def test_the_rate_at_a_false_match_rate_takes_a_threshold_of_what_remains(tmp_path):
    columns, found = found_of(tmp_path, failed=0)
    at_fmr = found["at_fmr"]
    assert at_fmr["fmr"] == 0.1
    rows = sorted(judged(columns))
    for at in (0, 20, 50):
        kept = rows[int(found["shares"][at] * len(rows)) :]
        different = sorted(row[3] for row in kept if row[1] == 1)
        # The highest score as threshold that accepts at most a tenth of the different pairs.
        scores = sorted({row[3] for row in kept})
        accepted = [score for score in scores if sum(each < score for each in different) <= 0.1 * len(different)]
        same = [row[3] for row in kept if row[1] == 0]
        assert at_fmr["threshold"][at] == accepted[-1]
        assert at_fmr["fnmr"][at] == pytest.approx(sum(each >= accepted[-1] for each in same) / len(same))


def test_intervals_are_over_draws_of_people(tmp_path):
    columns, found = found_of(tmp_path, draws=40, wanted=(0.08,))
    file = ScoreFile.open(str(tmp_path / "s.parquet"))
    units = read_units(file)
    sample = DiscardSample.of(read_quality(file, "sharpness"), read_scores(file))
    worse = np.minimum(columns["sharpness_a"], columns["sharpness_b"])
    drawn = []
    for number in range(40):
        weights = units.weights((0, number))
        ranked = sorted((worse[row], row) for row in sample.rows.tolist())
        left, point = 0.3 * sum(weights[row] for _, row in ranked), [0.0, 0.0]
        for _, row in ranked:
            kept = max(weights[row] - max(left, 0), 0)
            left -= weights[row]
            if columns["true_label"][row].as_py() == 0:
                point[0] += kept * (columns["probability"][row].as_py() >= 0.5)
                point[1] += kept
        drawn.append(point[0] / point[1])
    assert found["intervals"]["fnmr"][30] == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    low, high = found["area_interval"]
    assert low <= found["area_over_random"] <= high
    row = next(each for each in found["wanted"] if each["fnmr"] == 0.08)
    assert row["interval"][0] <= row["share"]


def test_the_share_for_a_wanted_rate_is_the_least_one(tmp_path):
    _, found = found_of(tmp_path, wanted=(0.9, 0.08))
    table = {row["fnmr"]: row for row in found["wanted"]}
    assert [*table] == sorted(table, reverse=True)
    assert (table[0.9]["share"], table[0.9]["cut"]) == (0, None)
    least = next(at for at, rate in enumerate(found["fnmr"]) if rate <= 0.08)
    assert table[0.08]["share"] == found["shares"][least] > 0
    assert table[0.08]["cut"] == found["cuts"][least]
    # No errors among so few pairs show no such rate.
    low = table[0.001]
    assert low["share"] is None
    assert "needs 3,000 same pairs" in low["reason"] or "not reached" in low["reason"]


def test_pairs_without_a_quality_are_kept_apart(tmp_path):
    columns = grouped_columns(PAIRS)
    gone = np.arange(PAIRS) % 7 == 0
    one = pa.array(columns["sharpness_a"], mask=gone)
    nan = np.where(np.arange(PAIRS) % 11 == 0, math.nan, columns["sharpness_b"])
    _, found = found_of(tmp_path, sharpness_a=one, sharpness_b=nan)
    scored = [each.as_py() is not None for each in columns["probability"]]
    lacking = sum(scored[at] and (at % 7 == 0 or at % 11 == 0) for at in range(PAIRS))
    assert (found["without"], found["pairs"]) == (lacking, sum(scored) - lacking)
    _, none = found_of(tmp_path, "gone", gone=pa.nulls(PAIRS, pa.float32()))
    assert (none["pairs"], none["fnmr"], none["at_fmr"], none["area"]) == (0, [None] * 51, None, None)


@pytest.mark.parametrize(
    ("quality", "changes", "message"),
    [
        ("none", {}, "no column 'none', nor 'none_a' and 'none_b' .--quality.; the file has"),
        ("sharpness", {"sharpness_b": None}, "no column 'sharpness_b'"),
        ("camera", {}, "--quality: .*: row 1: column 'camera' must hold numbers, got '(north|south)'"),
        ("-camera", {}, "column 'camera' must hold numbers"),
        ("days", {"days": pa.nulls(PAIRS, pa.date32())}, "column 'days' must hold numbers, found date32"),
    ],
)
def test_columns_that_are_no_quality_are_refused(tmp_path, quality, changes, message):
    with pytest.raises(ManifestError, match=message):
        found_of(tmp_path, quality, **changes)


@pytest.mark.parametrize("kind", [pa.int16(), pa.float32(), pa.decimal128(6, 2)])
def test_numbers_of_any_type_are_a_quality(tmp_path, kind):
    values = pa.array((np.arange(PAIRS) % 50).tolist(), pa.int16()).cast(pa.float32()).cast(kind)
    _, found = found_of(tmp_path, "stars", stars=values)
    assert found["cuts"][0] == 0


def test_numbers_as_text_are_a_quality(tmp_path):
    values = [str(each) if each else " " for each in range(PAIRS)]
    _, found = found_of(tmp_path, "stars", stars=values)
    _, same = found_of(tmp_path, "stars", stars=pa.array([float(each) or None for each in range(PAIRS)]))
    assert found == same


def test_scores_without_labels_have_no_curve(tmp_path):
    _, found = found_of(tmp_path, true_label=None)
    assert found["pairs"] == 0


def test_the_command_says_what_to_discard(tmp_path):
    scores = write_scores(tmp_path / "s.parquet", grouped_columns(PAIRS))
    arguments = ["evaluate", scores, "-o", str(tmp_path / "out"), "--no-images", "--draws", "40"]
    options = ["--quality", "sharpness", "--quality", "-similarity", "--wanted-fnmr", "0.08"]
    result = CliRunner().invoke(main, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert "FNMR, discards by sharpness" in result.stderr
    assert "FNMR, discards by similarity" in result.stderr
    assert "for FNMR 0.08" in result.stderr and ", sharpness below " in result.stderr
    text = (tmp_path / "out" / "report.html").read_text()
    assert "Error versus discard: sharpness" in text
