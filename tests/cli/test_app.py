"""The command line on real files: exit codes, one-line messages, separate streams, Parquet read back."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_samples import entry, flip, write
from click.testing import CliRunner
from repository import REPOSITORY

from batchverify.cli.app import main

SAMPLES = REPOSITORY / "sample_manifests"
FACE = str(SAMPLES / "faces" / "ada_1.jpg")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """One cache for all tests of this file instead of the user's."""
    monkeypatch.setenv("BATCHVERIFY_CACHE", str(tmp_path_factory.getbasetemp() / "cli-cache"))


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments), prog_name="batchverify")


def bad_manifest(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


BAD = [
    ("none.csv", None, "none.csv: no such file or folder"),
    ("empty.csv", b"", "empty.csv: the file has no rows"),
    (
        "columns.csv",
        b"left,right\na,b\n",
        "columns.csv: no column 'image_a' (--column-a); the file has left, right",
    ),
    (
        "label.csv",
        b"image_a,image_b,label\na,b,1\na,b,yes\n",
        "label.csv: row 2: label must be 0 or 1, got 'yes'",
    ),
    ("uneven.csv", b"image_a,image_b\na,b\na\n", "uneven.csv: row 2: expected 2 columns, found 1"),
    ("not.parquet", b"image_a,image_b\na,b\n", "not.parquet: not a readable Parquet file"),
    ("bytes.csv", b"image_a,image_b\n\xff\xfe,b\n", "bytes.csv: row 1: column 'image_a': not UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[each[0] for each in BAD])
def test_bad_manifests_are_one_line_and_exit_2(tmp_path, name, content, message):
    path = str(tmp_path / name) if content is None else bad_manifest(tmp_path, name, content)
    result = run("score", path, "-o", str(tmp_path / "out.parquet"))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out.parquet").exists()


WRONG = [
    (["--threshold", "2"], "--threshold must lie between 0 and 1, got 2.0"),
    (["--threshold", "0.5", "--at-far", "0.01"], "--threshold and --at-far exclude each other"),
    (["--at-far", "1e-6"], "--at-far 1e-06: the head stores no threshold for this rate"),
    (["--backbone", "resnet"], "unknown backbone 'resnet': vggface2, compact, vggface2-float, casia-webface"),
    (["--margin", "20"], "no head is shipped for these settings"),
    (["--crop", "align"], "--crop align needs --detector retinaface"),
    (["--crop", "align", "--detector", "mtcnn"], "--crop align needs --detector retinaface"),
    (["--detector", "retinaface"], "no head is shipped for these settings"),
    (["--head", "absent.safetensors"], "absent.safetensors: the head cannot be read"),
    (["--device", "cuda"], "--device cuda: this machine has no such CUDA device"),
    (["--engine", "local", "--address", "auto"], "--engine local uses none: omit one"),
    (["--engine", "ray", "--address", "ray://head:10001"], "Ray Client breaks long jobs"),
    (["--weights", "x.pt"], "--weights goes with --backbone"),
    (["--cache", "m\udcff"], "not UTF-8"),
    (["--image-root", ""], "--image-root must not be empty"),
    (["--cache", __file__], "the cache cannot be used"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[" ".join(each[0]) for each in WRONG])
def test_wrong_options_are_one_line_and_exit_2(tmp_path, monkeypatch, options, message):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    result = run("score", str(SAMPLES / "faces.csv"), "-o", str(tmp_path / "out.parquet"), *options)
    if "cuda" in options and result.exit_code == 0:
        pytest.skip("this machine has a CUDA device")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == [here]


def test_every_detector_and_crop_has_a_cache_folder_of_its_own(tmp_path):
    manifest, cache = str(SAMPLES / "faces.csv"), tmp_path / "cache"
    detector = ["--detector", "retinaface"]
    for options in ([], ["--crop", "align", *detector], detector):
        result = run("embed", manifest, "--limit", "1", "--cache", str(cache), "--json", *options)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["embedded"] == 2
    crops = [json.loads(path.read_text())["crop"] for path in (cache / "v1").glob("*/fingerprint.json")]
    known = {(crop["mode"], crop.get("detector"), crop.get("template")) for crop in crops}
    assert known == {
        ("detect", None, None),
        ("align", "retinaface", "vggface2"),
        ("detect", "retinaface", None),
    }


def test_a_typo_in_an_option_is_explained():
    result = run("score", "m.csv", "-o", "o.parquet", "--treshold", "0.5")
    assert result.exit_code == 2
    assert "--threshold" in result.stderr


def test_only_json_goes_to_stdout(tmp_path):
    output = tmp_path / "out.parquet"
    result = run("score", str(SAMPLES / "faces.csv"), "-o", str(output), "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    table = pq.read_table(output)
    assert summary["rows"] == table.num_rows == summary["scored"]
    assert summary["unique_images"] == 24
    record = json.loads(pq.read_metadata(output).metadata[b"batchverify"])
    assert record["threshold"] == summary["threshold"]
    assert record["embedding"]["crop"]["margin"] == 44


def test_a_wrong_image_root_is_an_error(tmp_path):
    output = tmp_path / "out.parquet"
    result = run("score", str(SAMPLES / "faces.csv"), "-o", str(output), "--image-root", str(tmp_path))
    assert result.exit_code == 3
    assert "nothing could be scored" in result.stderr
    assert "not_found" in result.stderr
    again = run("score", str(SAMPLES / "faces.csv"), "-o", str(output), "--image-root", str(tmp_path), "--json")
    assert (again.exit_code, json.loads(again.stdout)["failures"]) == (3, {"not_found": 24})
    assert set(pq.read_table(output)["status"].to_pylist()) == {"not_found"}


def test_max_failed(tmp_path):
    arguments = ["score", str(SAMPLES / "broken.csv"), "-o", str(tmp_path / "out.parquet")]
    assert run(*arguments).exit_code == 0
    result = run(*arguments, "--max-failed", "0.1")
    assert result.exit_code == 3
    assert "more than --max-failed 0.1 allows" in result.stderr


def test_predict_prints_a_sentence_or_json():
    sentence = run("predict", "-i1", FACE, "-i2", str(SAMPLES / "faces" / "ada_2.jpg"))
    assert sentence.exit_code == 0, sentence.output
    assert sentence.stdout.startswith("Same person: the probability that the images show two people is 0.")
    result = run("predict", "-i1", FACE, "-i2", FACE, "--json")
    prediction = json.loads(result.stdout)
    assert (prediction["label"], prediction["verdict"]) == (0, "same person")
    assert prediction["similarity"] == pytest.approx(1, abs=1e-3)
    assert len(prediction["boxes"][0]) == 4


@pytest.mark.parametrize("option", ["--face=largest", "--face=probable", "--min-face=40"])
def test_the_shipped_head_fits_whichever_face_is_taken(option, caplog):
    result = run("predict", "-i1", FACE, "-i2", str(SAMPLES / "faces" / "ada_2.jpg"), option)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Same person: ")
    (warning,) = caplog.messages
    assert warning.startswith("the head's calibration and thresholds were measured with another choice of the face")


def test_predict_without_an_image_exits_3_and_says_why(tmp_path):
    result = run("predict", "-i1", FACE, "-i2", str(tmp_path / "absent.jpg"))
    assert result.exit_code == 3
    assert "absent.jpg: not_found" in result.stderr


def test_check_prepare_cache_and_backbones(tmp_path):
    assert run("check", str(SAMPLES / "faces.csv"), "--all").exit_code == 0
    assert run("check", str(SAMPLES / "broken.csv"), "--all").exit_code == 1
    assert "rows" in json.loads(run("check", str(SAMPLES / "faces.csv"), "--json").stdout)
    for name in ("ann", "bob", "cyd", "dan", "eve", "fay"):
        for view in (1, 2):
            (tmp_path / "tree" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "tree" / name / f"{view}.jpg").write_bytes(b"")
    result = run("prepare", "folders", str(tmp_path / "tree"), "-o", str(tmp_path / "manifests"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "manifests" / "train.csv").exists()
    assert run("prepare", "lfw", str(tmp_path), "-o", str(tmp_path / "lfw")).exit_code == 2
    listed = json.loads(run("backbones", "--json").stdout)
    assert [each["name"] for each in listed] == ["vggface2", "compact", "vggface2-float", "casia-webface"]
    assert len(listed[0]["fingerprint"]) == 64
    assert run("cache", "info", "--cache", str(tmp_path / "no-cache")).exit_code == 0
    assert run("cache", "verify").exit_code == 0


def test_embed_fills_the_cache_that_score_reads(tmp_path):
    options = ["--cache", str(tmp_path / "cache"), "--crop", "none", "--json"]
    first = json.loads(run("embed", str(SAMPLES / "faces.csv"), *options).stdout)
    assert (first["embedded"], first["cached"]) == (24, 0)
    second = run("score", str(SAMPLES / "faces.csv"), "-o", str(tmp_path / "out.parquet"), *options)
    assert json.loads(second.stdout)["cached"] == 24


def test_help_needs_neither_torch_nor_ray():
    code = (
        "import sys\nfrom batchverify.cli.app import main\n"
        "try:\n    main(['score', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(bool({'torch', 'ray', 'pandas', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_parquet_manifest_keeps_its_types(tmp_path):
    table = pq.read_table(SAMPLES / "faces.parquet").slice(0, 3)
    moments = pa.array([1, None, 3], pa.timestamp("ms"))
    table = table.append_column("taken", moments).append_column("tags", pa.array([["a"], [], None]))
    (tmp_path / "m").mkdir()
    pq.write_table(table, tmp_path / "m" / "pairs.parquet")
    output = tmp_path / "out.parquet"
    result = run("score", str(tmp_path / "m"), "-o", str(output), "--image-root", str(SAMPLES), "-q")
    assert (result.exit_code, result.output) == (0, "")
    scored = pq.read_table(output)
    assert scored["taken"].equals(table["taken"])
    assert scored["tags"].equals(table["tags"])
    assert scored.column_names[-6:] == ["probability", "label", "similarity", "status", "error_a", "error_b"]
    assert scored["true_label"].type == pa.int8()


def test_images_are_forgotten_and_outputs_named(tmp_path):
    options = ["--cache", str(tmp_path / "cache")]
    out = str(tmp_path / "out.parquet")
    assert run("score", str(SAMPLES / "faces.csv"), "-o", out, "--crop", "none", "-q", *options).exit_code == 0
    text = run("cache", "forget", FACE, str(tmp_path / "gone.jpg"), "--outputs", out, *options)
    assert text.exit_code == 1
    assert "gone.jpg: not forgotten, it cannot be read: no such file" in text.stdout
    assert "rows name 1 of the images" in text.stdout
    assert "1 of 1 images were in the cache: 1 vectors and 0 failures erased" in text.stdout
    assert run("cache", "verify", *options).exit_code == 0
    everything = ["--manifest", str(SAMPLES / "faces.csv"), "--json", *options]
    document = json.loads(run("cache", "forget", *everything).stdout)
    assert (document["vectors"], len(document["found"]), document["keys"]) == (23, 23, 24)
    assert document["unread"] == {} and document["outputs"] == []
    digest = document["found"][0]
    assert "0 of 1 images" in run("cache", "forget", "--key", digest, *options).stdout
    for wrong in ([], ["--key", "abc"]):
        assert run("cache", "forget", *wrong, *options).exit_code == 2
    compacted = run("cache", "compact", "--json", *options)
    assert compacted.exit_code == 0 and json.loads(compacted.stdout)["damaged"] == {}


def test_a_compaction_that_leaves_a_damaged_file_exits_with_1(tmp_path):
    for numbers in ((1, 2), (3, 4)):
        write(tmp_path, [entry(number) for number in numbers])
    [damaged] = write(tmp_path, [entry(5)])
    flip(damaged, 200)
    options = ["--cache", str(tmp_path)]
    text = run("cache", "compact", *options)
    assert text.exit_code == 1
    assert f"{damaged}: left as it is: " in text.stdout and "3 segments are now 2" in text.stdout
    as_json = run("cache", "compact", "--json", *options)
    assert as_json.exit_code == 1 and list(json.loads(as_json.stdout)["damaged"]) == [str(damaged)]
    assert run("cache", "verify", "--quarantine", *options).exit_code == 1
    assert run("cache", "compact", *options).exit_code == 0
