"""Input that `train` refuses, leaves out or warns of, and the messages."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from train_samples import DEV, FACES, TRAIN, Bench, pairs_of

import batchverify
from batchverify.errors import UsageError
from batchverify.options import SEEDS, TrainOptions

LANDSCAPE = str(FACES.parent / "broken" / "landscape.jpg")


@pytest.fixture
def bench(tmp_path) -> Bench:
    """Manifests whose images are not cached: input that is refused before embedding leaves no cache behind."""
    return Bench(tmp_path, tmp_path / "cache")


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Bench:
    """A bench that has embedded all faces."""
    bench = Bench(tmp_path_factory.mktemp("filled"), tmp_path_factory.mktemp("cache"))
    batchverify.embed(pairs_of(*TRAIN, *DEV), cache=bench.cache, quiet=True)
    return bench


@pytest.fixture
def cached(filled, tmp_path) -> Bench:
    """Fresh manifests; their images are in the cache."""
    return Bench(tmp_path, filled.cache)


def change(bench: Bench, name: str, how) -> None:
    bench.write(name, how(pd.read_csv(bench.folder / name)))


CHANGES = {
    "blank label": (
        "train.csv",
        lambda table: table.assign(label=table["label"].mask(table.index == 7).astype("Int8")),
        "train.csv: row 8: the label is blank; training needs 0 or 1 in every row",
    ),
    "blank label in dev": (
        "dev.csv",
        lambda table: table.assign(label=table["label"].mask(table.index == 35).astype("Int8")),
        "dev.csv: row 36: the label is blank",
    ),
    "label of two": (
        "train.csv",
        lambda table: table.assign(label=table["label"].replace(1, 2)),
        "label must be 0 or 1, got '2'",
    ),
    "no label": (
        "dev.csv",
        lambda table: table.drop(columns="label"),
        "dev.csv: the manifest has no column 'label'",
    ),
    "one class": (
        "train.csv",
        lambda table: table[table["label"] == 1],
        "train.csv: the training pairs all have the label 1; training needs 0 (same) and 1 (different)",
    ),
    "one class in dev": (
        "dev.csv",
        lambda table: table[table["label"] == 0],
        "dev.csv: the dev pairs all have the label 0",
    ),
    "few pairs": (
        "train.csv",
        lambda table: table[:19],
        "train.csv: only 19 training pairs; at least 20 are needed",
    ),
}


@pytest.mark.parametrize(("name", "how", "message"), CHANGES.values(), ids=CHANGES)
def test_manifests_that_teach_nothing_are_refused_before_anything_is_embedded(bench, name, how, message):
    change(bench, name, how)
    line = bench.refused()
    assert message in line and str(bench.folder) in line and line.count("\n") == 1
    assert not bench.cache.exists()


OPTIONS = {
    "algorithm": (["--algorithm", "forest"], "--algorithm must be one of distance, logistic,"),
    "algorithm twice": (["--algorithm", "distance", "--algorithm", "distance:chi2sum"], "appears twice"),
    "features": (["--features", "absdif", "--algorithm", "network"], "absdif"),
    "ensemble of a search": (
        ["--tune", "3", "--algorithm", "distance", "--algorithm", "network"],
        "--tune searches the settings of one algorithm: give one --algorithm or none",
    ),
    "search of nothing known": (["--tune", "3", "--algorithm", "forest"], "--algorithm must be one of"),
    "widths of text": (["--widths", "64,8"], "expected numbers joined by -, got '64,8'"),
    "widths with a gap": (["--widths", "64--8"], "expected numbers joined by -, got '64--8'"),
    "width of none": (
        ["--widths", "64-0"],
        "--widths must be numbers of neurons from 1 to 65,536, got '64-0'",
    ),
    "width of a typing error": (["--widths", "1024128"], "from 1 to 65,536, got '1024128'"),
    "seed": (["--seed", "-1"], "--seed and those of --repeats must lie between 0 and 4294967295, got -1"),
    "seed of the last repeat": (["--seed", str(SEEDS - 1), "--repeats", "2"], "got 4294967295"),
    "dropout": (["--dropout", "1"], "--dropout must be a share from 0 to below 1"),
    "rate": (["--max-lr", "0"], "--max-lr must be positive"),
    "folds": (["--folds", "1"], "--folds must be 0 (none) or at least 2"),
    "test": (["--test", "nowhere.csv"], "nowhere.csv: no such file"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_invalid_options_are_refused_before_anything_is_embedded(bench, options, message):
    assert message in bench.refused(*options)
    assert not bench.cache.exists()


def test_outputs_that_cannot_be_written_are_refused_before_anything_is_embedded(bench):
    (bench.folder / "a.safetensors").mkdir()
    (bench.folder / "a file").write_text("")
    for output, message in [
        ("head.pt", "head.pt: the name of a head must end in .safetensors"),
        ("none/head.safetensors", "there is no folder "),
        ("a file/head.safetensors", "there is no folder "),
        ("a.safetensors", "a.safetensors: this is a folder"),
    ]:
        assert message in bench.refused(output=bench.folder / output)
    log = bench.refused("--tensorboard", str(bench.folder / "a file" / "logs"))
    assert "a file/logs: the folder cannot be made: Not a directory" in log
    assert not bench.cache.exists()


def test_dev_equal_to_train_is_refused_before_anything_is_embedded(bench):
    assert "the dev pairs are the training pairs" in bench.refused(dev="train.csv")
    shutil.copy(bench.folder / "train.csv", bench.folder / "copy.csv")
    assert f"the dev pairs are the training pairs ({bench.folder}/copy.csv)" in bench.refused(dev="copy.csv")
    assert not bench.cache.exists()


def test_dev_equal_to_train_in_another_order_is_refused(cached):
    table = pairs_of(*TRAIN).sample(frac=1, random_state=0)
    cached.write("dev.csv", table.rename(columns={"image_a": "image_b", "image_b": "image_a"}))
    line = cached.refused()
    assert "every dev pair is among the training pairs" in line and "share" not in line


def test_equal_manifests_in_other_folders_name_other_pairs(cached):
    """Relative paths: the same text names other images in another folder."""
    for folder, people in (("one", TRAIN[:3]), ("two", DEV)):
        (cached.folder / folder).mkdir()
        for index, person in enumerate(people):
            for number in (1, 2, 3):
                shutil.copy(FACES / f"{person}_{number}.jpg", cached.folder / folder / f"{index}_{number}.jpg")
        names = [f"{index}_{number}.jpg" for index in range(3) for number in (1, 2, 3)]
        rows = [(a, b, int(a[0] != b[0])) for a in names for b in names if a < b]
        table = pd.DataFrame(rows, columns=["image_a", "image_b", "label"])
        table.to_csv(cached.folder / folder / "pairs.csv", index=False)
    paths = [str(cached.folder / folder / "pairs.csv") for folder in ("one", "two")]
    result = cached.run("train", paths[0], "--dev", paths[1], "-o", str(cached.head), "-q")
    assert (result.exit_code, result.output) == (0, "")


def test_shared_people_are_counted_listed_and_warned_of(cached):
    cached.write("dev.csv", pairs_of("esra", *DEV))
    result = cached.train()
    assert result.exit_code == 0
    assert "warning: training and dev share 1 person (esra) and 3 identical images (" in result.stderr
    record = json.loads(cached.head.with_name("head.training.json").read_text())
    assert record["leaks"][0]["people"] == ["esra"] and len(record["leaks"][0]["images"]) == 3


def test_strict_identities_refuses_shared_people_before_anything_is_embedded(bench):
    bench.write("dev.csv", pairs_of("esra", *DEV))
    line = bench.refused("--strict-identities")
    assert line == "batchverify: --strict-identities: training and dev share 1 person (esra)\n"
    test = bench.write("test.csv", pairs_of("hari", "ada"))
    line = bench.refused("--strict-identities", "-q", "--test", str(test))
    assert "; training and test share 1 person (ada); dev and test share 1 person (hari)\n" in line
    assert not bench.cache.exists()


def test_the_same_image_under_another_name_and_person_is_found(cached):
    copy = shutil.copy(FACES / "ada_2.jpg", cached.folder / "someone.jpg")
    row = [copy, str(FACES / "gus_1.jpg"), 1, "someone", "gus"]
    table = pairs_of(*DEV)
    cached.write("dev.csv", pd.concat([table, pd.DataFrame([row], columns=table.columns)]))
    line = cached.refused("--strict-identities", "-q")
    assert line == (
        f"batchverify: --strict-identities: training and dev share 1 identical image ({FACES}/ada_2.jpg)\n"
    )
    assert cached.train("-q").exit_code == 0


def test_leaks_between_dev_and_test_are_found_too(cached):
    test = cached.write("test.csv", pairs_of("hari", "ada").drop(columns=["person_a", "person_b"]))
    line = cached.refused("--strict-identities", "-q", "--test", str(test))
    assert "training and test share 3 identical images (" in line
    assert "; dev and test share 3 identical images (" in line


def test_strict_identities_without_people_is_a_warning(cached):
    change(cached, "dev.csv", lambda table: table.drop(columns=["person_a", "person_b"]))
    result = cached.train("--strict-identities")
    assert result.exit_code == 0
    assert "warning: --strict-identities: the dev pairs have no columns person_a and person_b" in result.stderr


def with_bad_rows(people: tuple[str, ...]) -> pd.DataFrame:
    table = pairs_of(*people)
    face = table["image_a"][0]
    bad = [[face, "missing.jpg", 1, people[0], ""], [LANDSCAPE, face, 1, "", people[0]]]
    return pd.concat([table, pd.DataFrame(bad, columns=table.columns)])


def test_pairs_that_cannot_be_embedded_are_left_out_counted_and_named(cached):
    cached.write("train.csv", with_bad_rows(TRAIN))
    result = cached.train()
    assert result.exit_code == 0, result.output
    assert "warning: 2 training pairs could not be embedded and are left out:" in result.stderr
    assert f"{cached.folder}/train.csv: row 106: image_b not_found\n" in result.stderr
    assert f"{cached.folder}/train.csv: row 107: image_a no_face\n" in result.stderr
    assert "training 105, dev 36; 2 left out" in result.stderr
    left_out = json.loads(cached.head.with_name("head.training.json").read_text())["left_out"]
    assert [(each["set"], each["row"], each["error_a"], each["error_b"]) for each in left_out] == [
        ("training", 106, None, "not_found"),
        ("training", 107, "no_face", None),
    ]


def test_more_failures_than_allowed_end_with_3_and_name_the_set(cached):
    cached.write("dev.csv", with_bad_rows(DEV))
    assert cached.train("-q", "--max-failed", "0.06").exit_code == 0
    cached.head.unlink()
    result = cached.train("-q", "--max-failed", "0.05")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("batchverify: dev pairs: 2 of 38 failed, more than --max-failed 0.05")
    assert not cached.head.exists()


def test_a_wrong_image_root_ends_with_3_and_one_document(cached):
    for name in ("train.csv", "dev.csv"):
        change(cached, name, lambda table: table.assign(image_a="no/" + table["image_a"].str.split("/").str[-1]))
    result = cached.train("--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["failed"] == 15 - 1
    assert "training pairs: nothing could be scored: all 105 failed (not_found 14)" in result.stderr


def test_too_few_embedded_training_pairs_are_refused(cached):
    """The manifest has enough rows of both labels, but too few with two embeddings."""
    both = pairs_of(*TRAIN).sort_values("label", kind="stable")[5:35].reset_index(drop=True)
    cached.write("train.csv", both.assign(image_b=both["image_b"].mask(both.index > 18, "missing.jpg")))
    assert "only 19 training pairs; at least 20 are needed" in cached.refused("-q")
    cached.write("train.csv", both.assign(image_b=both["image_b"].mask(both["label"] == 0, "missing.jpg")))
    assert "of 20 pairs, 0 are same and 20 different" in cached.refused("-q")


def test_a_long_list_of_left_out_pairs_is_cut_in_the_message_but_not_in_the_record(cached):
    table = pairs_of(*TRAIN)
    cached.write("train.csv", table.assign(image_b=table["image_b"].mask(table.index > 96, "missing.jpg")))
    result = cached.train()
    assert "warning: 8 training pairs could not be embedded" in result.stderr
    assert result.stderr.count("image_b not_found") == 5 and "  … and 3 more;" in result.stderr
    record = json.loads(cached.head.with_name("head.training.json").read_text())
    assert [each["row"] for each in record["left_out"]] == list(range(98, 106))


def test_options_from_python():
    assert TrainOptions(algorithms="logistic", widths=[32, 8]).algorithms == ("logistic",)  # type: ignore[arg-type]
    assert TrainOptions(widths=64).widths == (64,)  # type: ignore[arg-type]
    for widths in ((), (8.5,), ("8",), (np.nan,)):
        with pytest.raises(UsageError, match="--widths must be numbers of neurons"):
            TrainOptions(widths=widths)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--seed"):
        TrainOptions(seed=-1)
