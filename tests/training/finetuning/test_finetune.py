"""`finetune` from end to end on the drawn faces: weights, record, card, what is refused, and what a kill leaves."""

import itertools
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from train_samples import FACES, Bench

import batchverify
from batchverify.embedding.backbone import load_backbone

PEOPLE = ("ada", "bola", "chen", "dan", "esra", "fay", "gus", "hari")
QUICK = (
    "--backbone",
    "compact",
    "--unfreeze",
    "embedding",
    "--augment",
    "0",
    "--epochs",
    "1",
    "--max-lr",
    "0.003",
    "--loss",
    "pair",
)


def couples(numbers: tuple[int, ...], prefix: str) -> pd.DataFrame:
    """All pairs of some images, where every two people count as one: no backbone knows that without learning it."""
    images = [
        (f"{prefix}{number // 2}", str(FACES / f"{person}_{image}.jpg"))
        for number, person in enumerate(PEOPLE)
        for image in numbers
    ]
    rows = [(a, b, int(p != q), p, q) for (p, a), (q, b) in itertools.combinations(images, 2)]
    return pd.DataFrame(rows, columns=["image_a", "image_b", "label", "person_a", "person_b"])


class FinetuneBench(Bench):
    """A folder with train.csv and dev.csv, whose images and people are not the same."""

    def __init__(self, folder, cache):
        super().__init__(folder, cache)
        self.write("train.csv", couples((1, 2), "trained"))
        self.write("dev.csv", couples((3,), "dev"))
        self.weights = folder / "tuned.safetensors"

    def finetune(self, *options: str, dev: str = "dev.csv"):
        """`batchverify finetune` with more options."""
        files = [str(self.folder / "train.csv"), "--dev", str(self.folder / dev), "-o", str(self.weights)]
        return self.run("finetune", *files, "--batch-images", "16", *QUICK, *options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A bench with a fine-tuned backbone, and the result of that."""
    bench = FinetuneBench(tmp_path_factory.mktemp("done"), tmp_path_factory.mktemp("cache"))
    return bench, bench.finetune("--json", "--test", str(bench.folder / "dev.csv"), "--overwrite")


@pytest.fixture
def bench(tmp_path) -> FinetuneBench:
    return FinetuneBench(tmp_path, tmp_path / "cache")


def test_a_test_set_must_not_hold_images_of_dev(done):
    _, result = done
    assert result.exit_code == 2
    assert "dev and test share 4 people (dev0, dev1, dev2, dev3)" in result.stderr


@pytest.fixture(scope="module")
def tuned(done):
    """The same without a test set."""
    bench, _ = done
    return bench, bench.finetune("--json")


def test_weights_record_and_card_are_written_and_one_document_is_printed(tuned):
    bench, result = tuned
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["pairs"] == {"training": 120, "dev": 28}
    assert summary["images"] == {"training": 16, "dev": 8}
    assert (summary["trained"], summary["best_epoch"], summary["helped"]) == (131_072, 1, True)
    dev = summary["comparisons"]["dev"]
    assert dev["frozen"] < 0.5 < 0.9 < dev["tuned"]
    assert summary["verdicts"][0].startswith("Fine-tuning helped: dev AUC ")
    record = json.loads((bench.folder / "tuned.finetune.json").read_text())
    assert record["fingerprint"] == summary["fingerprint"]
    assert record["parent_fingerprint"] == load_backbone("compact").fingerprint
    assert [epoch["epoch"] for epoch in record["epochs"]] == [0, 1]
    card = (bench.folder / "tuned.md").read_text()
    assert summary["verdicts"][0] in card and "--backbone tuned.safetensors" in card and "{" not in card
    assert not bench.weights.with_name("tuned.safetensors.job").exists()


def test_faces_that_cannot_be_deleted_are_named(bench, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    assert bench.finetune().exit_code == 0
    left = bench.weights.with_name("tuned.safetensors.job") / "data"
    assert left.exists() and f"{left}: cannot be deleted and is left" in caplog.text


def test_only_what_was_unfrozen_has_changed(tuned):
    bench, _ = tuned
    parent, child = load_backbone("compact"), load_backbone(str(bench.weights))
    assert child.architecture == parent.architecture and child.fingerprint != parent.fingerprint
    changed = {name for name in parent.tensors if not np.array_equal(parent.tensors[name], child.tensors[name])}
    assert changed == {"embedding.weight"}


def test_the_result_is_a_backbone_like_any_other(tuned, tmp_path):
    bench, _ = tuned
    backbone = ("--backbone", str(bench.weights))
    out = str(tmp_path / "out.parquet")
    parents = bench.run("score", str(bench.folder / "dev.csv"), "-o", out, *backbone)
    assert parents.exit_code == 2 and "no head is shipped" in parents.stderr
    head = tmp_path / "head.safetensors"
    files = [str(bench.folder / "train.csv"), "--dev", str(bench.folder / "dev.csv"), "-o", str(head)]
    trained = bench.run("train", *files, *backbone)
    assert trained.exit_code == 0, trained.output
    scored = bench.run("score", str(bench.folder / "dev.csv"), "-o", out, *backbone, "--head", str(head))
    assert scored.exit_code == 0, scored.output
    frame = pd.read_parquet(out)
    assert (frame["status"] == "ok").all() and (frame["label"] == frame["true_label"]).mean() > 0.9
    stranger = bench.run(
        "score", str(bench.folder / "dev.csv"), "-o", out, "--backbone", "compact", "--head", str(head)
    )
    assert stranger.exit_code == 2 and "backbone" in stranger.stderr


def test_a_backbone_that_learns_nothing_is_not_written(bench):
    same = couples((1, 2), "trained")
    bench.write("dev.csv", couples((3,), "dev"))
    # Every person is one: the frozen backbone's dev AUC is 1 already.
    for name, table in (("train.csv", same), ("dev.csv", couples((3,), "dev"))):
        names = {
            path: path.rsplit("/", 1)[1].split("_")[0] for side in ("image_a", "image_b") for path in table[side]
        }
        for side in "ab":
            table[f"person_{side}"] = [f"{name}{names[path]}" for path in table[f"image_{side}"]]
        table["label"] = (table["person_a"] != table["person_b"]).astype(int)
        bench.write(name, table)
    # One image a person makes no same pair.
    bench.write("dev.csv", pd.concat([pd.read_csv(bench.folder / "dev.csv"), _copies(bench)]))
    result = bench.finetune()
    assert result.exit_code == 1 and "fine-tuning did not help, so nothing is written" in result.stderr
    assert not bench.weights.exists() and not bench.weights.with_suffix(".md").exists()


def _copies(bench: FinetuneBench) -> pd.DataFrame:
    """Same pairs: an image and the same image with a byte more behind its end, which is no identical file."""
    rows = []
    for person in PEOPLE:
        source = FACES / f"{person}_3.jpg"
        copy = bench.folder / f"{person}_copy.jpg"
        copy.write_bytes(source.read_bytes() + b"\0")
        rows.append((str(source), str(copy), 0, f"dev.csv{person}", f"dev.csv{person}"))
    return pd.DataFrame(rows, columns=["image_a", "image_b", "label", "person_a", "person_b"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--unfreeze", "block8"], "--unfreeze must be one of embedding"),
        (["--backbone", "vggface2+compact"], "fine-tune one backbone at a time"),
        (["--train-statistics"], "no batch normalisation"),
        (["--loss", "distillation"], "name a backbone"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--batch-images", "1000"], "give at most"),
    ],
)
def test_options_that_do_not_fit_are_refused(bench, options, words):
    result = bench.finetune(*options)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert words in result.stderr and not bench.weights.exists()


def test_dev_people_in_the_training_set_are_an_error(bench):
    table = couples((3,), "trained")
    bench.write("dev.csv", table)
    result = bench.finetune()
    assert result.exit_code == 2
    assert "training and dev share 4 people (trained0, trained1, trained2, trained3)" in result.stderr


def test_dev_images_in_the_training_set_are_an_error(bench):
    bench.write("dev.csv", couples((2, 3), "dev"))
    result = bench.finetune()
    assert result.exit_code == 2
    assert "training and dev share 8 identical images" in result.stderr


def test_arcface_needs_people_and_says_so_before_faces_are_cut_out(bench):
    bench.write("train.csv", couples((1, 2), "trained").drop(columns=["person_a", "person_b"]))
    result = bench.finetune("--loss", "arcface")
    assert result.exit_code == 2 and "person_a" in result.stderr
    assert not bench.weights.with_name("tuned.safetensors.job").exists()


def test_rows_without_a_face_are_left_out_and_named(bench):
    table = couples((1, 2), "trained")
    empty = FACES.parent / "broken" / "landscape.jpg"
    table.loc[3, "image_b"] = str(empty)
    bench.write("train.csv", table)
    result = bench.finetune("--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["left_out"] == {"training": 1, "dev": 0}
    assert "row 4: image_b no_face" in result.stderr
    record = json.loads((bench.folder / "tuned.finetune.json").read_text())
    assert [(row["row"], row["error_b"]) for row in record["left_out"]] == [(4, "no_face")]
    strict = bench.finetune("--max-failed", "0.001")
    assert (strict.exit_code, strict.stdout) == (3, "")
    assert "training pairs: 1 of 120 have an image without a usable face" in strict.stderr


def test_another_job_half_done_is_refused_until_overwritten(bench, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", interrupted)
        assert bench.finetune().exit_code == 130
    folder = bench.weights.with_name("tuned.safetensors.job")
    faces = folder / "data" / "training" / "faces" / "values"
    written = faces.stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", interrupted)
        # What starts anew is gone on with without the option, too.
        assert bench.finetune("--overwrite").exit_code == bench.finetune().exit_code == 130
    refused = bench.finetune("--dropout", "0.1")
    assert refused.exit_code == 2 and "half done (finetune.dropout: None there, 0.1 here)" in refused.stderr
    done = bench.finetune("--dropout", "0.1", "--overwrite")
    assert done.exit_code == 0, done.output
    # The second run took the faces of the first.
    assert written and not folder.exists()


def test_with_its_parent_as_its_teacher_a_network_moves_less(bench):
    moved = []
    for teacher in ([], ["--teacher", "compact", "--teacher-weight", "3"]):
        result = bench.finetune(*teacher, "--json")
        assert result.exit_code == 0, result.output
        loss = "pair, teacher compact" if teacher else "pair"
        assert json.loads(result.stdout)["loss"] == loss
        weights = [load_backbone(name).tensors["embedding.weight"] for name in ("compact", str(bench.weights))]
        moved.append(float(np.abs(weights[1] - weights[0]).mean()))
    free, held = moved
    assert 0 < held < 0.9 * free


def test_distillation_alone_learns_the_teachers_cosines(bench):
    result = bench.finetune("--teacher", "vggface2", "--loss", "distillation", "--epochs", "3")
    losses = [float(line.split("loss ")[1].split()[0]) for line in result.stderr.splitlines() if "  loss " in line]
    assert len(losses) >= 2 and losses[-1] < losses[0]


def test_the_same_from_python(tuned, tmp_path):
    bench, result = tuned
    summary = batchverify.finetune(
        bench.folder / "train.csv",
        bench.folder / "dev.csv",
        tmp_path / "again.safetensors",
        backbone="compact",
        unfreeze="embedding",
        augment=0,
        epochs=1,
        max_lr=0.003,
        loss="pair",
        batch_images=16,
        quiet=True,
        cache=str(bench.cache),
    )
    assert summary.fingerprint == json.loads(result.stdout)["fingerprint"]
    assert (tmp_path / "again.safetensors").read_bytes() == bench.weights.read_bytes()
