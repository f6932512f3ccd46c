"""`train` from end to end on the drawn faces with the packaged weights: head, record, cache, summary."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from train_samples import DEV, TRAIN, Bench, pairs_of

import batchverify
from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.image_keys import content_key
from batchverify.embedding.backbone import load_backbone
from batchverify.fingerprint import EmbeddingFingerprint, EmbeddingSettings
from batchverify.heads.head import Head
from batchverify.options import TrainOptions

QUICK = ("--algorithm", "network", "--widths", "8", "--epochs", "3", "--max-lr", "0.01")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def first(cache, tmp_path_factory):
    """A bench with a head trained with the default settings, and the result of that."""
    bench = Bench(tmp_path_factory.mktemp("first"), cache)
    return bench, bench.train("--json")


@pytest.fixture
def bench(first, tmp_path) -> Bench:
    """Fresh manifests; their images are in the cache."""
    return Bench(tmp_path, first[0].cache)


def record_of(bench: Bench) -> dict:
    return json.loads(bench.head.with_name("head.training.json").read_text())


def plain_fingerprint(**settings) -> EmbeddingFingerprint:
    return EmbeddingFingerprint.of(load_backbone().fingerprint, EmbeddingSettings(**settings))


def test_a_training_writes_head_and_record_and_prints_one_document(first):
    bench, result = first
    assert result.exit_code == 0, result.output
    summary, record = json.loads(result.stdout), record_of(bench)
    assert summary["pairs"] == {"training": 105, "dev": 36}
    assert (summary["embedded"], summary["left_out"], summary["leaks"]) == (24, 0, 0)
    assert (summary["recipes"], summary["parameters"]) == (["distance:chi2sum"], 4)
    assert (summary["head"], summary["record"]) == (str(bench.head), str(bench.head)[:-12] + ".training.json")
    head = Head.load(bench.head)
    assert head.digest == summary["digest"]
    assert head.embedding.id == plain_fingerprint().id
    assert record["head"]["thresholds"] == head.about["thresholds"] == summary["about"]["thresholds"]
    assert record["embedding"]["training"]["embedded"] + record["embedding"]["dev"]["embedded"] == 24
    assert summary["metrics"][0]["dev"]["auc"] >= 0.99 and summary["metrics"][0]["seed"] == 0


def test_the_head_scores(first, tmp_path):
    bench, _ = first
    for options, label in ((["--head", str(bench.head)], "trained"), ([], "shipped")):
        out = tmp_path / f"{label}.parquet"
        result = bench.run("score", str(bench.folder / "dev.csv"), "-o", str(out), "-q", *options)
        assert result.exit_code == 0, result.output
        table = pq.read_table(out).to_pandas()
        assert (table["label"] == table["true_label"]).mean() >= 0.95
    trained, shipped = (
        pd.read_parquet(tmp_path / f"{name}.parquet")["probability"] for name in ("trained", "shipped")
    )
    assert not np.array_equal(trained, shipped)


def test_the_head_is_refused_for_another_crop_with_what_differs(first, tmp_path):
    bench, _ = first
    arguments = ["score", str(bench.folder / "dev.csv"), "-o", str(tmp_path / "x.parquet")]
    result = bench.run(*arguments, "--head", str(bench.head), "--crop", "center")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "crop.mode detect against center" in result.stderr and "crop.margin 44" in result.stderr
    assert not (tmp_path / "x.parquet").exists()


def test_a_rate_that_the_dev_pairs_do_not_support(first, tmp_path):
    bench, _ = first
    arguments = ["score", str(bench.folder / "dev.csv"), "-o", str(tmp_path / "x.parquet")]
    result = bench.run(*arguments, "--head", str(bench.head), "--at-far", "0.1")
    assert result.exit_code == 2
    assert "--at-far 0.1: the head stores no threshold for this rate; its 27 different" in result.stderr


def test_training_again_embeds_nothing_and_gives_the_same_bytes(first, bench):
    assert json.loads(bench.train("--json").stdout)["embedded"] == 0
    assert bench.head.read_bytes() == first[0].head.read_bytes()


@pytest.mark.parametrize("options", [QUICK, ("--algorithm", "logistic", "--algorithm", "distance:cosine")])
def test_one_seed_one_head(bench, options):
    heads = []
    for name, seed in (("one", "3"), ("two", "3"), ("other", "4")):
        output = bench.folder / f"{name}.safetensors"
        assert bench.train(*options, "--seed", seed, "-q", output=output).exit_code == 0
        heads.append(output.read_bytes())
    assert heads[0] == heads[1] != heads[2]


def test_without_json_everything_is_on_stderr(bench):
    test = bench.write("test.csv", pairs_of("ada", "hari"))
    result = bench.train(*QUICK, "--test", str(test))
    assert (result.exit_code, result.stdout) == (0, "")
    assert "network:absdiff  epoch 3/3  loss " in result.stderr
    lines = dict(line.split("  ", 1) for line in result.stderr.splitlines() if "  " in line)
    for name in ("held-out", "dev", "test"):
        assert "AUC" in lines[name] and "(best possible " in lines[name] and "±" not in lines[name]
    assert "105, dev 36, test 15" in lines["pairs"]
    assert "27 different pairs support none" in lines["false accept"]


def test_quiet_is_silent(bench):
    result = bench.train(*QUICK, "-q")
    assert (result.exit_code, result.output) == (0, "")
    assert bench.head.exists()


def test_repeats_show_mean_and_standard_deviation_and_keep_the_first_head(bench):
    result = bench.train(*QUICK, "--repeats", "3", "--seed", "7")
    assert result.exit_code == 0, result.output
    assert "seed 9:" in result.stderr and "AUC 1.00000 ± 0.0" in result.stderr
    record = record_of(bench)
    assert [each["seed"] for each in record["metrics"]] == [7, 8, 9]
    assert len({each["held_out"]["brier"] for each in record["metrics"]}) == 3
    assert Head.load(bench.head).about["training"]["options"]["seed"] == 7


def test_the_test_set_is_only_measured(first, bench):
    test = bench.write("test.csv", pairs_of("ada", "hari"))
    summary = json.loads(bench.train("--test", str(test), "--json").stdout)
    measured = summary["metrics"][0]["test"]
    assert measured["pairs"] == 15 and {"auc", "f1", "accuracy", "brier", "ece", "best_f1"} <= set(measured)
    assert bench.head.read_bytes() == first[0].head.read_bytes()
    result = batchverify.score(test, cache=bench.cache, head=bench.head, quiet=True).to_pandas()
    assert measured["brier"] == pytest.approx(((result["probability"] - result["true_label"]) ** 2).mean())


def test_dev_is_measured_as_a_test_set_is(bench):
    metrics = json.loads(bench.train("--test", str(bench.folder / "dev.csv"), "--json").stdout)["metrics"]
    assert metrics[0]["dev"] == metrics[0]["test"]


def test_augmented_views_are_embedded_once_under_their_own_fingerprint(first, bench, tmp_path):
    bench.cache = tmp_path / "cache"
    shutil.copytree(first[0].cache, bench.cache)
    before = sorted(path.name for path in bench.cache.rglob("*") if path.is_file())
    counts = [json.loads(bench.train("--augment", "1", "--json").stdout)["embedded"] for _ in range(2)]
    assert counts == [15, 0]
    assert json.loads(bench.train("--augment", "2", "--json").stdout)["embedded"] == 15
    training = Head.load(bench.head).about["training"]
    assert (training["pairs"], training["options"]["augment"]) == (105, 2)
    assert record_of(bench)["views"][0]["cached"] == 15
    added = set(before) ^ {path.name for path in bench.cache.rglob("*") if path.is_file()}
    assert added and set(before).isdisjoint(added)
    assert json.loads(bench.train("--json").stdout)["embedded"] == 0
    assert bench.head.read_bytes() == first[0].head.read_bytes()


def test_an_augmented_view_shows_the_same_person(bench):
    assert bench.train("--augment", "1", "-q").exit_code == 0
    paths = sorted({*pairs_of(*TRAIN)["image_a"], *pairs_of(*TRAIN)["image_b"]})
    keys = [content_key(Path(path).read_bytes()) for path in paths]
    tables = []
    for view in (0, 1):
        entries = EmbeddingCache(str(bench.cache), plain_fingerprint(view=view)).get_many(keys)
        tables.append(np.array([entry.vector for entry in entries], np.float32))
    same = (tables[0] * tables[1]).sum(axis=1)
    assert same.min() > 0.6 and same.max() < 0.9999


def test_tensorboard_reads_the_epochs(bench):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = bench.folder / "logs" / "new"
    assert bench.train(*QUICK, "--tensorboard", str(folder), "--repeats", "2").exit_code == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "network-absdiff-seed0",
        "network-absdiff-seed1",
    ]
    written = EventAccumulator(str(folder / "network-absdiff-seed1"))
    written.Reload()
    assert {"loss", "dev_loss", "dev_f1", "dev_auc", "lr"} <= set(written.Tags()["scalars"])
    losses = [(event.step, event.value) for event in written.Scalars("dev_loss")]
    epochs = record_of(bench)["networks"][1]["network:absdiff"]["epochs"]
    assert losses == [(epoch["epoch"], pytest.approx(epoch["dev_loss"])) for epoch in epochs]


def test_tensorboard_without_a_network_is_a_warning(bench):
    result = bench.train("--tensorboard", str(bench.folder / "logs"))
    assert result.exit_code == 0
    assert "warning: --tensorboard: nothing was written" in result.stderr


def test_from_python_with_tables_and_options(bench):
    options = TrainOptions(cache=bench.cache, quiet=True, widths=8)  # type: ignore[arg-type]
    summary = batchverify.train(pairs_of(*TRAIN), pairs_of(*DEV), bench.head, options, algorithms="distance:cosine")
    assert (summary.recipes, summary.embedded) == (["distance:cosine"], 0)
    assert json.loads(json.dumps(summary.to_json()))["digest"] == Head.load(bench.head).digest
    assert record_of(bench)["options"]["algorithms"] == ["distance:cosine"]
