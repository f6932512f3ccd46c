"""`calibrate`: what changes in a head and what does not, cross-validation, refused pairs, outputs of `score`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from people import draw_people
from train_samples import DEV, FACES, TRAIN, Bench, pairs_of

import batchverify
from batchverify.errors import ArtifactError, UsageError
from batchverify.evaluation.figures import calibration_error
from batchverify.fingerprint import BackboneSpec, EmbeddingFingerprint, EmbeddingSettings
from batchverify.heads.fused_head import FusedHead
from batchverify.heads.head import Head
from batchverify.options import TrainOptions
from batchverify.training.calibrate import calibrate
from batchverify.training.fuse import fit_heads, head_probabilities, logits_of
from batchverify.training.recalibration import Refit, ScoredPairs, cross_validated, recalibrate


@pytest.fixture(scope="module")
def bench(cache, tmp_path_factory) -> Bench:
    """A head trained on five of the drawn people, another one's pairs in dev.csv, and an own.csv of all of dev."""
    bench = Bench(tmp_path_factory.mktemp("bench"), cache)
    bench.write("dev.csv", pairs_of("fay", "gus"))
    bench.write("own.csv", pairs_of(*DEV))
    assert bench.train().exit_code == 0
    return bench


def run(bench, pairs, output, *options):
    return bench.run("calibrate", str(bench.head), "--labelled", str(pairs), "-o", str(output), *options)


def test_the_scorers_stay_and_the_rest_is_fitted_anew(bench, tmp_path):
    result = run(bench, bench.folder / "own.csv", tmp_path / "new.safetensors", "--json")
    assert result.exit_code == 0, result.output
    summary, old, new = (
        json.loads(result.stdout),
        Head.load(bench.head),
        Head.load(tmp_path / "new.safetensors"),
    )
    assert new.digest == summary["digest"] != old.digest
    for one, other in zip(old.scorers, new.scorers, strict=True):
        assert all(
            (a == b).all() for pair in zip(one.layers, other.layers, strict=True) for a, b in zip(*pair, strict=True)
        )
    assert old.centre is not None and (old.centre == new.centre).all()
    assert new.calibration != old.calibration
    assert new.about["embedding"] == old.about["embedding"]
    assert new.about["training"] == old.about["training"]
    assert new.about["recalibration"]["head"] == old.digest
    assert new.about["thresholds"]["bounds"]["same"]["pairs"] == len(DEV)
    # The summary says what the pairs were compared with.
    assert "5 people" in summary["apart_from"][0]
    frame = batchverify.score(
        bench.folder / "own.csv", head=str(tmp_path / "new.safetensors"), cache=bench.cache, quiet=True
    )
    assert frame.threshold == new.about["thresholds"]["best_f1"]


def test_the_table_says_before_and_after(bench, tmp_path):
    result = run(bench, bench.folder / "own.csv", tmp_path / "new.safetensors")
    assert result.exit_code == 0
    for name in ("new to the head", "as it was", "calibrated", "bounds from"):
        assert f"\n{name}  " in result.stderr
    assert (tmp_path / "new.safetensors").is_file()


def test_pairs_that_the_head_has_learned_from_are_refused(bench, tmp_path):
    new = tmp_path / "new.safetensors"
    mixed, others = tmp_path / "mixed.csv", tmp_path / "others.csv"
    pairs_of(TRAIN[0], *DEV).to_csv(mixed, index=False)
    anonymous = pairs_of(TRAIN[0], *DEV).drop(columns=["person_a", "person_b"])
    anonymous.to_csv(others, index=False)
    own = bench.folder / "own.csv"
    for pairs, options, message in (
        (bench.folder / "train.csv", (), "these are the head's training pairs"),
        (mixed, (), f"shares 1 people with the head's training pairs ({TRAIN[0]})"),
        (others, (), "shares 3 images with the head's training pairs"),
        (own, ("--apart-from", str(bench.folder / "dev.csv")), "shares 2 people with"),
    ):
        result = run(bench, pairs, new, *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
    assert not new.exists()


def test_training_pairs_of_several_files_are_known_as_one(cache, tmp_path):
    bench, parts = Bench(tmp_path, cache), tmp_path / "parts"
    parts.mkdir()
    whole = pairs_of(*TRAIN)
    for number, part in enumerate((whole[::2], whole[1::2])):
        part.to_csv(parts / f"{number}.csv", index=False)
    dev = str(bench.write("dev.csv", pairs_of("fay", "gus")))
    assert bench.run("train", str(parts), "--dev", dev, "-o", str(bench.head)).exit_code == 0
    mixed = bench.write("mixed.csv", pairs_of(TRAIN[0], *DEV))
    result = run(bench, mixed, tmp_path / "new.safetensors")
    assert result.exit_code == 2
    assert f"shares 1 people with the head's training pairs ({TRAIN[0]})" in result.stderr
    whole[1:].to_csv(parts / "1.csv", index=False)
    result = run(bench, mixed, tmp_path / "new.safetensors")
    assert result.exit_code == 0
    told = f"{parts / '0.csv'} and 1 more file have changed since the head was trained: not compared"
    assert told in result.stderr.replace("\n", " ")


def test_training_images_are_known_again_from_another_folder(cache, tmp_path, monkeypatch):
    """The head was trained with an --image-root that was relative to the folder of that day."""
    bench = Bench(tmp_path, cache)
    for name, people in (("train", TRAIN), ("dev", ("fay", "gus"))):
        pairs = pairs_of(*people).drop(columns=["person_a", "person_b"])
        for side in ("image_a", "image_b"):
            pairs[side] = [Path(path).name for path in pairs[side]]
        bench.write(f"{name}.csv", pairs)
    monkeypatch.chdir(FACES.parent)
    assert bench.train("--image-root", FACES.name).exit_code == 0
    monkeypatch.chdir(tmp_path)
    own = bench.write("own.csv", pairs_of(TRAIN[0], *DEV).drop(columns=["person_a", "person_b"]))
    result = run(bench, own, tmp_path / "new.safetensors")
    assert result.exit_code == 2
    assert "shares 3 images with the head's training pairs" in result.stderr


def test_labels_that_look_swapped_and_missing_ones_are_refused(bench, tmp_path):
    table = pairs_of(*DEV)
    table.assign(label=1 - table.label).to_csv(tmp_path / "swapped.csv", index=False)
    table.assign(label=0).to_csv(tmp_path / "same.csv", index=False)
    for name, message in (("swapped", "are the labels swapped?"), ("same", "all have the label 0")):
        result = run(bench, tmp_path / f"{name}.csv", tmp_path / "new.safetensors")
        assert result.exit_code == 2
        assert message in result.stderr


def test_an_output_of_score_serves_as_well(bench, tmp_path):
    scores = tmp_path / "scores.parquet"
    options = {"cache": bench.cache, "quiet": True}
    batchverify.score(bench.folder / "own.csv", scores, head=str(bench.head), **options)
    summary = calibrate(bench.head, scores, tmp_path / "scored.safetensors", quiet=True)
    other = calibrate(bench.head, bench.folder / "own.csv", tmp_path / "pairs.safetensors", **options)
    one, two = Head.load(summary.head), Head.load(other.head)
    assert one.calibration == pytest.approx(two.calibration, rel=1e-3)
    assert summary.before["ece"] == pytest.approx(other.before["ece"], abs=1e-5)
    with pytest.raises(UsageError, match="was not scored by"):
        calibrate(summary.head, scores, tmp_path / "again.safetensors", quiet=True)
    for given in ({"limit": 3}, {"apart_from": (str(bench.folder / "own.csv"),)}):
        with pytest.raises(UsageError, match="is for a manifest, not for an output"):
            calibrate(bench.head, scores, tmp_path / "again.safetensors", quiet=True, **given)
    with pytest.raises(UsageError, match="needs the file of its head"):
        calibrate("shipped", scores, tmp_path / "again.safetensors", quiet=True)


def test_damaged_heads_and_records_are_no_tracebacks(bench, tmp_path):
    scores, head = tmp_path / "scores.parquet", tmp_path / "copy.safetensors"
    options = {"cache": bench.cache, "quiet": True}
    batchverify.score(bench.folder / "own.csv", scores, head=str(bench.head), **options)
    (tmp_path / "bad.safetensors").write_bytes(b"{}")
    for pairs in (scores, bench.folder / "own.csv"):
        with pytest.raises(ArtifactError, match="not a head"):
            calibrate(tmp_path / "bad.safetensors", pairs, tmp_path / "new.safetensors", **options)
    head.write_bytes(bench.head.read_bytes())
    record = json.loads((bench.head.parent / f"{bench.head.stem}.training.json").read_text())
    for text in ("[" * 100_000, json.dumps(record | {"options": "all"})):
        (tmp_path / "copy.training.json").write_text(text)
        summary = calibrate(head, bench.folder / "own.csv", tmp_path / "new.safetensors", **options)
        assert summary.apart_from == ()


def test_a_record_that_cannot_be_read_is_named(bench, tmp_path, capsys):
    """Without it nobody knows that the pairs are not those of the training."""
    head = tmp_path / "copy.safetensors"
    head.write_bytes(bench.head.read_bytes())
    (tmp_path / "copy.training.json").mkdir()
    summary = calibrate(head, bench.folder / "own.csv", tmp_path / "new.safetensors", cache=bench.cache)
    assert summary.apart_from == ()
    said = f"warning: {tmp_path}/copy.training.json: the training pairs are not compared: "
    assert said in capsys.readouterr().err


def biased(people, seed, slope=0.5, offset=1.5):
    """Pairs whose logits are too sure by a known line: the truth is slope * logit + offset."""
    pairs = draw_people(people, seed, pairs=2000)
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, len(pairs))
    labels = (rng.random(len(pairs)) < 1 / (1 + np.exp(-(slope * logits + offset)))).astype(np.int8)
    return ScoredPairs(replace(pairs, labels=labels), (logits,))


def test_a_known_line_is_found_and_its_error_goes():
    scored = biased(200, 1)
    ((slope, offset),) = Refit.of(scored, "platt").own
    assert (slope, offset) == (pytest.approx(0.5, abs=0.05), pytest.approx(1.5, abs=0.2))
    crossed = cross_validated(scored, "platt")
    assert crossed is not None
    assert calibration_error(scored.pairs.labels, crossed) < 0.03
    assert calibration_error(scored.pairs.labels, 1 / (1 + np.exp(-scored.logits[0]))) > 0.1


def test_pairs_out_of_fold_are_not_seen():
    """The calibration of a fold does not change with the labels of the people in it."""
    scored = biased(200, 1)
    before = cross_validated(scored, "platt")
    person = scored.pairs.persons[scored.pairs.a[0]]
    own = np.array([scored.pairs.persons[image] == person for image in scored.pairs.a])
    labels = np.where(own, 1 - scored.pairs.labels, scored.pairs.labels).astype(np.int8)
    after = cross_validated(ScoredPairs(replace(scored.pairs, labels=labels), scored.logits), "platt")
    # Folds drop surplus pairs at random, so others move a little.
    assert np.abs(after[own] - before[own]).max() < 0.05


def test_too_few_people_are_not_cross_validated():
    pairs = replace(draw_people(2, 1, pairs=40), persons={})
    one = replace(pairs, a=np.zeros_like(pairs.a))
    assert cross_validated(ScoredPairs(one, (np.arange(len(one)) - 5.0,)), "platt") is None


def test_a_head_of_several_backbones_gets_all_its_calibrations_anew():
    settings = EmbeddingSettings(crop="none")
    embeddings = {name: EmbeddingFingerprint.of(BackboneSpec(name), settings) for name in ("first", "second")}

    def sets(seed, name):
        return [draw_people(40, seed, noise=noise, name=name) for noise in (1.0, 1.5)]

    fitted = fit_heads(sets(1, "training"), sets(2, "dev"), embeddings, TrainOptions(), {}, lambda *_: None)
    head, own = fitted.head, sets(3, "own")
    assert isinstance(head, FusedHead)
    assert head.about["thresholds"]["bounds"]["different"]["pairs"] > 20
    logits = tuple(
        logits_of(member.score_pairs(pairs.vectors, pairs.a, pairs.b)[0].astype(np.float64))
        for member, pairs in zip(head.members, own, strict=True)
    )
    done = recalibrate(
        head,
        ScoredPairs(
            own[0],
            logits,
            lambda new: lambda a, b: head_probabilities(new, [replace(pairs, a=a, b=b) for pairs in own]),
        ),
        "platt",
    )
    new = done.head
    assert isinstance(new, FusedHead)
    assert new.calibrations.keys() == head.calibrations.keys()
    assert new.calibrations != head.calibrations
    for one, other in zip(head.members, new.members, strict=True):
        assert one.scorers == other.scorers or one.scorers[0].features == other.scorers[0].features
        assert one.calibration != other.calibration
    expected = Refit.of(ScoredPairs(own[0], logits), "platt").probabilities(ScoredPairs(own[0], logits))
    assert np.abs(head_probabilities(new, own) - expected).max() < 1e-3
    kept = recalibrate(head, ScoredPairs(own[0], logits), "none").head
    assert isinstance(kept, FusedHead) and kept.calibrations == head.calibrations
    assert kept.about["calibration"]["same_share"] == head.about["calibration"]["same_share"]
    again = FusedHead.from_bytes(new.to_bytes(), "head")
    assert again.digest == new.digest
    assert again.review(0.2, 0.2).same_below <= again.review(0.2, 0.2).different_from
