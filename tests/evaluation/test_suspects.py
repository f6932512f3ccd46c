"""Suspect labels: small tables whose wrong labels are known, and what is said about them."""

import csv
import json
import shutil
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from click.testing import CliRunner
from repository import REPOSITORY
from score_tables import draw_columns, write_scores

import batchverify
from batchverify.cli.app import main
from batchverify.errors import ManifestError, UsageError
from batchverify.evaluation.confident_learning import ConfidentLearning
from batchverify.evaluation.evidence import Evidence
from batchverify.evaluation.reasons import listed
from batchverify.evaluation.scores import ScoreFile, Scores, read_scores
from batchverify.evaluation.suspects import Suspects, find_suspects
from batchverify.options import EvaluateOptions

# Scores that say nothing against the many pairs around the few that a test is about.
SURE = {0: 0.01, 1: 0.99}


def scored(tmp_path, pairs, names=None) -> Scores:
    """A table of pairs `(image, image, label, probability or None for the label's own)`. names: by image."""
    a, b, labels, given = (list(each) for each in zip(*pairs, strict=True))
    probability = [SURE[label] if p is None else p for label, p in zip(labels, given, strict=True)]
    columns = {
        "image_a": a,
        "image_b": b,
        "true_label": pa.array(labels, pa.int8()),
        "probability": pa.array(probability, pa.float32(), from_pandas=True),
    }
    if names is not None:
        columns |= {f"person_{side}": [names.get(each) for each in cells] for side, cells in (("a", a), ("b", b))}
    return read_scores(ScoreFile.open(write_scores(tmp_path / "scores.parquet", columns)))


def background(count=40) -> list[tuple[Any, ...]]:
    """Pairs of other images, half of them same, that the scores agree with."""
    return [(f"p{each}", f"q{each}", each % 2, None) for each in range(count)]


def found(scores, most=10) -> tuple[list[int], list[str]]:
    """The suspects' rows, from 1 as they are shown, and the reasons."""
    suspects = find_suspects(scores, most)
    count = suspects.document["found"]
    return (suspects.rows[:count] + 1).tolist(), list(suspects.reasons[:count])


def test_a_table_without_a_wrong_label_has_no_suspect(tmp_path):
    scores = scored(tmp_path, [("a", "b", 0, 0.3), *background()])
    assert found(scores) == ([], [])
    suspects = find_suspects(scores, 3)
    assert suspects.rows[0] == 0 and len(suspects.rows) == 3
    assert suspects.reasons[0] == "nothing speaks against it, but it is less sure than the rest: one person 0.7000"


def test_the_scores_alone_name_the_pair(tmp_path):
    pairs = [("a", "b", 0, 0.999), ("c", "d", 1, 0.2), ("e", "f", 0, 0.7), *background()]
    rows, reasons = found(scored(tmp_path, pairs))
    assert rows == [1, 2, 3]
    assert reasons == [
        "the score is as sure of two people (0.9990) as for pairs labelled so",
        "the score leans to one person (0.8000)",
        "the score leans to two people (0.7000)",
    ]


def test_same_twice_and_different_once_blames_the_different_one_if_the_scores_do(tmp_path):
    """A=B, B=C, A≠C; the scores say that all three are one person, A and C least of all."""
    pairs = [("a", "b", 0, None), ("b", "c", 0, None), ("a", "c", 1, 0.4), *background()]
    rows, reasons = found(scored(tmp_path, pairs))
    assert rows == [3]
    assert reasons[0] == (
        "rows 1 and 2, labelled same, join both images as one person; the score leans to one person (0.6000)"
    )


def test_a_chain_outweighs_a_score(tmp_path):
    """The score of A and C is open, but the chain from A to C is sure."""
    pairs = [("a", "b", 0, None), ("b", "c", 0, None), ("a", "c", 1, 0.5), ("x", "y", 1, 0.3), *background()]
    rows, reasons = found(scored(tmp_path, pairs))
    assert rows[0] == 3
    assert reasons[0] == "rows 1 and 2, labelled same, join both images as one person"


def test_same_twice_and_different_once_blames_the_weak_link(tmp_path):
    """A=B, B=C, A≠C; the scores say that B and C are two people."""
    pairs = [("a", "b", 0, None), ("b", "c", 0, 0.6), ("a", "c", 1, None), *background()]
    scores = scored(tmp_path, pairs)
    rows, reasons = found(scores)
    assert rows == [2]
    assert reasons[0] == (
        "it makes one person of images that row 3 calls two people; the score leans to two people (0.6000)"
    )
    evidence = Evidence.of(scores)
    # The label of A and B is as good as by itself.
    assert evidence.against[0] == -evidence.graph.edges.weights[0]


def test_other_pairs_of_the_same_people_support_a_hard_one(tmp_path):
    """Two pairs with the same doubtful score: one is the only link between its images, the other one of many."""
    crowd: list[tuple[Any, ...]] = [(f"a{i}", f"a{j}", 0, None) for i in range(4) for j in range(i)]
    pairs = [("a0", "a4", 0, 0.9), ("a1", "a4", 0, None), ("x", "y", 0, 0.9), *crowd, *background()]
    scores = scored(tmp_path, pairs)
    rows, _ = found(scores)
    assert rows[0] == 3
    evidence = Evidence.of(scores)
    assert evidence.against[0] < evidence.against[2] - 3


def test_one_wrong_link_between_two_crowds(tmp_path):
    """Two people of four images each, all chained; one pair of both is labelled same, two others different."""
    pairs: list[tuple[Any, ...]]
    pairs = [(f"{who}{i}", f"{who}{j}", 0, None) for who in "ab" for i in range(4) for j in range(i)]
    wrong = len(pairs) + 1
    pairs += [("a0", "b0", 0, 0.5), ("a1", "b1", 1, None), ("a2", "b2", 1, None), *background()]
    rows, reasons = found(scored(tmp_path, pairs))
    assert rows == [wrong]
    assert reasons == [f"it makes one person of images that rows {wrong + 1} and {wrong + 2} call two people"]


def test_both_labels_for_two_images_in_either_order(tmp_path):
    pairs = [("a", "b", 0, None), ("b", "a", 1, 0.01), ("a", "b", 0, None), *background()]
    rows, reasons = found(scored(tmp_path, pairs))
    assert rows == [2]
    assert reasons[0].startswith("rows 1 and 3 label the same two images same; ")


def test_a_pair_that_is_there_five_times_counts_once(tmp_path):
    evidence = Evidence.of(scored(tmp_path, [("a", "b", 0, 0.9)] * 5 + background()))
    assert len(evidence.graph.edges.a) == 41
    assert evidence.against[:5].tolist() == [-evidence.graph.edges.weights[0]] * 5


def test_one_image_on_both_sides(tmp_path):
    pairs = [("a", "a", 1, 0.001), ("b", "b", 0, 0.001), *background()]
    rows, reasons = found(scored(tmp_path, pairs))
    assert rows == [1]
    assert reasons[0].startswith("both sides are one image, yet labelled different; ")


def test_names_that_contradict_the_label(tmp_path):
    names = {"a": "Anna", "b": "Anna", "c": "Ben", "d": "Carl", "e": "Anna", "f": None}
    pairs = [
        ("a", "b", 1, None),
        ("c", "d", 0, None),
        ("a", "c", 1, None),
        ("e", "f", 1, None),
        *background(),
    ]
    rows, reasons = found(scored(tmp_path, pairs, names))
    assert sorted(rows) == [1, 2]
    assert reasons[rows.index(1)] == "labelled different, but both images are named Anna"
    assert reasons[rows.index(2)] == "labelled same, but the images are named Ben and Carl"


def test_a_chain_through_an_unnamed_image_joins_two_names(tmp_path):
    """Anna = x = Ben: the weaker of the two labels is the suspect."""
    names = {"a": "Anna", "b": "Ben"}
    pairs = [("a", "x", 0, None), ("x", "b", 0, 0.3), *background()]
    evidence = Evidence.of(scored(tmp_path, pairs, names))
    unnamed = Evidence.of(scored(tmp_path, pairs))
    assert evidence.against[0] == pytest.approx(unnamed.against[0])
    assert evidence.against[1] > unnamed.against[1] + 3


def test_an_image_with_two_names_keeps_the_commoner(tmp_path):
    pairs = [("a", "b", 0, None), ("a", "c", 0, None), ("a", "d", 0, None), *background(4)]
    columns = {
        "image_a": [pair[0] for pair in pairs],
        "image_b": [pair[1] for pair in pairs],
        "true_label": pa.array([pair[2] for pair in pairs], pa.int8()),
        "probability": pa.array([SURE[pair[2]] for pair in pairs], pa.float32()),
        "person_a": ["Anna", "Anna", "Ben", *[None] * 4],
        "person_b": ["Anna", "Anna", "Ben", *[None] * 4],
    }
    path = write_scores(tmp_path / "scores.parquet", columns)
    rows, reasons = found(read_scores(ScoreFile.open(path)))
    assert rows == [3]
    assert reasons == [
        "labelled same, but the images are named Anna and Ben; other rows have another name for one of the images"
    ]


def test_a_wrong_picture_is_named(tmp_path):
    crowd: list[tuple[Any, ...]] = [(f"a{i}", f"a{j}", 0, None) for i in range(4) for j in range(i)]
    pairs = [*((f"a{each}", "odd.jpg", 0, 0.98) for each in range(4)), *crowd, *background()]
    scores = scored(tmp_path, pairs)
    suspects = find_suspects(scores, 4)
    assert sorted((suspects.rows + 1).tolist()) == [1, 2, 3, 4]
    said = "the scores are against 4 of 4 labels same of odd.jpg: perhaps a wrong picture"
    assert all(said in reason for reason in suspects.reasons)
    assert suspects.document["images"] == [{"image": "odd.jpg", "disputed": 4, "pairs": 4}]


def test_pairs_without_a_score_or_a_label_are_left_out(tmp_path):
    pairs = [("a", "b", 0, None), ("b", "c", 0, np.nan), ("a", "c", 1, 0.4), *background()]
    document = find_suspects(scored(tmp_path, pairs), 5).document
    assert (document["labels"], document["not_scored"], document["contradictions"]) == (42, 1, 0)


def test_a_score_beside_a_blank_cell_is_left_out(tmp_path):
    pairs = [(None, "b", 0, 0.9), ("", "c", 0, 0.9), ("d", "e", 0, 0.9), *background()]
    scores = scored(tmp_path, pairs)
    assert found(scores)[0] == [3]


def test_thresholds_are_mean_self_confidence():
    """The worked example of the paper's method for two classes, by hand."""
    labels = np.array([0, 0, 0, 1, 1, 1])
    probability = np.array([0.1, 0.2, 0.9, 0.9, 0.8, 0.1])
    learned = ConfidentLearning.of(probability, labels)
    same, different = (0.9 + 0.8 + 0.1) / 3, (0.9 + 0.8 + 0.1) / 3
    assert learned.thresholds == (pytest.approx(same), pytest.approx(different))
    assert learned.off_diagonal.tolist() == [False, False, True, False, False, True]
    assert learned.margin == pytest.approx([0.9, 0.8, 0.1, 0.9, 0.8, 0.1])
    assert learned.log_odds[0] == pytest.approx(np.log(0.1 / 0.9))


@pytest.mark.parametrize("label", [0, 1])
def test_one_kind_of_label_alone(tmp_path, label):
    pairs: list[tuple[Any, ...]] = [(f"a{each}", f"b{each}", label, None) for each in range(20)]
    pairs[4] = ("a4", "b4", label, SURE[1 - label])
    scores = scored(tmp_path, pairs)
    assert found(scores)[0] == [5]
    assert find_suspects(scores, 5).document["thresholds"][("different", "same")[label]] is None


def flipped(pairs: int, share: float, seed: int, **changes) -> tuple[dict, np.ndarray]:
    """Drawn columns with a share of the labels turned round, and which."""
    columns = draw_columns(pairs, seed, **changes)
    truth = columns["true_label"].to_numpy().copy()
    wrong = np.random.default_rng(seed + 1).random(pairs) < share
    truth[wrong] ^= 1
    return columns | {"true_label": pa.array(truth)}, wrong & ~np.isnan(columns["probability"].to_numpy(False))


@pytest.mark.parametrize(("people", "least"), [(True, 1.0), (False, 0.9)])
def test_flipped_labels_come_first(tmp_path, people, least):
    """With names all of them; without, the chains of 3,000 pairs of 60 people."""
    columns, wrong = flipped(3000, 0.02, 5, people=60)
    if not people:
        columns = {name: cells for name, cells in columns.items() if not name.startswith("person")}
    scores = read_scores(ScoreFile.open(write_scores(tmp_path / "scores.parquet", columns)))
    suspects = find_suspects(scores, int(wrong.sum()))
    assert wrong[suspects.rows].mean() >= least
    assert (np.diff(suspects.likelihood) <= 0).all()


def run(*arguments):
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s.parquet", "--suspects", "0", "w.csv"], "--suspects must name at least 1 pair, got 0"),
        (["s.parquet", "--suspects", "9", "w.txt"], "w.txt: --suspects writes .csv or .parquet files"),
        (
            ["s.parquet", "--suspects", "9", "there.csv"],
            "there.csv: --suspects writes a new file, and this one exists",
        ),
        (["s.parquet", "--suspects", "9", f"{'n' * 300}.csv"], "n.csv: --suspects cannot write there: "),
        (
            ["s.parquet", "--suspects", "9", "s.parquet"],
            "s.parquet: --suspects would write into the input ",
        ),
        (["bare.parquet", "--suspects", "9", "w.csv"], "bare.parquet: no pair has both a label and a score"),
        (["plain.parquet", "--suspects", "9", "w.csv"], "plain.parquet: no column 'image_a'"),
        (
            ["s.parquet", "--suspects", "9", "w.csv", "--export-worst", "9", "w.csv"],
            "w.csv: named by --export-worst and --suspects; name two files",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    columns = draw_columns(20)
    write_scores(tmp_path / "s.parquet", columns)
    write_scores(tmp_path / "bare.parquet", draw_columns(20, true_label=None))
    write_scores(tmp_path / "plain.parquet", draw_columns(20, image_a=None, image_b=None))
    (tmp_path / "there.csv").write_text("filled in by hand")
    result = run(*arguments, "-o", "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "w.csv").exists()
    assert (tmp_path / "there.csv").read_text() == "filled in by hand"


@pytest.fixture(scope="module")
def faces(cache, tmp_path_factory):
    """The drawn faces with the labels of rows 1 and 2 turned round, scored; a folder with manifest and scores."""
    folder = tmp_path_factory.mktemp("suspects")
    samples = REPOSITORY / "sample_manifests"
    shutil.copytree(samples / "faces", folder / "faces")
    rows = list(csv.DictReader((samples / "faces.csv").read_text(encoding="utf8").splitlines()))
    for row in (rows[0], rows[1]):
        row["label"] = str(1 - int(row["label"]))
    pd.DataFrame(rows).to_csv(folder / "faces.csv", index=False)
    batchverify.score(folder / "faces.csv", folder / "scores.parquet", cache=cache, quiet=True)
    return folder


def test_the_file_is_a_manifest_that_score_and_train_read(faces, cache, tmp_path):
    for suffix in ("csv", "parquet"):
        done = run(faces / "scores.parquet", "-o", tmp_path / "out", "--suspects", 2, tmp_path / f"s.{suffix}")
        assert done.exit_code == 0, done.stderr
        assert f"s.{suffix}" in done.stderr
    frame = pd.read_csv(tmp_path / "s.csv")
    written = pd.read_parquet(tmp_path / "s.parquet")
    pd.testing.assert_frame_equal(frame, written, check_dtype=False, rtol=1e-5)
    assert sorted(frame["row"]) == [1, 2] and frame["rank"].tolist() == [1, 2]
    assert frame["reason"].str.startswith("labelled ").all()
    assert (frame["suspicion"] > 0.5).all()
    for name in ("s.csv", "s.parquet"):
        again = batchverify.score(tmp_path / name, cache=cache, quiet=True).to_pandas()
        assert again["reason"].tolist() == frame["reason"].tolist()
        assert again["true_label"].tolist() == frame["label"].tolist()
        assert np.allclose(again["probability"], frame["run_probability"], atol=1e-6)
    head = tmp_path / "head.safetensors"
    pd.read_csv(faces / "faces.csv")[:40].to_csv(faces / "few.csv", index=False)
    training, dev = (str(faces / name) for name in ("few.csv", "faces.csv"))
    batchverify.train(training, dev, head, test=str(tmp_path / "s.csv"), cache=cache, quiet=True)
    assert head.is_file()


def test_metrics_and_terminal_say_what_was_found(tmp_path):
    columns, wrong = flipped(400, 0.02, 3, people=20)
    scores = write_scores(tmp_path / "scores.parquet", columns)
    failed = int(np.isnan(columns["probability"].to_numpy(False)).sum())
    done = run(scores, "-o", tmp_path / "out", "--draws", "0", "--suspects", 5, tmp_path / "s.csv")
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())["suspects"]
    assert document["against_names"] == wrong.sum()
    assert document["not_scored"] == failed and document["labels"] == 400 - failed
    assert document["listed"] == 5 and document["found"] >= wrong.sum()
    for line in (
        f"5 written; something speaks against {document['found']}",
        f"{wrong.sum()} the names",
        f"{failed} labels without a score",
    ):
        assert f" {line}" in done.stderr


def test_options_of_the_api():
    with pytest.raises(UsageError, match="--suspects must name at least 1 pair, got -1"):
        EvaluateOptions(suspects=(-1, "a.csv"))


def test_no_labels_is_said_from_python(tmp_path):
    scores = write_scores(tmp_path / "s.parquet", draw_columns(20, true_label=None))
    with pytest.raises(ManifestError, match="--truth names a manifest with labels"):
        batchverify.evaluate(scores, suspects=(3, str(tmp_path / "w.csv")))


def test_rows_are_listed_in_words():
    assert listed([4]) == "row 5"
    assert listed([0, 1]) == "rows 1 and 2"
    assert listed([0, 1, 2]) == "rows 1, 2 and 3"
    assert listed(list(range(999, 1009))) == "rows 1,000, 1,001, 1,002, 1,003 and 6 more"


def test_the_order_is_the_same_each_time(tmp_path):
    columns, _ = flipped(500, 0.05, 8)
    scores = read_scores(ScoreFile.open(write_scores(tmp_path / "scores.parquet", columns)))
    first, second = (find_suspects(scores, 50) for _ in range(2))
    assert isinstance(first, Suspects)
    assert first.rows.tolist() == second.rows.tolist() and first.reasons == second.reasons
