"""`cache info` and `cache verify`: all counts, all kinds of damage, and which files are moved."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cache_samples import FINGERPRINT, OTHER, entry, failure, flip, key, new_cache, segments, vector, write

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.maintenance import cache_info, verify_cache
from batchverify.cache.segment import Entry
from batchverify.errors import ArtifactError, UsageError
from batchverify.records import Reason


def test_an_absent_or_empty_cache_is_empty_and_not_made(tmp_path: Path) -> None:
    assert cache_info(str(tmp_path / "absent")) == [] and not (tmp_path / "absent").exists()
    report = verify_cache(str(tmp_path / "absent"))
    assert report.ok and (report.segments, report.rows, report.fingerprints) == (0, 0, 0)
    assert cache_info(str(tmp_path)) == [] and list(tmp_path.iterdir()) == []


def test_info_counts_vectors_images_and_failures(tmp_path: Path) -> None:
    before = datetime.now(timezone.utc).replace(microsecond=0)
    write(tmp_path, [entry(1), entry(2), failure(3), failure(4, Reason.TOO_LARGE, "bytes 5"), failure(2)])
    write(tmp_path, [entry(2), failure(4, Reason.TOO_LARGE, "bytes 6"), failure(5)])
    write(tmp_path, [Entry(bytes(32), vector(1)), Entry(b"\x01" + bytes(31), vector(2))], OTHER)
    new_cache(tmp_path, OTHER)
    by_id = {each.id: each for each in cache_info(str(tmp_path))}
    assert list(by_id) == sorted([FINGERPRINT.id, OTHER.id])
    ours, other = by_id[FINGERPRINT.id], by_id[OTHER.id]
    assert (ours.vectors, ours.keys, ours.segments) == (3, 2, 4)
    # Image 2 has a vector: that it failed once does not count.
    assert ours.failures == {"no_face": 2, "too_large": 1}
    assert ours.bytes == sum(path.stat().st_size for path in segments(tmp_path) if FINGERPRINT.id in str(path))
    assert ours.document == FINGERPRINT.document and other.document == OTHER.document
    assert (other.vectors, other.keys, other.failures, other.segments) == (2, 2, {}, 1)
    assert ours.oldest and ours.newest and before <= ours.oldest <= ours.newest <= datetime.now(timezone.utc)
    assert ours.damaged == ours.foreign == ()


def test_info_of_a_fingerprint_without_segments(tmp_path: Path) -> None:
    new_cache(tmp_path)
    [info] = cache_info(str(tmp_path))
    assert (info.vectors, info.keys, info.segments, info.bytes, info.oldest, info.newest) == (
        0,
        0,
        0,
        0,
        None,
        None,
    )


def test_info_as_lines_and_json(tmp_path: Path) -> None:
    write(tmp_path, [entry(1), failure(3)])
    [info] = cache_info(str(tmp_path))
    lines = "\n".join(info.lines())
    assert f"{FINGERPRINT.id}  backbone bbbbbbbbbbbb, crop detect, margin 44, views none" in lines
    assert "images with a vector: 1 (1 rows), without: 1 no_face" in lines and "UTC" in lines
    document = json.loads(json.dumps(info.to_json()))
    assert document["failures"] == {"no_face": 1}
    assert datetime.fromisoformat(document["oldest"]) == info.oldest


def test_a_whole_cache_is_ok(tmp_path: Path) -> None:
    write(tmp_path, [entry(number) for number in range(300)])
    write(tmp_path, [failure(1)])
    write(tmp_path, [entry(1)], OTHER)
    report = verify_cache(str(tmp_path))
    assert report.ok and report.problems == () and report.foreign == ()
    assert (report.fingerprints, report.segments, report.rows) == (2, 3, 302)
    assert report.bytes == sum(path.stat().st_size for path in segments(tmp_path))
    assert report.lines()[-1].startswith("2 fingerprints, 3 segments, 302 rows, ")
    assert report.lines()[-1].endswith(": no problems")


def damaged_cache(root: Path) -> dict[Path, str]:
    """A cache with one damage of each kind: the damaged paths and a part of each expected message."""
    half, nan = vector(1) * np.float16(0.5), vector(1).copy()
    nan[7] = np.nan
    expected = {
        write(root, [entry(1), Entry(key(2), half)])[0]: "row 1: the vector's norm is 0.5, not 1 (1 such rows)",
        write(root, [Entry(key(3), nan), Entry(key(4), np.zeros(512))])[0]: "norm is nan, not 1 (2 such rows)",
        write(root, [entry(5)])[0]: "checksum",
        write(root, [entry(6)])[0]: "size is 0 bytes",
        write(root, [failure(7)])[0]: "",
    }
    page, zero, cut = list(expected)[2:]
    column = pq.read_metadata(page).row_group(0).column(3)
    flip(page, column.data_page_offset + column.total_compressed_size - 1)
    zero.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-1])
    [more] = write(root, [entry(8)])
    renamed = more.rename(more.with_name(more.name.replace("-r1.", "-r2.")))
    [theirs] = write(root, [entry(9)], OTHER)
    moved = theirs.rename(renamed.parent / theirs.name)
    [mixed] = write(root, [failure(10)])
    misplaced = mixed.rename(renamed.parent / mixed.name)
    return expected | {
        renamed: "has 1 rows, which its name does not state",
        moved: f"its footer states fingerprint {OTHER.id}",
        misplaced: "column box is missing",
    }


def test_every_damage_is_reported(tmp_path: Path) -> None:
    expected = damaged_cache(tmp_path)
    [good] = write(tmp_path, [entry(11)])
    report = verify_cache(str(tmp_path))
    assert not report.ok and report.quarantined == ()
    problems = {Path(problem.path): problem.what for problem in report.problems}
    assert problems.keys() == expected.keys() and good not in problems
    for path, part in expected.items():
        assert part in problems[path] and problems[path] and "\n" not in problems[path]
    assert len(report.lines()) == len(expected) + 1 and report.lines()[-1].endswith("8 problems")
    assert sorted(segments(tmp_path)) == sorted([*expected, good])
    assert json.loads(json.dumps(report.to_json()))["ok"] is False
    # `cache_info` does not read norms: five files cannot be opened or fail their checks.
    infos = {each.id: each for each in cache_info(str(tmp_path))}
    assert len(infos[FINGERPRINT.id].damaged) == 5
    assert any("damaged: " in line for line in infos[FINGERPRINT.id].lines())


def test_quarantine_moves_the_bad_segments_and_no_others(tmp_path: Path) -> None:
    expected = damaged_cache(tmp_path)
    [good] = write(tmp_path, [entry(11), failure(12)])[:1]
    intact = [path for path in segments(tmp_path) if path not in expected]
    contents = sorted(path.read_bytes() for path in expected)
    report = verify_cache(str(tmp_path), quarantine=True)
    folder = good.parent.parent / "quarantine"
    assert sorted(map(Path, report.quarantined)) == sorted(folder.iterdir())
    assert sorted(path.read_bytes() for path in folder.iterdir()) == contents
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not report.ok and sum("moved to" in line for line in report.lines()) == len(expected)
    assert verify_cache(str(tmp_path), quarantine=True).ok
    cache = EmbeddingCache(str(tmp_path), FINGERPRINT)
    assert all(cache.get_many([key(11), key(12)])) and not cache.bad_segments
    assert [path for path in segments(tmp_path) if path.parent != folder] == intact


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_listed_but_not_moved(tmp_path: Path) -> None:
    [path] = write(tmp_path, [entry(1)])
    path.chmod(0)
    report = verify_cache(str(tmp_path), quarantine=True)
    [problem] = report.problems
    assert problem.path == str(path) and "Permission denied" in problem.what
    assert report.quarantined == () and path.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing"),
        ("", "Expecting value"),
        ("[]", "does not match the name"),
        (OTHER.canonical, "does not match the name"),
    ],
)
def test_a_wrong_fingerprint_document_is_a_problem_but_the_vectors_count(
    tmp_path: Path, text: str | None, message: str
) -> None:
    write(tmp_path, [entry(1)])
    document = tmp_path / "v1" / FINGERPRINT.id / "fingerprint.json"
    if text is None:
        document.unlink()
    else:
        document.write_text(text)
    report = verify_cache(str(tmp_path), quarantine=True)
    [problem] = report.problems
    assert problem.path == str(document) and message in problem.what and report.quarantined == ()
    [info] = cache_info(str(tmp_path))
    assert info.document is None and info.vectors == 1
    assert "fingerprint.json cannot be read" in info.lines()[0]


def test_foreign_files_and_folders_are_listed_and_left_alone(tmp_path: Path) -> None:
    [path] = write(tmp_path, [entry(1)])
    folder = path.parent.parent
    outside = [
        tmp_path / "photo.jpg",
        tmp_path / "v2",
        tmp_path / "v1" / "notes.txt",
        tmp_path / "v1" / "abc",
    ]
    inside = [
        folder / "x",
        folder / "y.txt",
        folder / "data" / "z.parquet",
        folder / "fail" / "deep",
        folder / "data.bak",
    ]
    for each in (*outside, *inside):
        each.write_bytes(b"x") if each.suffix else each.mkdir()
    # Opening a pipe would block.
    inside.append(path.with_name(path.name.replace("-r1", "-r2")))
    os.mkfifo(inside[-1])
    (folder / "tmp" / ".half.parquet.tmp").write_bytes(b"half")
    report = verify_cache(str(tmp_path), quarantine=True)
    assert report.ok and report.segments == 1
    assert sorted(report.foreign) == sorted(map(str, outside + inside))
    [info] = cache_info(str(tmp_path))
    assert sorted(info.foreign) == sorted(map(str, inside)) and info.damaged == () and info.vectors == 1
    assert all(each.exists() for each in (*outside, *inside))


@pytest.mark.parametrize("read", [cache_info, verify_cache])
def test_a_file_in_place_of_the_cache_is_an_error(tmp_path: Path, read: Callable[[str], object]) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ArtifactError, match=r"cache: the cache cannot be listed: .*Not a directory"):
        read(str(tmp_path / "cache"))


def test_a_segment_that_cannot_be_moved_is_an_error(tmp_path: Path) -> None:
    [path] = write(tmp_path, [entry(1)])
    path.write_bytes(b"")
    (path.parent.parent / "quarantine").write_text("a file")
    with pytest.raises(ArtifactError, match=r"cannot be moved to .*quarantine"):
        verify_cache(str(tmp_path), quarantine=True)
    assert path.exists()


def test_quarantine_in_an_object_store_is_refused() -> None:
    with pytest.raises(UsageError, match="without --quarantine"):
        verify_cache("s3://bucket/cache", quarantine=True)


def test_no_torch_and_no_ray_are_imported() -> None:
    code = "import sys, batchverify.cache.maintenance; "
    code += "print(sorted({'torch', 'ray', 'pandas'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert run.stdout.strip() == "[]"
