"""Several processes share a cache, and writers are killed: nothing is lost or left incomplete."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cache_samples import FINGERPRINT, entry, failure, key, new_cache, segments, values
from repository import SUPPORT

from batchverify.cache.embedding_cache import EmbeddingCache
from batchverify.cache.maintenance import verify_cache

WRITER = """
import sys
sys.path.insert(0, {tests!r})
from cache_samples import entry, failure, new_cache
cache, number = new_cache({root!r}), 0
while True:
    cache.append([entry(image) for image in range(number, number + 40)] + [failure(-number - 1)])
    cache.commit()
    number += 40
    print(number, flush=True)
"""


def write_numbers(root: str, start: int, count: int, barrier: object) -> None:
    """Commit `count` images and failures in many small segments, starting with the other processes."""
    barrier.wait()  # type: ignore[attr-defined]
    cache = new_cache(root)
    for number in range(start, start + count):
        cache.append([entry(number), failure(-number - 1)])
        if number % 5 == 4:
            cache.commit()
    cache.commit()


def test_processes_that_create_write_and_read_at_once_lose_nothing(tmp_path: Path) -> None:
    root, context = tmp_path / "cache", multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    writers = [context.Process(target=write_numbers, args=(str(root), start, 60, barrier)) for start in (0, 40)]
    for writer in writers:
        writer.start()
    barrier.wait(timeout=120)
    wanted = [key(number) for number in range(100)]
    reader, seen = EmbeddingCache(str(root), FINGERPRINT), 0
    while any(writer.is_alive() for writer in writers):
        reader.refresh()
        count = sum(each is not None for each in reader.get_many(wanted))
        assert count >= seen
        seen = count
    assert [writer.exitcode for writer in writers] == [0, 0]
    reader.refresh()
    assert values(reader.get_many(wanted)) == values([entry(number) for number in range(100)])
    assert all(reader.get_many([key(-number - 1) for number in range(100)]))
    assert not reader.bad_segments


def test_a_killed_writer_leaves_whole_segments_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = WRITER.format(tests=str(SUPPORT), root=str(tmp_path))
    acknowledged = []
    for attempt in range(5):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.0137 * attempt)
            os.kill(writer.pid, signal.SIGKILL)
            rest = writer.stdout.read().splitlines()
        acknowledged.append(int(rest[-1]) if rest else 40)
        numbers = range(max(acknowledged))
        with caplog.at_level(logging.WARNING):
            got = EmbeddingCache(str(tmp_path), FINGERPRINT).get_many([key(number) for number in numbers])
        assert values(got) == values([entry(number) for number in numbers])
    assert caplog.records == []
    report = verify_cache(str(tmp_path))
    assert report.ok and report.foreign == () and report.segments == len(segments(tmp_path)) > 5
    assert {path.suffix for path in tmp_path.glob("v1/*/data/*")} == {".parquet"}
