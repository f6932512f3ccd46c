"""`check` on manifests of real files."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from batchverify.errors import ManifestError
from batchverify.manifest.check import BLANK, PairIssue, PairIssues, check_manifest, find_pair_issues, look_up
from batchverify.manifest.manifest import Manifest
from batchverify.records import Limits, Reason


@pytest.fixture
def folder(tmp_path):
    """Six images, of 10 bytes each."""
    for name in "abcdef":
        (tmp_path / f"{name}.jpg").write_bytes(b"0123456789")
    return tmp_path


def manifest(folder: Path, *rows: str, header: str = "image_a,image_b,label", name: str = "m.csv") -> Path:
    path = folder / name
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_a_good_manifest(folder):
    path = manifest(
        folder, "a.jpg,b.jpg,0,7", "c.jpg,./a.jpg,1,8", "d.jpg,a.jpg,,9", header="image_a,image_b,label,n"
    )
    report = check_manifest(Manifest.open(path), images_per_second=2.0)
    assert report.ok
    assert report.files == (str(path),)
    assert report.rows == 3
    assert report.types == {"image_a": "string", "image_b": "string", "label": "int8", "n": "int64"}
    assert report.labels == {"0": 1, "1": 1, "blank": 1}
    assert (report.unique_images, report.looked_up, report.unique_share) == (4, 4, 4 / 6)
    assert report.seconds == 2.0
    lines = report.lines()
    assert "unique images        4 for 6 image paths (66.7%)" in lines
    assert "time to embed        about 2 s, an estimate at 2 images/s" in lines
    assert "labels               1 same (0), 1 different (1), 1 blank" in lines
    assert lines[-1] == "no faults found"


def test_issues_of_pairs_are_counted_and_named(folder):
    path = manifest(
        folder,
        "a.jpg,b.jpg,0",
        "b.jpg,a.jpg,1",  # mirrored, contradicts row 1
        "a.jpg,b.jpg,0",  # repeats row 1
        "c.jpg,c.jpg,0",  # self
        "d.jpg,e.jpg,",
        "e.jpg,d.jpg,",  # mirrored, blank labels contradict nothing
        "d.jpg,f.jpg,1",
        "d.jpg,f.jpg,1",  # repeats row 7
    )
    report = check_manifest(Manifest.open(path))
    assert not report.ok
    assert report.duplicates.count == 2
    assert report.duplicates.examples == (f"{path}: row 3: repeats row 1", f"{path}: row 8: repeats row 7")
    assert report.mirrored.count == 2
    assert report.mirrored.examples == (
        f"{path}: row 2: mirrors row 1",
        f"{path}: row 6: mirrors row 5",
    )
    assert report.selves.count == 1
    assert report.selves.examples == (f"{path}: row 4: one image on both sides",)
    assert report.contradicting.count == 1
    assert report.contradicting.examples == (f"{path}: row 2: contradicts row 1",)
    assert (report.missing.count, report.refused.count) == (0, 0)
    assert f"    {path}: row 2: contradicts row 1" in report.lines()
    assert report.lines()[-1] == "the manifest has faults"


def test_mirrored_and_self_pairs_are_allowed(folder):
    report = check_manifest(Manifest.open(manifest(folder, "a.jpg,b.jpg,1", "b.jpg,a.jpg,1", "a.jpg,a.jpg,0")))
    assert report.ok
    assert (report.mirrored.count, report.selves.count) == (1, 1)


def test_rows_of_several_files_are_named_by_file(folder):
    first = manifest(folder, "a.jpg,b.jpg,1", "a.jpg,c.jpg,1", name="1.csv")
    second = manifest(folder, "d.jpg,gone.jpg,1", "c.jpg,a.jpg,0", name="2.csv")
    report = check_manifest(Manifest.open(folder))
    assert report.contradicting.examples == (f"{second}: row 2: contradicts row 2 of {first}",)
    assert report.missing.examples == (f"{second}: row 1: column 'image_b': no such file: {folder}/gone.jpg",)


def test_refused_cells_count_as_neither_images_nor_pairs(folder):
    path = manifest(folder, ",,0", ",,1", "a.jpg,http://x/y.jpg,1", "a.jpg,b.jpg,1")
    report = check_manifest(Manifest.open(path))
    assert not report.ok
    assert report.refused.count == 3
    assert report.refused.examples == (
        f"{path}: row 1: column 'image_a': the cell is empty",
        f"{path}: row 2: column 'image_a': the cell is empty",
        f"{path}: row 3: column 'image_b': scheme 'http' is not read: http://x/y.jpg",
    )
    assert report.unique_images == 2
    found = (report.duplicates, report.mirrored, report.selves, report.contradicting, report.missing)
    assert [each.count for each in found] == [0] * 5


def test_a_manifest_of_refused_cells_only(folder):
    report = check_manifest(Manifest.open(manifest(folder, ",,0")))
    assert (report.unique_images, report.looked_up, report.refused.count, report.ok) == (0, 0, 1, False)


def test_missing_files_by_reason(folder):
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to("nowhere")
    (folder / "good.jpg").symlink_to("a.jpg")
    (folder / "large.jpg").write_bytes(bytes(101))
    os.mkfifo(folder / "pipe.jpg")
    names = ["gone", "folder", "dangling", "large", "pipe", "good", "a.jpg/b", "x" * 300]
    path = manifest(folder, *(f"a.jpg,{name}.jpg" for name in names), header="image_a,image_b")
    report = check_manifest(Manifest.open(path), limits=Limits(bytes=100))
    assert report.missing_reasons == {"not_found": 3, "unreadable": 3, "too_large": 1}
    assert report.missing.count == 7
    texts = [example.removeprefix(f"{path}: ") for example in report.missing.examples]
    assert texts[0] == f"row 1: column 'image_b': no such file: {folder}/gone.jpg"
    assert texts[1] == f"row 2: column 'image_b': {folder}/folder.jpg: a folder"
    assert texts[3] == f"row 4: column 'image_b': {folder}/large.jpg: 0.0 MB, the limit is 0.0001 MB"
    assert texts[4] == f"row 5: column 'image_b': {folder}/pipe.jpg: not a regular file"
    assert report.labels is None


def test_a_sample_is_looked_up_unless_every_image_is_asked_for(folder):
    rows = [f"a.jpg,{number}.jpg" for number in range(300)]
    path = manifest(folder, *rows, header="image_a,image_b")
    opened = Manifest.open(path)
    some, again, other = (check_manifest(opened, sample=20, seed=seed) for seed in (0, 0, 1))
    assert some.looked_up == other.looked_up == 20
    assert some == again
    assert some.missing.examples != other.missing.examples
    assert 19 <= some.missing.count <= 20 and len(some.missing.examples) == 10
    every = check_manifest(opened, sample=20, every=True)
    assert (every.looked_up, every.missing.count) == (301, 300)
    assert every.missing.examples[9] == f"{path}: row 10: column 'image_b': no such file: {folder}/9.jpg"
    assert "300  (301 of 301 images looked up, 300 not_found)" in "\n".join(every.lines())


def test_the_limit_of_the_manifest_holds(folder):
    path = manifest(folder, "a.jpg,b.jpg,0", "gone.jpg,b.jpg,0")
    report = check_manifest(Manifest.open(path, limit=1))
    assert (report.rows, report.ok) == (1, True)


def test_to_json_can_be_serialised(folder):
    report = check_manifest(Manifest.open(manifest(folder, "a.jpg,b.jpg,0", "a.jpg,gone.jpg,1")))
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["ok"] is False
    assert plain["missing"]["count"] == 1
    assert plain["labels"] == {"0": 1, "1": 1, "blank": 0}
    assert plain["unique_share"] == 0.75


def test_a_manifest_that_cannot_be_read_is_an_error(folder):
    with pytest.raises(ManifestError, match="row 1: label must be 0 or 1, got 'yes'"):
        check_manifest(Manifest.open(manifest(folder, "a.jpg,b.jpg,yes")))


def test_look_up_keeps_positions_across_chunks_and_stores(folder):
    names = [f"{folder}/a.jpg" if number % 3 else f"{folder}/{number}" for number in range(3000)]
    found = look_up(names, Limits())
    assert list(found) == list(range(0, 3000, 3))
    assert {skipped.reason for skipped in found.values()} == {Reason.NOT_FOUND}
    assert found[2997].message == f"no such file: {folder}/2997"
    assert look_up([], Limits()) == {}


def test_counts_on_a_large_table_agree_with_pandas(folder):
    random = np.random.default_rng(0)
    table = pa.table(
        {
            "image_a": random.integers(0, 300, 20_000).astype(str),
            "image_b": random.integers(0, 300, 20_000).astype(str),
            "label": random.integers(0, 2, 20_000),
        }
    )
    report = check_manifest(Manifest.open(table, image_root=folder), sample=1)
    frame = table.to_pandas()
    assert report.duplicates.count == frame.duplicated(["image_a", "image_b"]).sum()
    assert report.selves.count == (frame.image_a == frame.image_b).sum()
    frame["key"] = [tuple(sorted(pair)) for pair in zip(frame.image_a, frame.image_b, strict=True)]
    assert report.contradicting.count == (frame.groupby("key").label.nunique() == 2).sum()
    assert report.mirrored.count == (frame.groupby("key").image_a.nunique() == 2).sum()


def slow(a, b, labels, most) -> PairIssues:
    """The same by dictionaries, row by row."""
    ordered, unordered = {}, {}
    repeated, selves = {}, {}
    for row, pair in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        key = tuple(sorted(pair))
        unordered.setdefault(key, []).append(row)
        ordered.setdefault(pair, []).append(row)
    counts = [len(rows) - 1 for rows in ordered.values()]
    for pair, rows in ordered.items():
        if len(rows) > 1:
            key = tuple(sorted(pair))
            case = (rows[1], rows[0])
            repeated[key] = min(repeated.get(key, case), case)
        if pair[0] == pair[1]:
            selves[pair] = (rows[0], rows[0])
    mirrored, torn = {}, {}
    for key, rows in unordered.items():
        first = {tuple(map(int, (a[row], b[row]))): row for row in reversed(rows)}
        if len(first) == 2:
            mirrored[key] = tuple(sorted(first.values(), reverse=True))
        truth = {int(labels[row]): row for row in reversed(rows) if labels[row] != BLANK}
        if len(truth) == 2:
            torn[key] = tuple(sorted(truth.values(), reverse=True))

    def cases(found) -> tuple:
        return tuple(found[key] for key in sorted(found, key=lambda key: unordered[key][0])[:most])

    return PairIssues(
        PairIssue(sum(counts), cases(repeated)),
        PairIssue(len(mirrored), cases(mirrored)),
        PairIssue(int((a == b).sum()), cases(selves)),
        PairIssue(len(torn), cases(torn)),
    )


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_a_slow_loop(seed):
    random = np.random.default_rng(seed)
    rows, images = int(random.integers(1, 300)), int(random.integers(1, 30))
    a, b = random.integers(0, images, (2, rows)).astype(np.int32)
    labels = random.integers(-1, 2, rows).astype(np.int8)
    assert find_pair_issues(a, b, labels, most=3) == slow(a, b, labels, 3)


def test_large_indices_do_not_collide():
    top = 2**31 - 1
    a = np.array([0, 1, top, top - 1], np.int64)
    b = np.array([top, top, 1, top], np.int64)
    found = find_pair_issues(a, b)
    assert found.mirrored == PairIssue(1, ((2, 1),))
    assert (found.duplicates.count, found.selves.count, found.contradicting.count) == (0, 0, 0)


def test_no_rows_have_no_issues():
    nothing = np.array([], np.int32)
    assert find_pair_issues(nothing, nothing) == PairIssues()
