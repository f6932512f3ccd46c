"""Reading score outputs: arrays, reasons, truth from a manifest, units of the bootstrap, errors for bad files."""

import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from failing_calls import failing_calls
from object_store import impatience
from score_tables import draw_columns, write_scores

from batchverify.errors import ManifestError, UsageError
from batchverify.evaluation.scores import ScoreFile, describe_truth, read_scores, read_truth, read_units
from batchverify.scoring.parquet import RECORD_KEY


def test_arrays_hold_what_the_columns_hold(tmp_path):
    columns = draw_columns(250, failed=0.1)
    scores = read_scores(ScoreFile.open(write_scores(tmp_path / "s.parquet", columns)))
    table = pa.table(columns)
    for name in ("probability", "similarity"):
        assert np.array_equal(getattr(scores, name), table[name].to_numpy(), equal_nan=True)
    assert scores.truth.tolist() == table["true_label"].to_pylist()
    assert [scores.reasons[code] for code in scores.reason] == table["status"].to_pylist()
    assert scores.failures() == {"no_face": table["status"].to_pylist().count("no_face")}
    assert scores.threshold == 0.5


def test_a_folder_of_parts_is_one_run(tmp_path):
    table = pa.table(draw_columns(90))
    folder = tmp_path / "run"
    folder.mkdir()
    for number, start in enumerate((0, 40)):
        part = table.slice(start, 40 if number == 0 else 50).replace_schema_metadata({RECORD_KEY: '{"part": 0}'})
        pq.write_table(part, folder / f"part-{number:05d}.parquet")
    with pytest.raises(ManifestError, match="no _SUCCESS in the folder, so its run is not finished"):
        ScoreFile.open(str(folder))
    (folder / "_SUCCESS").write_text(json.dumps({"threshold": 0.25, "options": {}}))
    scores = read_scores(ScoreFile.open(str(folder)))
    assert (len(scores), scores.threshold) == (90, 0.25)
    assert np.array_equal(scores.probability, table["probability"].to_numpy(), equal_nan=True)
    rows = np.array([89, 3, 40, 3])
    found = scores.file.take(rows, ["image_a"])
    assert [each["image_a"] for each in found] == [table["image_a"][int(row)].as_py() for row in rows]


def test_a_store_that_fails_once_is_asked_again(tmp_path):
    path = write_scores(tmp_path / "s.parquet", draw_columns(20))

    def read():
        file = ScoreFile.open(path)
        return read_scores(file).probability.tolist(), file.written()

    with failing_calls(tmp_path) as calls, impatience():
        with calls.failing():
            expected = read()
        requests = [number for number, (name, _) in enumerate(calls.seen) if name in ("open", "stat")]
        for number in requests:
            with calls.failing(number, "500"):
                assert read() == expected
            assert calls.hit[0] in ("open", "stat")
    assert len(requests) > 4


def test_blank_labels_are_unknown_and_odd_failures_have_no_reason(tmp_path):
    columns = {
        "probability": pa.array([0.1, None, None, 0.9], pa.float64()),
        "status": pa.array(["ok", "ok", None, "ok"]),
        "true_label": pa.array([0, None, 1, None], pa.int8()),
    }
    scores = read_scores(ScoreFile.open(write_scores(tmp_path / "s.parquet", columns)))
    assert scores.truth.tolist() == [0, -1, 1, -1]
    assert scores.failures() == {"not stated": 2}
    assert scores.similarity is None
    assert describe_truth(scores, None) == {"source": "true_label", "same": 1, "different": 1, "unknown": 2}
    assert (read_units(scores.file).kind, read_units(scores.file).count) == ("pairs", 4)


BAD = [
    (
        {"probability": None},
        "no column 'probability'; is it an output of `batchverify score`? The file has image_a",
    ),
    ({"probability": ["high"] * 9}, "column 'probability' must hold floating-point numbers, found string"),
    ({"similarity": ["high"] * 9}, "column 'similarity' must hold floating-point numbers, found string"),
    ({"status": list(range(9))}, "column 'status' must hold reasons (strings), found int64"),
    ({"true_label": [0] * 8 + [7]}, "row 9: label must be 0 or 1, got 7"),
    ({"true_label": [[0]] * 9}, "column 'true_label' must hold 0 or 1, found list<"),
    ({"similarity": [0.5] * 8 + [float("inf")]}, "row 9: similarity must be a number, got inf"),
    ({"probability": pa.array([0.5] * 8 + [1.5])}, "row 9: probability must lie between 0 and 1, got 1.5"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[each[1][:40] for each in BAD])
def test_wrong_columns_are_named(tmp_path, changes, message):
    path = write_scores(tmp_path / "s.parquet", draw_columns(9, **changes))
    with pytest.raises(ManifestError) as caught:
        read_scores(ScoreFile.open(path))
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_are_read_however_another_program_stored_them(tmp_path, kind):
    columns = draw_columns(250, failed=0.1)
    lost = columns["status"].tolist().count("no_face")
    texts = {name: pa.array(columns[name]).cast(kind) for name in ("status", "image_a", "person_a")}
    try:
        path = write_scores(tmp_path / "s.parquet", columns | texts)
    except pa.ArrowNotImplementedError:
        pytest.skip("this pyarrow writes no Parquet of this type")
    assert read_scores(ScoreFile.open(path)).failures() == {"no_face": lost}
    assert read_units(ScoreFile.open(path)).kind == "identities"


def test_a_status_of_nothing_states_no_reason(tmp_path):
    columns = draw_columns(50, failed=0.1, status=pa.nulls(50))
    path = write_scores(tmp_path / "s.parquet", columns)
    assert read_scores(ScoreFile.open(path)).failures() == {"not stated": columns["label"].null_count}


def test_files_that_are_none_are_named(tmp_path):
    (tmp_path / "text.parquet").write_text("image_a,image_b\n")
    (tmp_path / "folder").mkdir()
    empty = write_scores(tmp_path / "empty.parquet", {name: each[:0] for name, each in draw_columns(1).items()})
    for name, message in [
        (str(tmp_path / "none.parquet"), "no such file or folder"),
        (str(tmp_path / "text.parquet"), "not a readable Parquet file ("),
        (str(tmp_path / "folder"), "the folder has no part files of `batchverify score`"),
        (empty, "the file has no rows, so there is nothing to evaluate"),
    ]:
        with pytest.raises(ManifestError) as caught:
            ScoreFile.open(name)
        assert str(caught.value).startswith(f"{name}: {message}")


def test_a_threshold_must_be_known(tmp_path):
    file = ScoreFile.open(write_scores(tmp_path / "s.parquet", draw_columns(9), threshold=None))
    with pytest.raises(UsageError, match="no run record with a threshold; give one with --threshold"):
        read_scores(file)
    assert read_scores(file, threshold=0.25).threshold == 0.25


def test_units_are_people_and_where_they_are_blank_images(tmp_path):
    columns = {
        "image_a": ["x", "x", "y", "Ann"],
        "image_b": ["y", "z", "x", "z"],
        "probability": [0.1, 0.2, 0.3, 0.4],
        "person_a": ["Ann", "Ann", "Bob", None],
        "person_b": ["Bob", "", "Ann", "Ann"],
    }
    units = read_units(ScoreFile.open(write_scores(tmp_path / "people.parquet", columns)))
    # Ann, Bob, image z, and the image whose name is a person's.
    assert (units.kind, units.count) == ("identities", 4)
    assert units.a.tolist() == [units.b[2], units.b[2], units.b[0], units.a[3]]
    assert len({*units.a.tolist(), *units.b.tolist()}) == 4
    del columns["person_b"]
    units = read_units(ScoreFile.open(write_scores(tmp_path / "images.parquet", columns)))
    assert (units.kind, units.count) == ("images", 4)
    assert (units.a[0], units.b[0]) == (units.b[2], units.a[2])


def test_people_by_number_are_one_with_and_without_blanks(tmp_path):
    columns = {"image_a": ["x", "y"], "image_b": ["y", "z"], "probability": [0.1, 0.2]}
    columns |= {"person_a": [1, 2], "person_b": pa.array([2.0, None])}
    units = read_units(ScoreFile.open(write_scores(tmp_path / "s.parquet", columns)))
    assert units.a[1] == units.b[0]
    assert units.count == 3


def test_truth_is_found_by_the_pair_in_any_order(tmp_path):
    columns = {"image_a": ["a", "c", "e", "a"], "image_b": ["b", "d", "f", "b"], "probability": [0.1] * 4}
    file = ScoreFile.open(write_scores(tmp_path / "s.parquet", columns))
    (tmp_path / "truth.csv").write_text("label,image_b,image_a\n1,c,d\n0,b,a\n,f,e\n1,x,y\n")
    assert read_truth(str(tmp_path / "truth.csv"), file).tolist() == [0, 1, -1, 0]


def test_truth_of_many_parts_takes_no_index_for_each(tmp_path):
    labelled, scored, parts = 400_000, 4_000, 80
    names = pa.array([f"folder/{each}.jpg" for each in range(labelled)])
    labels = np.arange(labelled) % 2
    columns = {"image_a": names, "image_b": names, "label": pa.array(labels, pa.int8())}
    pq.write_table(pa.table(columns), tmp_path / "truth.parquet")
    table = pa.table(columns | {"probability": pa.array(np.full(labelled, 0.5))}).slice(0, scored)
    pq.write_table(table, tmp_path / "whole.parquet")
    folder = tmp_path / "run"
    folder.mkdir()
    for part in range(parts):
        size = scored // parts
        pq.write_table(table.slice(part * size, size), folder / f"part-{part:05d}.parquet")
    (folder / "_SUCCESS").write_text("{}")
    seconds = []
    for scores in (tmp_path / "whole.parquet", folder):
        file, started = ScoreFile.open(str(scores)), time.process_time()
        assert np.array_equal(read_truth(str(tmp_path / "truth.parquet"), file), labels[:scored])
        seconds.append(time.process_time() - started)
    assert seconds[1] < 4 * seconds[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_a,image_b,label\na,b,0\nb,a,1\n", "the pair a and b has label 0 in one row and 1 in another"),
        ("image_a,image_b,label\nq,r,0\n", "labels none of the pairs of"),
        ("image_a,image_b,label\na,b,\n", "no row has a label"),
        ("image_a,image_b\na,b\n", "no column 'label'; the file has image_a, image_b"),
        ("image_a,image_b,label\na,b,2\n", "row 1: label must be 0 or 1, got '2'"),
    ],
)
def test_a_truth_that_cannot_be_used_is_named(tmp_path, text, message):
    columns = {"image_a": ["a"], "image_b": ["b"], "probability": [0.1]}
    file = ScoreFile.open(write_scores(tmp_path / "s.parquet", columns))
    (tmp_path / "truth.csv").write_text(text)
    with pytest.raises(ManifestError) as caught:
        read_truth(str(tmp_path / "truth.csv"), file)
    assert str(caught.value).startswith(f"{tmp_path / 'truth.csv'}: {message}")
