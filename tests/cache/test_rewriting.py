"""`cache forget` and `cache compact`: no byte stays, nothing else is lost, at no kill point and under readers."""

import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cache_samples import (
    FINGERPRINT,
    OTHER,
    entry,
    failure,
    flip,
    key,
    new_cache,
    segments,
    values,
    vector,
    write,
)
from repository import SUPPORT
from s3_server import s3_client, s3_options, s3_server

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.maintenance import verify_cache
from batchverify.cache.rewriting import compact, erase
from batchverify.cache.segment import DETAIL_SCHEMA, Entry
from batchverify.errors import UsageError

SCRIPT = """
import sys
sys.path.insert(0, {support!r})
from cache_samples import *
from batchverify.cache.rewriting import compact, erase
root = {root!r}
{lines}
"""

HOLDER = """
import fcntl, glob, time
locks = [open(folder + "/lock", "w") for folder in glob.glob(root + "/v1/*")]
for lock in locks:
    fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def files_with(root: Path, needle: bytes) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and needle in path.read_bytes()]


def fill(root: Path) -> None:
    """Images 0 to 29 with vectors, -1 to -9 with failures, some twice, under two fingerprints."""
    for start in range(0, 30, 6):
        write(root, [entry(number) for number in range(start, start + 6)])
        write(root, [failure(-start - 1), entry(start, seed=900 + start)])
    write(root, [entry(number) for number in (3, 4)], OTHER)


def ours(root: Path) -> list[Path]:
    return [path for path in segments(root, "data") if FINGERPRINT.id in path.parts]


def read(root: object, numbers: range = range(-30, 31)) -> list[object]:
    reader = EmbeddingCache(str(root), FINGERPRINT)
    got = values(reader.get_many([key(number) for number in numbers]))
    assert not reader.bad_segments
    return got


def run(root: Path, lines: str) -> subprocess.Popen:
    script = SCRIPT.format(support=str(SUPPORT), root=str(root), lines=lines)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def test_no_byte_of_a_forgotten_image_is_left_and_others_are_equal(tmp_path: Path) -> None:
    fill(tmp_path)
    gone = [0, 3, -7]
    marks = [key(number) for number in gone] + [vector(seed).tobytes() for seed in (0, 3, 900)]
    marks += [b"message -7", hashlib.sha256(b"image 3").digest()]
    assert all(files_with(tmp_path, mark) for mark in marks)
    before = dict(zip(range(-30, 31), read(tmp_path), strict=True))
    erased = erase(str(tmp_path), [key(number) for number in gone])
    assert not [mark for mark in marks if files_with(tmp_path, mark)]
    assert (erased.vectors, erased.failures) == (4, 1)
    assert erased.found == {key(number) for number in gone} and erased.unsearched == {}
    after = dict(zip(range(-30, 31), read(tmp_path), strict=True))
    assert after == before | dict.fromkeys(gone)
    assert values(EmbeddingCache(str(tmp_path), OTHER).get_many([key(3), key(4)])) == [
        None,
        *values([entry(4)]),
    ]
    report = verify_cache(str(tmp_path))
    assert report.ok and report.foreign == ()
    assert erase(str(tmp_path), [key(number) for number in gone]).found == set()


def test_what_killed_writers_left_and_what_is_quarantined_is_searched_too(tmp_path: Path) -> None:
    fill(tmp_path)
    [half] = write(tmp_path, [Entry(key(1), vector(1) / 2), entry(40)])
    [other] = write(tmp_path, [Entry(key(41), vector(41) / 2)])
    verify_cache(str(tmp_path), quarantine=True)
    folder = half.parent.parent
    assert len(list((folder / "quarantine").iterdir())) == 2
    left = folder / "tmp" / ".segment.parquet.01234567.tmp"
    left.write_bytes(b"half " + vector(1).tobytes())
    os.utime(left, (1, 1))
    young = folder / "tmp" / ".young.parquet.01234567.tmp"
    young.write_bytes(vector(1).tobytes())
    erased = erase(str(tmp_path), [key(1)], writing_seconds=0.3)
    assert erased.deleted == 3 and not left.exists() and not young.exists()
    assert [path.name for path in (folder / "quarantine").iterdir()] == [other.name]
    assert files_with(tmp_path, key(1)) == files_with(tmp_path, vector(1).tobytes()) == []


@pytest.mark.parametrize(
    ("row", "part"), [(entry(50), vector(50).tobytes()), (failure(50), b"message 50")], ids=["data", "fail"]
)
def test_a_damaged_segment_in_quarantine_is_named_with_what_is_wrong(tmp_path: Path, row: Entry, part: bytes) -> None:
    [path] = write(tmp_path, [row])
    flip(path, path.read_bytes().index(part))
    [moved] = verify_cache(str(tmp_path), quarantine=True).quarantined
    [(named, why)] = erase(str(tmp_path), [key(50)]).unsearched.items()
    assert named == moved and "CRC" in why
    assert erase(str(tmp_path), [key(50)], delete_damaged=True).deleted == 1
    assert files_with(tmp_path, key(50)) == []


def test_a_damaged_segment_is_named_and_deleted_on_request_alone(tmp_path: Path) -> None:
    fill(tmp_path)
    [path] = write(tmp_path, [entry(50)])
    path.write_bytes(path.read_bytes()[:-1])
    erased = erase(str(tmp_path), [key(50)])
    assert list(erased.unsearched) == [str(path)] and erased.found == set()
    assert erase(str(tmp_path), [key(50)], delete_damaged=True).deleted == 1
    assert not path.exists() and len(read(tmp_path)) == 61


@pytest.mark.parametrize("full_rows", [4, 16, 65_536])
def test_compaction_changes_no_answer(tmp_path: Path, full_rows: int) -> None:
    fill(tmp_path)
    for number in (0, 7):
        write(tmp_path, [entry(number, seed=70), failure(-1)])
    cache = new_cache(tmp_path)
    cache.compute_path = "cuda bfloat16 512"
    cache.append([entry(60), entry(2, seed=61)])
    cache.commit()
    before, stale = read(tmp_path), EmbeddingCache(str(tmp_path), FINGERPRINT)
    stale.refresh()
    done = compact(str(tmp_path), full_rows=full_rows)
    assert done.duplicates > 0 and done.after == len(segments(tmp_path))
    assert read(tmp_path) == before
    assert values(stale.get_many([key(number) for number in range(-30, 31)])) == before
    names = [column for path in segments(tmp_path, "data") for column in _keys(path)]
    assert len(names) == len(set(names))
    assert verify_cache(str(tmp_path)).ok and verify_cache(str(tmp_path)).foreign == ()
    again = compact(str(tmp_path), full_rows=full_rows)
    assert (again.duplicates, again.after) == (0, len(segments(tmp_path))) and read(tmp_path) == before
    if full_rows > 100:
        assert done.after == 4 and again.written == 0


def _keys(path: Path) -> list[tuple[str, bytes]]:
    return [(path.parts[-3], each) for each in pq.read_table(path, columns=["key"])["key"].to_pylist()]


def test_what_each_row_and_segment_states_stays(tmp_path: Path) -> None:
    fill(tmp_path)
    columns = ["key", "created_at", "run_id"]
    before = {
        row["key"]: row
        for path in reversed(ours(tmp_path))
        for row in pq.read_table(path, columns=columns).to_pylist()
    }
    compact(str(tmp_path))
    rows = [row for path in ours(tmp_path) for row in pq.read_table(path, columns=columns).to_pylist()]
    assert {row["key"]: row for row in rows} == before
    for path in segments(tmp_path):
        assert b'"compute_path": "cpu fp32 64"' in pq.read_schema(path).metadata[b"batchverify"]


def test_a_row_of_a_damaged_segment_beats_no_other(tmp_path: Path) -> None:
    [bad] = write(tmp_path, [Entry(key(1), vector(1) / 2), entry(2)])
    write(tmp_path, [entry(1), entry(3)])
    write(tmp_path, [entry(4)])
    done = compact(str(tmp_path))
    assert list(done.damaged) == [str(bad)] and (done.before, done.after) == (3, 2)
    verify_cache(str(tmp_path), quarantine=True)
    assert values(EmbeddingCache(str(tmp_path), FINGERPRINT).get_many([key(1)])) == values([entry(1)])


def detailed(number: int, seed: int | None = None) -> Entry:
    points = [float(number + n) for n in range(10)]
    return replace(entry(number, seed=seed), landmarks=points, rotation=90, sharpness=number + 0.5)


def details(root: Path, *numbers: int) -> list[object]:
    """What a run with `--details` reads."""
    entries = EmbeddingCache(str(root), FINGERPRINT, details=True).get_many([key(n) for n in numbers])
    found = [each and (list(each.landmarks), each.rotation, each.sharpness) for each in entries]
    return [*values(entries), *found]


def test_details_stay_and_so_does_the_earlier_row_without_them(tmp_path: Path) -> None:
    """Runs without `--details` go on to read the first row of a key, also where a merged segment comes before it."""
    write(tmp_path, [detailed(9)])
    write(tmp_path, [entry(1), entry(2), detailed(3)])
    cache = EmbeddingCache(str(tmp_path), FINGERPRINT)
    cache.compute_path = "another"
    cache.append([detailed(1, seed=50), detailed(4)])
    cache.commit()
    write(tmp_path, [entry(1, seed=60), detailed(1, seed=70), detailed(5)])
    cache.append([detailed(2, seed=80), detailed(9, seed=90)])
    cache.commit()
    keys = [key(n) for n in (1, 2, 3, 4, 5, 9)]
    plain = values(EmbeddingCache(str(tmp_path), FINGERPRINT).get_many(keys))
    full = details(tmp_path, 1, 2, 3, 4, 5, 9)
    assert plain[:2] == values([entry(1), entry(2)])
    assert full[:6] == values([detailed(1, 50), detailed(2, 80), detailed(3), detailed(4), detailed(5), detailed(9)])
    assert full[6] == ([float(1 + n) for n in range(10)], 90, 1.5)
    done = compact(str(tmp_path))
    assert (done.before, done.after, done.duplicates) == (5, 3, 2)
    assert values(EmbeddingCache(str(tmp_path), FINGERPRINT).get_many(keys)) == plain
    assert details(tmp_path, 1, 2, 3, 4, 5, 9) == full
    erase(str(tmp_path), [key(1)])
    assert details(tmp_path, 1, 2, 3, 4, 5, 9)[1:6] == full[1:6]
    assert EmbeddingCache(str(tmp_path), FINGERPRINT).get_many([key(1)]) == [None]
    assert details(tmp_path, 1) == [None, None]
    assert verify_cache(str(tmp_path)).ok


def test_segments_with_and_without_details_are_merged(tmp_path: Path) -> None:
    [old] = write(tmp_path, [entry(1)])
    table = pq.read_table(old).drop_columns(DETAIL_SCHEMA.names)
    pq.write_table(table, old, compression="none", write_page_checksum=True)
    write(tmp_path, [detailed(2)])
    assert details(tmp_path, 1) == [None, None]
    full = details(tmp_path, 1, 2)
    compact(str(tmp_path))
    assert len(segments(tmp_path)) == 1
    assert details(tmp_path, 1, 2) == full
    cache = EmbeddingCache(str(tmp_path), FINGERPRINT)
    assert values(cache.get_many([key(1), key(2)])) == values([entry(1), entry(2)])


def test_impossible_details_count_as_damage(tmp_path: Path) -> None:
    write(tmp_path, [replace(detailed(1), rotation=45)])
    write(tmp_path, [replace(detailed(2), landmarks=[float("inf")] * 10)])
    assert details(tmp_path, 1, 2) == [None] * 4


def test_one_process_at_a_time_rewrites(tmp_path: Path) -> None:
    fill(tmp_path)
    holder = run(tmp_path, HOLDER)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match="another `cache forget` or `cache compact`"):
        compact(str(tmp_path))
    holder.kill()
    holder.communicate()
    assert compact(str(tmp_path)).duplicates > 0


def test_compactions_killed_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    generator = random.Random(0)
    expected, kills = None, 0
    for attempt in range(6):
        number = 100 * attempt
        for start in range(number, number + 40, 4):
            write(tmp_path, [entry(each) for each in range(start, start + 4)] + [failure(-start - 1)])
        numbers = range(-600, 641)
        expected = read(tmp_path, numbers)
        process = run(tmp_path, "print('go', flush=True)\ncompact(root, full_rows=24)")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(generator.uniform(0, 0.12))
        kills += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert read(tmp_path, numbers) == expected
        assert verify_cache(str(tmp_path)).ok
    assert kills >= 2
    compact(str(tmp_path))
    assert read(tmp_path, range(-600, 641)) == expected
    names = [each for path in segments(tmp_path, "data") for each in _keys(path)]
    assert len(names) == len(set(names))


def compact_and_forget(root: str, done: object) -> None:
    """Compact again and again in sizes that leave work, and forget image 999."""
    number = 0
    while not done.is_set():  # type: ignore[attr-defined]
        compact(root, full_rows=20 + 40 * (number % 3))
        erase(root, [key(999)])
        number += 1
    compact(root)
    erase(root, [key(999)])


def commit_numbers(root: str, count: int) -> None:
    """Commit images in many small segments, image 999 among them now and then."""
    cache = new_cache(root)
    for number in range(count):
        cache.append([entry(number), failure(-number - 1)])
        if number % 3 == 2:
            cache.commit()
    cache.commit()
    with_it = new_cache(root)
    with_it.append([entry(999)])
    with_it.commit()


def test_readers_and_writers_at_work_meanwhile_lose_nothing(tmp_path: Path) -> None:
    root, context = tmp_path / "cache", multiprocessing.get_context("spawn")
    new_cache(root).append([])
    done = context.Event()
    rewriter = context.Process(target=compact_and_forget, args=(str(root), done))
    writer = context.Process(target=commit_numbers, args=(str(root), 150))
    for process in (rewriter, writer):
        process.start()
    wanted, reader, seen = [key(number) for number in range(150)], EmbeddingCache(str(root), FINGERPRINT), 0
    stale = EmbeddingCache(str(root), FINGERPRINT)
    while writer.is_alive():
        reader.refresh()
        for each in (reader, stale):
            count = sum(got is not None for got in each.get_many(wanted))
            assert each is stale or count >= seen
            seen = max(count, seen)
    writer.join()
    done.set()
    rewriter.join(120)
    assert (writer.exitcode, rewriter.exitcode) == (0, 0)
    reader.refresh()
    assert values(reader.get_many(wanted)) == values([entry(number) for number in range(150)])
    assert all(reader.get_many([key(-number - 1) for number in range(150)]))
    assert not reader.bad_segments and not stale.bad_segments
    assert reader.get_many([key(999)]) == [None] and files_with(root, vector(999).tobytes()) == []
    report = verify_cache(str(root))
    assert report.ok and report.foreign == () and report.segments == 2


@pytest.fixture
def store() -> Iterator[tuple[object, str]]:
    with s3_server() as address:
        client = s3_client(address)
        client.create_bucket(Bucket="faces")
        yield client, f"s3://faces/cache{s3_options(address)}"


def test_in_an_object_store(store) -> None:
    client, root = store
    for start in range(0, 12, 3):
        cache = new_cache(root)
        cache.append([entry(number) for number in range(start, start + 3)] + [failure(-start - 1)])
        cache.commit()
    before, stale = read(root), EmbeddingCache(root, FINGERPRINT)
    stale.refresh()
    done = compact(root)
    assert (done.before, done.after) == (8, 2) and read(root) == before
    assert values(stale.get_many([key(number) for number in range(-30, 31)])) == before
    assert not stale.bad_segments
    erased = erase(root, [key(4), key(-4)])
    assert (erased.vectors, erased.failures) == (1, 1)
    left = [each["Key"] for each in client.list_objects_v2(Bucket="faces")["Contents"]]
    bodies = b"".join(client.get_object(Bucket="faces", Key=each)["Body"].read() for each in left)
    assert key(4) not in bodies and vector(4).tobytes() not in bodies and vector(5).tobytes() in bodies
    assert not [each for each in left if "claim" in each]
    assert verify_cache(root).ok and verify_cache(root).foreign == ()
