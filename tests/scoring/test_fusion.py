"""Runs with several backbones: each with its own faces and cache, one row out, and resumed like any other.

Two small ONNX models: one takes the whole image, the other a detected face, so that it fails where there is none.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from half_done import SAMPLES, run, stopped
from onnx_files import write_model
from PIL import Image
from run_records import read_record

import batchverify
from batchverify.cli.app import main
from batchverify.errors import ArtifactError, ManifestError, NothingScoredError, UsageError
from batchverify.heads.fused_head import FusedHead
from batchverify.options import ScoreOptions
from batchverify.scoring.job import Job, head_of

FACES = SAMPLES / "faces.csv"
BASE = {"size": 64, "colour": "BGR", "mean": 120, "scale": 60}


def command(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(main, [str(each) for each in arguments])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with both models, manifests, the head of both and a cache that has every image."""
    folder = tmp_path_factory.mktemp("fusion")
    write_model(folder / "whole.onnx", {**BASE, "crop": "none"}, size=64, dimension=100)
    write_model(folder / "face.onnx", {**BASE, "crop": "detect"}, size=64, dimension=70)
    for colour in ("white", "gray"):
        Image.new("RGB", (160, 160), colour).save(folder / f"{colour}.png")
    header, *lines = FACES.read_text().splitlines()
    for name, part in (("train", lines[::2]), ("dev", lines[1::2])):
        (folder / f"{name}.csv").write_text("\n".join([header, *part]))
    face, other = (SAMPLES / line.split(",")[0] for line in lines[:2])
    mixed = [
        (face, other),
        (face, "white.png"),
        ("gray.png", "white.png"),
        (face, "gone.png"),
        ("gone.png", other),
    ]
    (folder / "mixed.csv").write_text("image_a,image_b\n" + "\n".join(f"{a},{b}" for a, b in mixed))
    options = ["--backbone", both(folder), "--cache", folder / "cache", "--image-root", SAMPLES]
    train = ["train", folder / "train.csv", "--dev", folder / "dev.csv", "--test", FACES]
    command(*train, "-o", folder / "head.safetensors", *options)
    return folder


def both(folder: Path, order: int = 1) -> str:
    return "+".join([str(folder / "whole.onnx"), str(folder / "face.onnx")][::order])


def options(place: Path, **changes) -> dict:
    known = {"backbone": both(place), "cache": str(place / "cache"), "head": str(place / "head.safetensors")}
    return {"quiet": True, **known, **changes}


def score(place: Path, manifest: str | Path = "mixed.csv", output: Path | None = None, **changes):
    return batchverify.score(place / manifest, output, **options(place, **changes))


def test_a_row_is_scored_by_every_backbone_that_has_both_faces(place):
    rows = score(place).to_arrow().to_pylist()
    assert [row["backbones"] for row in rows] == [
        "whole.onnx+face.onnx",
        "whole.onnx",
        "whole.onnx",
        None,
        None,
    ]
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "not_found", "not_found"]
    assert [(row["error_a"], row["error_b"]) for row in rows[:3]] == [(None, None)] * 3
    assert [(row["error_a"], row["error_b"]) for row in rows[3:]] == [
        (None, "not_found"),
        ("not_found", None),
    ]
    head = FusedHead.load(place / "head.safetensors")
    alone = {}
    for name in ("whole", "face"):
        member = next(each for each in head.members if each.dimension == {"whole": 100, "face": 70}[name])
        (place / f"{name}.safetensors").write_bytes(member.to_bytes())
        changes: dict[str, Any] = {
            "backbone": str(place / f"{name}.onnx"),
            "head": str(place / f"{name}.safetensors"),
        }
        alone[name] = score(place, **changes).to_arrow().to_pylist()
        assert "backbones" not in alone[name][0]
    for row, single in zip(rows[1:3], alone["whole"][1:3], strict=True):
        assert abs(row["probability"] - single["probability"]) < 1e-6
        assert abs(row["similarity"] - single["similarity"]) < 1e-6
    shares = [alone[name][0]["probability"] for name in alone]
    slope, offset = head.calibration(head.members)
    logit = slope * sum(np.log(share / (1 - share)) for share in shares) + offset
    assert abs(rows[0]["probability"] - 1 / (1 + np.exp(-logit))) < 1e-5
    assert abs(rows[0]["similarity"] - np.mean([alone[name][0]["similarity"] for name in alone])) < 1e-6


def test_where_all_fail_the_first_backbone_names_the_reason(place):
    rows = score(place, backbone=both(place, -1)).to_arrow().to_pylist()
    assert [row["backbones"] for row in rows] == [
        "face.onnx+whole.onnx",
        "whole.onnx",
        "whole.onnx",
        None,
        None,
    ]
    forward = score(place).to_arrow()
    assert [row["probability"] for row in rows] == forward["probability"].to_pylist()


def test_embedding_fails_if_no_backbone_has_a_face(place, tmp_path):
    write_model(tmp_path / "other.onnx", {**BASE, "crop": "detect"}, size=64, dimension=64)
    (tmp_path / "pairs.csv").write_text(f"image_a,image_b\n{place}/gray.png,{place}/white.png\n")
    pair = f"{place / 'face.onnx'}+{tmp_path / 'other.onnx'}"
    known = options(place, backbone=pair, cache=str(tmp_path / "cache"))
    with pytest.raises(ArtifactError, match="trained for other backbones"):
        batchverify.score(tmp_path / "pairs.csv", **known)
    del known["head"]
    with pytest.raises(NothingScoredError, match=r"all 2 failed \(no_face 4\)") as caught:
        batchverify.embed(tmp_path / "pairs.csv", **known)
    assert caught.value.summary.backbones["face.onnx"]["failures"] == {"no_face": 2}


def test_the_run_says_what_each_backbone_did(place, tmp_path):
    out = tmp_path / "scores.parquet"
    changes: dict[str, Any] = {"cache": str(tmp_path / "cache"), "max_failed": 1.0}
    summary = score(place, output=out, **changes)
    assert (summary.unique_images, summary.embedded, summary.failed, summary.failed_rows) == (5, 6, 4, 2)
    assert summary.failures == {"not_found": 2, "no_face": 2}
    assert summary.backbones["whole.onnx"]["embedded"] == 4 and summary.backbones["face.onnx"]["embedded"] == 2
    record = read_record(str(out))
    assert record["job"]["backbones"] == ["whole.onnx", "face.onnx"]
    assert record["options"]["backbone"] == both(place)
    assert record["compute_path"].count(" | ") == 1 and len(record["embedding"]["fusion"]) == 2
    assert any(line == ("  face.onnx", "embedded 2, cached 0, failed 3") for line in summary.lines())
    again = score(place, output=out, **changes)
    assert (again.embedded, again.resumed_rows) == (0, 5)
    assert len(list((tmp_path / "cache" / "v1").iterdir())) == 2
    with pytest.raises(UsageError, match=r"holds the finished output of another job \(backbones"):
        score(place, output=out, backbone=both(place, -1), **changes)


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_a_stopped_run_is_finished_and_equals_an_undisturbed_one(place, tmp_path, name):
    manifest = tmp_path / "pairs.csv"
    header, *lines = FACES.read_text().replace("faces/", f"{SAMPLES}/faces/").splitlines()
    lines += [
        f"{place}/gray.png,{place}/white.png,1,x,y",
        f"{lines[0].split(',')[0]},{place}/white.png,1,x,y",
    ]
    manifest.write_text("\n".join([header, *lines]))
    known, root = options(place), Path("/")
    cache = known.pop("cache")
    del known["quiet"]
    whole = run(tmp_path / f"other{Path(name).suffix}", cache, manifest, root, **known)
    out = tmp_path / name
    stopped(out, cache, manifest=manifest, root=root, **known)
    summary = run(out, cache, manifest, root, **known)
    assert summary.resumed_rows == 34 and summary.rows == 54
    assert summary.to_arrow().equals(whole.to_arrow())
    assert whole.to_arrow()["backbones"].to_pylist()[-2:] == ["whole.onnx"] * 2


def test_a_resumed_run_goes_on_with_the_same_failures(place, tmp_path):
    """A file that failed in a finished part fails in the rest, for every backbone, though it is there by now."""
    manifest, gone = tmp_path / "pairs.csv", tmp_path / "late.png"
    face = SAMPLES / "faces" / "ada_1.jpg"
    manifest.write_text("image_a,image_b\n" + f"{face},{gone}\n" + f"{face},{face}\n" * 20 + f"{face},{gone}\n" * 40)
    known, root = options(place), Path("/")
    cache = known.pop("cache")
    del known["quiet"]
    out = tmp_path / "out"
    stopped(out, cache, parts=1, manifest=manifest, root=root, **known)
    gone.write_bytes(face.read_bytes())
    rows = run(out, cache, manifest, root, **known).to_arrow().to_pylist()
    assert {(row["status"], row["backbones"]) for row in rows[21:]} == {("not_found", None)}


def test_other_compute_paths_of_one_backbone_are_refused(place, tmp_path):
    known = options(place)
    known.pop("cache"), known.pop("quiet")
    known |= {"manifest": place / "mixed.csv", "root": place, "part_rows": 2}
    out = tmp_path / "out"
    stopped(out, str(tmp_path / "cache"), parts=1, **known)
    state = tmp_path / "out.job" / "job.json"
    document = json.loads(state.read_text())
    first, second = document["compute_path"].split(" | ")
    document["compute_path"] = f"{first} | cuda float16 onnxruntime, batches of 32"
    state.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="this job's vectors were computed on 'cuda float16 onnxruntime"):
        run(out, str(tmp_path / "other"), **known)
    document["compute_path"] = f"{first} | {second}"
    state.write_text(json.dumps(document))
    assert run(out, str(tmp_path / "other"), **known).scored == 1


def test_failed_rows_are_tried_again(place, tmp_path):
    manifest, gone, out = tmp_path / "pairs.csv", tmp_path / "late.png", tmp_path / "out.parquet"
    face = SAMPLES / "faces" / "ada_1.jpg"
    manifest.write_text(f"image_a,image_b\n{face},{gone}\n{face},{face}\n")
    assert score(tmp_path, manifest, out, **options(place)).failed_rows == 1
    gone.write_bytes(face.read_bytes())
    rows = score(tmp_path, manifest, out, **options(place, retry_failed=True)).to_arrow().to_pylist()
    assert [row["backbones"] for row in rows] == ["whole.onnx+face.onnx"] * 2


def test_predict_agrees_with_score(place):
    rows = score(place).to_arrow().to_pylist()
    for row in rows[:3]:
        pair = [place / row[side] for side in ("image_a", "image_b")]
        told = batchverify.predict(*pair, **options(place))
        for name in ("probability", "label", "similarity", "backbones"):
            assert getattr(told, name) == row[name]
    assert told.sentence().endswith("The score is that of whole.onnx.")
    lost = batchverify.predict(SAMPLES / "faces" / "ada_1.jpg", place / "gone.png", **options(place))
    assert lost.verdict == "not scored" and lost.errors[1].reason.value == "not_found"
    assert lost.to_json()["backbones"] == ""


def test_every_command_takes_several(place, tmp_path):
    common = ["--backbone", both(place), "--cache", place / "cache"]
    told = command("embed", FACES, *common)
    assert "from the cache  48" in told and re.search(r"  face.onnx +embedded 0, cached 24, failed 0", told)
    out, head = tmp_path / "scores.parquet", place / "head.safetensors"
    command("score", FACES, "-o", out, "--head", head, *common)
    assert len(pq.read_table(out)) == 52
    report = command("evaluate", out, "-o", tmp_path / "report", "--draws", 0, "--by", "backbones")
    assert "by backbones" in report
    assert "search for each" in command(
        *("train", place / "train.csv", "--dev", place / "dev.csv", "--image-root", SAMPLES),
        *("-o", tmp_path / "head.safetensors", "--tune", 2, *common),
        code=2,
    )


def test_a_network_and_views_are_trained_for_each_backbone(place, tmp_path):
    network = ["--algorithm", "network", "--widths", "8", "--epochs", 2, "--augment", 1, "--max-lr", 0.01]
    train = ["train", place / "train.csv", "--dev", place / "dev.csv", "--image-root", SAMPLES]
    common = ["--backbone", both(place), "--cache", place / "cache"]
    told = command(*train, "-o", tmp_path / "head.safetensors", *network, *common)
    assert "whole.onnx network:absdiff" in told and "face.onnx network:absdiff" in told
    head = FusedHead.load(tmp_path / "head.safetensors")
    assert head.needs_torch and head.parameters == sum(member.parameters for member in head.members) + 2
    rows = score(place, head=str(tmp_path / "head.safetensors")).to_arrow().to_pylist()
    assert [row["status"] for row in rows[:3]] == ["ok"] * 3


def test_training_leaves_out_what_one_backbone_cannot_embed(place, tmp_path):
    lines = (place / "train.csv").read_text().replace("faces/", f"{SAMPLES}/faces/").splitlines()
    lines.append(f"{lines[1].split(',')[0]},{place}/white.png,1,ada,nobody")
    (tmp_path / "train.csv").write_text("\n".join(lines))
    (tmp_path / "dev.csv").write_text((place / "dev.csv").read_text().replace("faces/", f"{SAMPLES}/faces/"))
    told = command(
        *("train", tmp_path / "train.csv", "--dev", tmp_path / "dev.csv", "--image-root", "/"),
        *("-o", tmp_path / "head.safetensors", "--backbone", both(place), "--cache", place / "cache"),
    )
    assert "1 training pair could not be embedded and is left out" in told and "image_b no_face" in told


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("vggface2+", r"\+ joins the names of backbones, and one of them is empty"),
        ("compact+compact", "compact appears twice"),
        ("vggface2+nothing", "unknown backbone 'nothing'"),
        ("+".join(f"n{number}" for number in range(7)), "at most 6 backbones can be fused"),
    ],
)
def test_names_that_cannot_be_fused_are_refused(backbone, message, tmp_path):
    with pytest.raises((UsageError, ArtifactError), match=message):
        batchverify.score(FACES, backbone=backbone, cache=str(tmp_path), quiet=True)


def test_a_file_twice_under_two_names_is_refused(place, tmp_path):
    for suffix in (".onnx", ".json"):
        (tmp_path / f"copy{suffix}").write_bytes((place / f"whole{suffix}").read_bytes())
    pair = f"{place / 'whole.onnx'}+{tmp_path / 'copy.onnx'}"
    image = SAMPLES / "faces" / "ada_1.jpg"
    with pytest.raises(UsageError, match=r"two of the backbones that \+ joins are the same"):
        batchverify.score(FACES, backbone=pair, cache=str(tmp_path / "cache"), quiet=True)
    with pytest.raises(UsageError, match=r"two of the backbones that \+ joins are the same"):
        batchverify.predict(image, image, **options(place, backbone=pair))


def test_a_plus_in_the_name_of_a_file_joins_nothing(place, tmp_path):
    for suffix in (".onnx", ".json"):
        (tmp_path / f"a+b{suffix}").write_bytes((place / f"whole{suffix}").read_bytes())
    name = str(tmp_path / "a+b.onnx")
    summary = batchverify.embed(FACES, backbone=name, cache=str(tmp_path / "cache"), quiet=True)
    assert summary.embedded == 24 and not summary.backbones
    pair = f"{name}+{place / 'face.onnx'}"
    summary = batchverify.embed(FACES, backbone=pair, cache=str(place / "cache"), quiet=True)
    assert list(summary.backbones) == ["a+b.onnx", "face.onnx"] and summary.cached == 48


def test_a_manifest_with_a_column_of_that_name_is_refused(place, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(f"image_a,image_b,backbones\n{place}/white.png,{place}/gray.png,mine\n")
    with pytest.raises(ManifestError, match="column 'backbones' has the name of an output column"):
        batchverify.score(path, **options(place))
    single = options(place, backbone=str(place / "whole.onnx"), head=str(place / "whole.safetensors"))
    head = next(each for each in FusedHead.load(place / "head.safetensors").members if each.dimension == 100)
    (place / "whole.safetensors").write_bytes(head.to_bytes())
    assert batchverify.score(path, **single).to_arrow()["backbones"].to_pylist() == ["mine"]


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_rows_under_ray_are_the_same(place):
    known = options(place, engine="ray")
    assert score(place).to_arrow().equals(batchverify.score(place / "mixed.csv", **known).to_arrow())


def test_the_shipped_head_of_both_packaged_backbones_is_found():
    for tta in ("none", "flip"):
        for backbone in ("vggface2+compact", "compact+vggface2"):
            job = Job.open(FACES, ScoreOptions(backbone=backbone, tta=tta))
            head = head_of(None, [member.fingerprint for member in job.members])
            assert [member.dimension for member in head.members] == [each.fingerprint.dimension for each in job.fused]
            assert head.threshold(at_far=1e-3) > 0


def test_both_packaged_backbones_need_no_other_option(tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "scores.parquet"
    command("score", FACES, "-o", out, "--backbone", "vggface2+compact", "--cache", cache)
    rows = pq.read_table(out).to_pylist()
    assert {(row["status"], row["backbones"]) for row in rows} == {("ok", "vggface2+compact")}
    turned = batchverify.score(FACES, backbone="compact+vggface2", cache=str(cache), quiet=True).to_arrow()
    assert turned["probability"].to_pylist() == [row["probability"] for row in rows]
    assert sum(row["label"] == row["true_label"] for row in rows) > 26, "drawn faces: better than chance"
