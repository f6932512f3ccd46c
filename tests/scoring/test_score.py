"""`score` from end to end on the sample faces with the packaged weights: every row, once, in order."""

import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_store import impatience
from PIL import Image
from repository import REPOSITORY
from run_records import read_record
from s3_server import s3_client, s3_server

import batchverify
from batchverify.errors import BatchverifyError, ManifestError, NothingScoredError, UsageError
from batchverify.scoring.parquet import FileSink
from batchverify.scoring.predict import Prediction
from batchverify.scoring.summary import ScoreSummary
from batchverify.storage.location import Location

SAMPLES = REPOSITORY / "sample_manifests"
FACES = SAMPLES / "faces.csv"
SCORES = ["probability", "label", "similarity", "status", "error_a", "error_b"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def scored(cache) -> ScoreSummary:
    return batchverify.score(FACES, cache=cache, quiet=True)


def same_scores(one: pa.Table, other: pa.Table) -> bool:
    return one.select(SCORES).equals(other.select(SCORES))


def test_every_row_comes_back_in_order_with_its_columns(scored):
    manifest, table = pd.read_csv(FACES), scored.to_pandas()
    assert table.columns.tolist() == ["image_a", "image_b", "true_label", "person_a", "person_b", *SCORES]
    for name in ("image_a", "image_b", "person_a", "person_b"):
        assert table[name].tolist() == manifest[name].tolist()
    assert table["true_label"].tolist() == manifest["label"].tolist()
    assert set(table["status"]) == {"ok"}
    assert (scored.embedded, scored.unique_images, scored.scored) == (24, 24, len(manifest))


def test_the_drawn_people_are_told_apart(scored):
    table = scored.to_pandas()
    assert (table["label"] == table["true_label"]).mean() >= 0.95
    assert ((table["probability"] >= scored.threshold) == table["label"]).all()


def test_a_rerun_embeds_nothing_and_is_equal_bit_for_bit(scored, cache, tmp_path):
    again = batchverify.score(FACES, tmp_path / "out.parquet", cache=cache, quiet=True)
    assert (again.embedded, again.cached) == (0, 24)
    assert same_scores(again.to_arrow(), scored.to_arrow())


def test_parquet_tsv_folder_glob_and_frame_give_the_same_scores(scored, cache, tmp_path):
    frame = pd.read_csv(FACES)
    frame.to_csv(tmp_path / "pairs.tsv", sep="\t", index=False)
    half = len(frame) // 2
    frame[:half].to_csv(tmp_path / "part-1.csv", index=False)
    frame[half:].to_csv(tmp_path / "part-2.csv", index=False)
    options: dict[str, Any] = {"cache": cache, "quiet": True, "image_root": str(SAMPLES)}
    for source in (SAMPLES / "faces.parquet", tmp_path / "pairs.tsv", str(tmp_path / "part-*.csv"), frame):
        assert same_scores(batchverify.score(source, **options).to_arrow(), scored.to_arrow())


def test_pairs_may_be_mirrored_shuffled_and_doubled(scored, cache):
    frame = pd.read_csv(FACES)
    mirrored = frame.rename(columns={"image_a": "image_b", "image_b": "image_a"})[frame.columns]
    both = pd.concat([frame, mirrored]).sample(frac=1, random_state=1)
    summary = batchverify.score(both, cache=cache, quiet=True, image_root=str(SAMPLES))
    assert (summary.rows, summary.embedded) == (2 * len(frame), 0)
    expected = scored.to_pandas().iloc[both.index]
    for name in ("probability", "similarity"):
        assert np.array_equal(summary.to_pandas()[name].to_numpy(), expected[name].to_numpy())


# A caller of the API keeps Pillow's own guard, which warns before ours refuses.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_pairs_have_their_reason_on_the_right_side(cache):
    manifest = pd.read_csv(SAMPLES / "broken.csv")
    table = batchverify.score(SAMPLES / "broken.csv", cache=cache, quiet=True).to_pandas()
    assert table["case"].tolist() == manifest["case"].tolist()
    seen = set()
    for row in table.to_dict("records"):
        for side in ("a", "b"):
            reason = row[f"error_{side}"]
            failed = isinstance(reason, str)
            assert failed == (f"on side {side}" in row["case"]), row
            if failed:
                assert f"{reason} on side {side}" in row["case"], row
                seen.add(reason)
        assert (row["status"] == "ok") == (not pd.isna(row["probability"])) == ("good" in row["case"])
    assert seen == {"not_found", "forbidden", "unreadable", "undecodable", "too_large", "no_face"}


def test_the_footer_holds_the_run_record(scored, cache, tmp_path):
    output = tmp_path / "out.parquet"
    summary = batchverify.score(FACES, output, cache=cache, quiet=True, at_far=0.1)
    record = read_record(str(output))
    assert record["threshold"] == summary.threshold != scored.threshold
    assert record["options"] == {"at_far": 0.1, "cache": cache, "quiet": True}
    assert record["version"] == batchverify.__version__
    assert record["rows"] == record["scored"] == scored.rows
    assert {"manifest_fingerprint", "backbone_fingerprint", "embedding", "head", "seconds"} <= record.keys()


def test_a_folder_holds_parts_and_success_last(scored, cache, tmp_path):
    folder = tmp_path / "scores"
    summary = batchverify.score(FACES, folder, cache=cache, quiet=True)
    assert sorted(path.name for path in folder.iterdir()) == ["_SUCCESS", "part-00000.parquet"]
    assert json.loads((folder / "_SUCCESS").read_text())["rows"] == scored.rows
    assert same_scores(summary.to_arrow(), scored.to_arrow())


def test_nothing_is_left_when_a_run_fails(tmp_path):
    (tmp_path / "m.csv").write_text("image_a,image_b,label\na.jpg,b.jpg,7\n")
    with pytest.raises(ManifestError, match=r"m\.csv: row 1: label must be 0 or 1, got '7'"):
        batchverify.score(tmp_path / "m.csv", tmp_path / "out" / "o.parquet")
    with pytest.raises(UsageError, match="is a folder"):
        batchverify.score(FACES, make_folder(tmp_path / "x.parquet"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.csv", "x.parquet"]


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_nothing_scored_is_an_error_after_writing(tmp_path):
    with pytest.raises(NothingScoredError, match="not_found 24"):
        batchverify.score(FACES, tmp_path / "o.parquet", image_root=str(tmp_path), no_cache=True, quiet=True)
    rows = len(pd.read_csv(FACES))
    assert pq.read_table(tmp_path / "o.parquet")["status"].to_pylist() == ["not_found"] * rows


def test_limit_and_other_columns(cache):
    frame = pd.read_csv(FACES).rename(columns={"image_a": "left", "image_b": "right"})
    summary = batchverify.score(
        frame, column_a="left", column_b="right", limit=5, cache=cache, quiet=True, image_root=str(SAMPLES)
    )
    assert summary.to_pandas()["left"].tolist() == frame["left"].tolist()[:5]


def test_without_a_cache_the_bits_are_the_same(scored):
    summary = batchverify.score(FACES, no_cache=True, quiet=True)
    assert summary.embedded == 24
    assert same_scores(summary.to_arrow(), scored.to_arrow())


@pytest.mark.ray
@pytest.mark.usefixtures("running_ray")
def test_engines_agree_on_one_cache_and_on_fresh_ones(scored, cache, tmp_path):
    fresh = batchverify.score(FACES, cache=str(tmp_path), engine="ray", quiet=True)
    assert (fresh.engine, fresh.embedded) == ("ray", 24)
    assert same_scores(fresh.to_arrow(), scored.to_arrow())
    shared = batchverify.score(FACES, cache=cache, engine="ray", quiet=True)
    assert shared.embedded == 0
    assert same_scores(shared.to_arrow(), scored.to_arrow())


@pytest.mark.parametrize(
    ("face", "words"),
    [
        ("center", "the largest near the centre"),
        ("largest", "the largest"),
        ("probable", "the most probable"),
    ],
)
def test_predict_says_which_of_several_faces_was_taken(face, words):
    box = (0.0, 0.0, 9.0, 9.0)
    prediction = Prediction(("a", "b"), 0.1, 0, 0.9, 0.5, (box, box), (3, 1), (None, None), face)
    assert prediction.sentence().splitlines()[1:] == [f"a: 3 faces found; {words} was taken."]


def test_predict_equals_score_from_the_same_cache(scored, cache):
    row = scored.to_pandas().iloc[30]
    images = [SAMPLES / row["image_a"], SAMPLES / row["image_b"]]
    prediction = batchverify.predict(*images, cache=cache)
    assert np.float32(prediction.probability) == row["probability"]
    assert np.float32(prediction.similarity) == row["similarity"]
    assert prediction.label == row["label"]
    fresh = batchverify.predict(*images, no_cache=True)
    assert fresh.probability == pytest.approx(prediction.probability, abs=0.05)
    assert fresh.boxes[0] == pytest.approx(prediction.boxes[0], abs=0.01)


@pytest.fixture(scope="module")
def bucket():
    """A bucket of a real S3 server on this machine, with the sample manifest and its faces."""
    with s3_server() as address:
        client = s3_client(address)
        client.create_bucket(Bucket="pairs")
        client.upload_file(str(FACES), "pairs", "in/faces.csv")
        for path in (SAMPLES / "faces").iterdir():
            client.upload_file(str(path), "pairs", f"in/faces/{path.name}")
        yield f"http://{address}"


def test_everything_on_s3(scored, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    options: dict[str, Any] = {"cache": "s3://pairs/cache", "quiet": True}
    first = batchverify.score("s3://pairs/in/faces.csv", "s3://pairs/out/scores.parquet", **options)
    assert (first.embedded, first.failed) == (24, 0)
    assert same_scores(first.to_arrow(), scored.to_arrow())
    again = batchverify.score("s3://pairs/in/*.csv", "s3://pairs/parts", **options)
    assert (again.embedded, again.cached) == (0, 24)
    assert same_scores(again.to_arrow(), scored.to_arrow())


def test_the_output_never_touches_the_manifest(tmp_path):
    pq.write_table(pq.read_table(SAMPLES / "faces.parquet"), tmp_path / "part-00000.parquet")
    before = (tmp_path / "part-00000.parquet").read_bytes()
    for output in (tmp_path, tmp_path / "part-00000.parquet"):
        with pytest.raises(UsageError, match="would overwrite the manifest"):
            batchverify.score(tmp_path, output, image_root=SAMPLES)
    assert (tmp_path / "part-00000.parquet").read_bytes() == before


def test_part_files_of_others_are_left_alone(cache, tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "part-00003.parquet")
    with pytest.raises(UsageError, match="not written by batchverify"):
        batchverify.score(FACES, tmp_path, cache=cache, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["part-00003.parquet"]


def test_other_files_in_the_output_folder_are_not_read_back(cache, tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "mine.parquet")
    summary = batchverify.score(FACES, tmp_path, cache=cache, quiet=True)
    assert summary.to_arrow().num_rows == summary.rows


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("interval", pa.array([(1, 2, 3)], pa.month_day_nano_interval())),
        ("fieldless", pa.array([{}], pa.struct([]))),
        ("deep", pa.array([[{}]], pa.list_(pa.struct([])))),
        ("union", pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])])),
        ("runs", pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array([7]))),
        ("far", pa.array([2**62], pa.timestamp("s"))),
    ],
)
def test_a_column_that_parquet_cannot_hold_is_named_before_anything_is_embedded(name, column, cache, tmp_path):
    table = pa.table({"image_a": ["ada_1.jpg"], "image_b": ["ada_2.jpg"], name: column})
    options: dict[str, Any] = {
        "cache": str(tmp_path / "cache"),
        "quiet": True,
        "image_root": SAMPLES / "faces",
    }
    for output in (tmp_path / "o.parquet", tmp_path / "o"):
        with pytest.raises(ManifestError) as caught:
            batchverify.score(table, output, **options)
        assert str(caught.value).startswith(f"the table: column '{name}' ({column.type}) does not fit into Parquet: ")
        assert list(tmp_path.iterdir()) == []
    rows = batchverify.score(table, **options | {"cache": cache}).to_arrow()
    assert rows[name].equals(pa.chunked_array([column]))


def test_columns_of_rare_types_come_back_from_both_kinds_of_outputs(cache, tmp_path):
    columns = {
        "views": pa.array(["x", None], pa.string_view()),
        "moment": pa.array([1, None], pa.timestamp("s", "UTC")),
        "half": pa.array([np.float16(1.5), None], pa.float16()),
        "wide": pa.array([decimal.Decimal("1.5"), None], pa.decimal256(60, 1)),
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        "codes": pa.array([5, None]).dictionary_encode(),
        "span": pa.array([3, None], pa.duration("ms")),
    }
    table = pa.table({"image_a": ["ada_1.jpg"] * 2, "image_b": ["ada_2.jpg"] * 2, **columns})
    options: dict[str, Any] = {"cache": cache, "quiet": True, "image_root": SAMPLES / "faces"}
    for output in (None, tmp_path / "o.parquet", tmp_path / "o"):
        rows = batchverify.score(table, output, **options).to_arrow()
        for name, cells in columns.items():
            assert rows[name].to_pylist() == cells.to_pylist(), name


def test_rows_that_pandas_cannot_hold_are_an_error_of_ours(cache):
    union = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])])
    table = pa.table({"image_a": ["ada_1.jpg"], "image_b": ["ada_2.jpg"], "union": union})
    summary = batchverify.score(table, cache=cache, quiet=True, image_root=SAMPLES / "faces")
    with pytest.raises(UsageError, match=r"the rows do not fit into a DataFrame: .*union.*; take `to_arrow\(\)`"):
        summary.to_pandas()


@pytest.mark.parametrize("given", [Image.new("RGB", (9, 9)), np.zeros((9, 9, 3), np.uint8), b"\xff\xd8", 3, None])
def test_what_is_no_path_is_refused_at_once(given):
    kind = type(given).__name__
    with pytest.raises(UsageError, match=f"^image_a must be a string or a Path, got {kind}$"):
        batchverify.predict(given, given)
    with pytest.raises(UsageError, match=f"^image_b must be a string or a Path, got {kind}$"):
        batchverify.predict(FACES, given)
    if given is not None:
        with pytest.raises(UsageError, match=f"^image_root must be a string or a Path, got {kind}$"):
            batchverify.score(FACES, image_root=given)
        with pytest.raises(UsageError, match=f"^a path or URI must be a string or a Path, got {kind}$"):
            batchverify.score(FACES, given)


def test_a_frame_of_path_objects_is_scored(scored, cache):
    frame = pd.read_csv(FACES)
    for name in ("image_a", "image_b"):
        frame[name] = [SAMPLES / cell for cell in frame[name]]
    summary = batchverify.score(frame, cache=cache, quiet=True)
    assert same_scores(summary.to_arrow(), scored.to_arrow())
    assert summary.to_arrow()["image_a"][0].as_py() == str(frame["image_a"][0])


def test_paths_may_be_paths(scored, cache, tmp_path):
    summary = batchverify.score(
        SAMPLES / "faces.parquet", tmp_path / "o.parquet", cache=Path(cache), image_root=SAMPLES, quiet=True
    )
    assert same_scores(summary.to_arrow(), scored.to_arrow())
    assert read_record(str(tmp_path / "o.parquet"))["options"]["cache"] == cache


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    schema = pa.schema([("number", pa.int64())])
    sink = FileSink(Location.parse(tmp_path / "o.parquet"), schema)
    sink.write(pa.table({"number": range(10)}))
    (tmp_path / "o.parquet").mkdir()  # the name is taken by a folder when the file is to get it
    with pytest.raises(BatchverifyError, match=r"o\.parquet: could not be written"):
        sink.finish({})
    sink.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["o.parquet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_megapixels": float("nan")}, "--max-megapixels must be a positive number, got nan"),
        ({"max_megabytes": float("inf")}, "--max-megabytes must be a positive number, got inf"),
        ({"cache": ""}, "--cache must not be empty"),
        ({"num_cpus": 0}, "--num-cpus must be at least 1, got 0"),
        ({"address": "auto", "num_cpus": 2}, "the cluster at --address has its own number of CPUs"),
        ({"max_failed": 1.5}, "--max-failed must lie between 0 and 1"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(UsageError, match=message):
        batchverify.score(FACES, **options)


def test_an_empty_output_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="empty"):
        batchverify.score(FACES, "")
    assert list(tmp_path.iterdir()) == []


def test_embed_without_a_cache_is_refused():
    with pytest.raises(UsageError, match="embed fills the cache"):
        batchverify.embed(FACES, no_cache=True)


def test_the_environment_names_the_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(UsageError, match="Ray Client breaks long jobs"):
        batchverify.score(FACES, no_cache=True, quiet=True)


def test_the_cache_records_how_its_vectors_were_computed(scored, cache):
    (segment,) = Path(cache).rglob("data/*.parquet")
    footer = json.loads(pq.read_schema(segment).metadata[b"batchverify"])
    assert footer["compute_path"] == scored.compute_path != ""


def test_a_run_that_fails_leaves_an_earlier_output_whole(cache, tmp_path):
    batchverify.score(FACES, tmp_path, cache=cache, quiet=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError):
        batchverify.score(FACES, tmp_path, cache=str(FACES), quiet=True, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_csv_may_share_its_folder_with_the_parts(cache, tmp_path):
    pd.read_csv(FACES).to_csv(tmp_path / "pairs.csv", index=False)
    summary = batchverify.score(tmp_path / "pairs.csv", tmp_path, cache=cache, quiet=True, image_root=SAMPLES)
    assert summary.to_arrow().num_rows == summary.rows
    assert (tmp_path / "pairs.csv").exists()


def test_an_output_that_cannot_be_reached_is_reported_at_once(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with (
        impatience(attempts=2),
        pytest.raises(UsageError, match=r"s3://nowhere/o\.parquet: cannot be written"),
    ):
        batchverify.score(FACES, "s3://nowhere/o.parquet", no_cache=True)


def test_the_summary_shows_how_and_why_vectors_were_computed_and_the_time_of_each_stage(tmp_path):
    summary = batchverify.score(FACES, tmp_path / "o.parquet", no_cache=True, device="cpu", quiet=True)
    assert summary.compute_path.startswith("cpu ") and summary.compute_reason
    stages = summary.stage_seconds
    assert {"start", "read", "decode", "detect", "embed", "wait", "score", "write rows"} <= stages.keys()
    assert 0 < summary.embedder_busy <= 1 and summary.images_per_second > 0
    text = "\n".join(" ".join(line) for line in summary.lines())
    assert f"{summary.compute_path} ({summary.compute_reason})" in text and "embedder busy" in text
    assert read_record(str(tmp_path / "o.parquet"))["compute_reason"] == summary.compute_reason
