"""EmbeddingCache: committed entries are found; precedence among several entries of one key."""

import logging
import os
import pickle
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cache_samples import FINGERPRINT, OTHER, entry, failure, key, new_cache, segments, values, vector, write

from batchverify.cache.embedding_cache import EmbeddingCache, KeyIndex
from batchverify.cache.segment import Entry
from batchverify.errors import ArtifactError
from batchverify.records import Reason, Skipped


def open_cache(root: Path) -> EmbeddingCache:
    return EmbeddingCache(str(root), FINGERPRINT)


def skipped_of(each: Entry | None) -> Skipped | None:
    return each.skipped if each is not None else None


def test_round_trip_across_segments_in_any_order(tmp_path: Path) -> None:
    written = [entry(number) for number in range(700)]
    write(tmp_path, written[:300])
    write(tmp_path, written[300:])
    wanted = np.random.default_rng(1).permutation(800).tolist()
    got = open_cache(tmp_path).get_many([key(number) for number in wanted])
    assert values(got) == values([written[number] if number < 700 else None for number in wanted])


def test_a_key_asked_for_twice_is_answered_twice(tmp_path: Path) -> None:
    write(tmp_path, [entry(1), failure(2)])
    got = open_cache(tmp_path).get_many([key(1), key(2), key(3), key(2), key(1)])
    assert [each and each.key for each in got] == [key(1), key(2), None, key(2), key(1)]
    assert open_cache(tmp_path).get_many([]) == []


def test_a_vector_beats_a_failure_of_any_age(tmp_path: Path) -> None:
    write(tmp_path, [failure(1), entry(2)])
    write(tmp_path, [entry(1), failure(2)])
    assert values(open_cache(tmp_path).get_many([key(1), key(2)])) == values([entry(1), entry(2)])


def test_the_earliest_of_equal_keys_wins_in_and_across_segments(tmp_path: Path) -> None:
    write(tmp_path, [entry(1, seed=10), entry(2), entry(1, seed=11)])
    write(tmp_path, [entry(0), entry(2, seed=12), entry(1, seed=13)])
    cache = open_cache(tmp_path)
    assert values(cache.get_many([key(1), key(2)])) == values([entry(1, seed=10), entry(2)])
    assert len(cache.index.keys) == 3


def test_the_latest_of_several_failures_counts(tmp_path: Path) -> None:
    # The earlier one did not hold under the limits of the run that retried the image.
    write(tmp_path, [failure(1, Reason.TOO_LARGE, "bytes 10")])
    write(tmp_path, [failure(1, Reason.TOO_LARGE, "bytes 5")])
    [got] = open_cache(tmp_path).get_many([key(1)])
    assert skipped_of(got) == Skipped(Reason.TOO_LARGE, "message 1", "bytes 5")
    assert got is not None and got.vector is None


def test_keys_with_the_same_indexed_half_are_distinguished(tmp_path: Path) -> None:
    first, second = key(1), key(1)[:16] + key(2)[16:]
    write(tmp_path, [Entry(first, vector(1)), entry(3)])
    cache = open_cache(tmp_path)
    got = cache.get_many([second, first, key(3)])
    assert [each and each.key for each in got] == [None, first, key(3)]
    assert not cache.bad_segments


def test_keys_with_zero_bytes_at_the_end(tmp_path: Path) -> None:
    keys = [
        bytes(32),
        b"\x01" + bytes(31),
        b"\x01\x00\x01" + bytes(29),
        b"\xff" * 15 + bytes(17),
        b"\xff" * 32,
    ]
    write(tmp_path, [Entry(each, vector(number)) for number, each in enumerate(keys[:-1])])
    got = open_cache(tmp_path).get_many(keys)
    assert [each and each.key for each in got] == [*keys[:-1], None]
    assert [each.vector.tobytes() for each in got[:-1]] == [vector(number).tobytes() for number in range(4)]


def test_find_with_no_keys_and_with_many(tmp_path: Path) -> None:
    empty = open_cache(tmp_path).index
    assert empty.find([]).shape == (0,) and empty.find([key(1), bytes(32)]).tolist() == [-1, -1]
    numbers = np.random.default_rng(2).permutation(20_000)
    write(tmp_path, [Entry(key(number), vector(0)) for number in numbers[:10_000].tolist()])
    index = open_cache(tmp_path).index
    positions = index.find([key(number) for number in numbers.tolist()])
    present, absent = positions[:10_000], positions[10_000:]
    assert positions.dtype == np.int64 and (present >= 0).all() and (absent == -1).all()
    assert index.row[present].tolist() == list(range(10_000))
    assert index.find([]).shape == (0,)


def test_a_pickled_index_serves_another_process(tmp_path: Path) -> None:
    write(tmp_path, [entry(1), failure(2)])
    index: KeyIndex = pickle.loads(pickle.dumps(open_cache(tmp_path).index))
    write(tmp_path, [entry(3)])
    reader = EmbeddingCache(str(tmp_path), FINGERPRINT, index=index)
    got = reader.get_many([key(1), key(2), key(3)])
    assert [each and each.key for each in got] == [key(1), key(2), None]
    assert index.keys.nbytes + index.segment.nbytes + index.row.nbytes == 24


def test_an_absent_cache_is_read_as_empty_and_not_made(tmp_path: Path) -> None:
    reader = open_cache(tmp_path / "a" / "b")
    assert reader.get_many([key(1)]) == [None] and reader.index.segments == ()
    assert list(tmp_path.iterdir()) == []


def test_fingerprints_do_not_see_each_other(tmp_path: Path) -> None:
    write(tmp_path, [entry(1)])
    write(tmp_path, [entry(1, seed=5)], OTHER)
    assert values(open_cache(tmp_path).get_many([key(1)])) == values([entry(1)])


def test_enough_rows_are_committed(tmp_path: Path) -> None:
    cache = new_cache(tmp_path, commit_rows=10)
    cache.append([entry(number) for number in range(9)])
    assert segments(tmp_path) == []
    cache.append([failure(9)])
    assert [path.parent.name for path in segments(tmp_path)] == ["data", "fail"]
    cache.commit()
    assert len(segments(tmp_path)) == 2


def test_failures_that_do_not_follow_from_the_bytes_are_ignored(tmp_path: Path) -> None:
    cache = new_cache(tmp_path)
    cache.append([failure(number, each) for number, each in enumerate(Reason)])
    cache.commit()
    [segment] = segments(tmp_path)
    reasons = pq.read_table(segment).column("reason").to_pylist()
    assert sorted(reasons) == ["no_face", "too_large", "undecodable"]


def test_entries_are_committed_after_some_time_too(tmp_path: Path) -> None:
    cache = new_cache(tmp_path, commit_seconds=1.5)
    time.sleep(1.6)
    cache.append([entry(1)])
    assert len(segments(tmp_path)) == 1
    cache.append([entry(2)])
    assert len(segments(tmp_path)) == 1
    cache.commit()
    assert all(open_cache(tmp_path).get_many([key(1), key(2)]))


@pytest.mark.parametrize("lost", ["data", "fail"])
def test_a_failed_commit_is_made_up_for_later(tmp_path: Path, lost: str) -> None:
    cache = new_cache(tmp_path)
    folder, aside = Path(cache.folder.path) / lost, tmp_path / "aside"
    folder.rename(aside)
    cache.append([entry(1), failure(2)])
    with pytest.raises(ArtifactError, match=r"cache cannot be used.*--cache or use --no-cache"):
        cache.commit()
    aside.rename(folder)
    cache.commit()
    assert all(open_cache(tmp_path).get_many([key(1), key(2)]))
    assert len(segments(tmp_path)) == 2


def test_folders_are_private_and_hold_whole_files_only(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write(tmp_path / "cache", [entry(1), failure(2)])
    finally:
        os.umask(before)
    folders = [tmp_path / "cache", *(path for path in (tmp_path / "cache").rglob("*") if path.is_dir())]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}
    names = sorted(path.parent.name for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert names == sorted(["data", "fail", FINGERPRINT.id])


def test_the_permissions_of_an_existing_root_stay(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    new_cache(tmp_path / "cache")
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o755


@pytest.mark.parametrize("in_the_way", ["cache", "cache/v1", f"cache/v1/{FINGERPRINT.id}/data"])
def test_the_error_about_a_file_in_the_way_says_what_to_do(tmp_path: Path, in_the_way: str) -> None:
    (tmp_path / in_the_way).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / in_the_way).write_text("a file")
    with pytest.raises(ArtifactError, match=f"{tmp_path}/cache: the cache cannot be used .*--cache or use --no-"):
        new_cache(tmp_path / "cache")


def test_a_reader_reports_the_same_if_segments_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / "v1" / FINGERPRINT.id).mkdir(parents=True)
    (tmp_path / "v1" / FINGERPRINT.id / "data").write_text("a file")
    with pytest.raises(ArtifactError, match=r"cache cannot be used .*--cache or use --no-cache"):
        open_cache(tmp_path).get_many([key(1)])


def test_another_fingerprint_in_the_folder_is_refused(tmp_path: Path) -> None:
    document = Path(new_cache(tmp_path).folder.path) / "fingerprint.json"
    assert document.read_text() == FINGERPRINT.canonical
    new_cache(tmp_path)
    for text in (OTHER.canonical, "", "\xff"):
        document.write_text(text, encoding="latin-1")
        with pytest.raises(ArtifactError, match=r"fingerprint\.json: does not match the name"):
            new_cache(tmp_path)


def test_stale_staging_files_are_removed_after_a_day(tmp_path: Path) -> None:
    staging = Path(new_cache(tmp_path).folder.path) / "tmp"
    for name, hours in (("old", 25), ("young", 23), ("new", 0)):
        (staging / name).write_text("half a segment")
        moment = time.time() - hours * 3600
        os.utime(staging / name, (moment, moment))
    (staging / "folder").mkdir()
    new_cache(tmp_path)
    assert sorted(path.name for path in staging.iterdir()) == ["folder", "new", "young"]


def test_runs_that_start_together_may_remove_the_same_files(tmp_path: Path) -> None:
    staging = Path(new_cache(tmp_path).folder.path) / "tmp"
    for number in range(300):
        (staging / str(number)).touch()
        os.utime(staging / str(number), (0, 0))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(new_cache, [tmp_path] * 4))
    assert list(staging.iterdir()) == []


def test_files_that_are_no_segments_are_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    [path] = write(tmp_path, [entry(1)])
    for name in (".nfs0001", "README.txt", path.name + ".tmp"):
        (path.parent / name).write_text("no segment")
    (path.parent / "folder.parquet").mkdir()
    with caplog.at_level(logging.WARNING):
        assert open_cache(tmp_path).get_many([key(1)])[0] is not None
    assert caplog.records == []


def test_entries_appended_twice_are_stored_once(tmp_path):
    """After Ctrl-C the scheduler may append entries that it has appended already."""
    cache = new_cache(tmp_path)
    entries = [entry(number) for number in range(3)]
    cache.append(entries)
    cache.append(entries)
    cache.commit()
    cache.append([*entries, entry(3)])
    cache.commit()
    stored = [pq.read_table(path)["key"].to_pylist() for path in segments(tmp_path)]
    assert sorted(map(len, stored)) == [1, 3]
