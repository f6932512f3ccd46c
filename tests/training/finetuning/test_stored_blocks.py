"""Arrays in blocks on disk: kills, damage, other origins, full disks."""

import errno
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
from failing_calls import DISK, failing_calls

from batchverify.errors import BatchverifyError
from batchverify.training.finetuning.stored_blocks import DOCUMENT, NOTES, VALUES, StoredBlocks

ORIGIN = {"network": "a", "keys": [1, 2]}
SHAPE = (10, 3, 2)
EXPECTED = np.arange(60, dtype=np.float32).reshape(SHAPE)


def opened(folder, origin=ORIGIN, shape=SHAPE, dtype=np.float32, rows=4):
    return StoredBlocks(folder, origin, shape, dtype, rows)


def fill(blocks) -> None:
    for block in blocks.missing:
        span = blocks.span(block)
        blocks.write(block, EXPECTED[span.start : span.stop], name=f"block {block}")


@pytest.fixture
def full(tmp_path):
    """A folder with all three blocks."""
    fill(opened(tmp_path / "blocks"))
    return tmp_path / "blocks"


def test_what_was_written_is_there_again_with_its_notes(tmp_path):
    blocks = opened(tmp_path / "a" / "b")
    assert blocks.missing == [0, 1, 2] and list(blocks.span(2)) == [8, 9]
    blocks.write(1, EXPECTED[4:8], name="one")
    assert blocks.missing == [0, 2]
    again = opened(tmp_path / "a" / "b")
    assert again.missing == [0, 2] and again.notes[1]["name"] == "one"
    fill(again)
    assert again.missing == [] and np.array_equal(again.array, EXPECTED)
    assert not again.array.flags.writeable


@pytest.mark.parametrize(
    "other",
    [
        {"origin": {**ORIGIN, "network": "b"}},
        {"shape": (9, 3, 2)},
        {"dtype": np.int32},
        {"rows": 5},
    ],
)
def test_values_of_another_origin_are_dropped(full, other):
    assert opened(full).missing == []
    blocks = opened(full, **other)
    assert blocks.missing == list(range(-(-blocks.shape[0] // blocks.rows)))
    assert not blocks.array.any()
    assert opened(full).missing == [0, 1, 2]


def flip(path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_damaged_values_are_missing(full):
    flip(full / VALUES, 5 * 24 + 3)
    blocks = opened(full)
    assert blocks.missing == [1]
    fill(blocks)
    assert opened(full).missing == [] and np.array_equal(blocks.array, EXPECTED)


@pytest.mark.parametrize(("size", "missing"), [(0, [0, 1, 2]), (100, [1, 2]), (239, [2])])
def test_a_short_file_lacks_its_last_blocks(full, size, missing):
    os.truncate(full / VALUES, size)
    # Zeros take the place of what is lost: the first row of all begins with a zero, too.
    assert opened(full).missing == missing
    fill(opened(full))
    assert np.array_equal(opened(full).array, EXPECTED)


def test_damaged_notes_lose_their_blocks_and_no_others(full):
    for place in (3, 12, -3):
        shutil.copytree(full, full.with_name(f"copy{place}"))
        flip(full.with_name(f"copy{place}") / NOTES, place)
        blocks = opened(full.with_name(f"copy{place}"))
        assert len(blocks.missing) == 1
        fill(blocks)
        assert opened(blocks.folder).missing == []


def test_a_torn_note_does_not_spoil_the_next(full):
    notes = (full / NOTES).read_bytes()
    (full / NOTES).write_bytes(notes[:-20])
    blocks = opened(full)
    assert blocks.missing == [2]
    fill(blocks)
    assert opened(full).missing == []


@pytest.mark.parametrize("name", [VALUES, NOTES, DOCUMENT])
def test_without_one_of_its_files_it_begins_again(full, name):
    (full / name).unlink()
    assert opened(full).missing == [0, 1, 2]


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b'{"a": 1, "a": 1}', b"[1]"])
def test_a_damaged_document_is_another_origin(full, text):
    (full / DOCUMENT).write_bytes(text)
    assert opened(full).missing == [0, 1, 2]


def test_copies_by_pickle_read_the_same_files(full):
    blocks = opened(full)
    assert np.array_equal(blocks.array, EXPECTED)
    data = pickle.dumps(blocks)
    assert len(data) < 1500
    assert np.array_equal(pickle.loads(data).array, EXPECTED)


@pytest.mark.parametrize("shape", [(0, 3), (0,)])
def test_an_array_without_rows_is_complete(tmp_path, shape):
    blocks = opened(tmp_path / "blocks", shape=shape)
    assert blocks.missing == [] and blocks.array.shape == shape


def test_too_little_space_is_said_at_once(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 239))
    with pytest.raises(BatchverifyError, match=r"blocks: 0\.00 GB are needed, but the disk has only 0\.00 GB free"):
        opened(tmp_path / "blocks")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 240))
    fill(opened(tmp_path / "blocks"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    assert opened(tmp_path / "blocks").missing == []


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_fills_is_reported_and_the_rest_is_kept(tmp_path, monkeypatch, call):
    blocks = opened(tmp_path / "blocks")
    blocks.write(0, EXPECTED[:4])

    def fails(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(BatchverifyError, match=r"blocks: cannot be written or read: No space left on device"):
            blocks.write(1, EXPECTED[4:8])
    assert blocks.missing == [1, 2]
    fill(opened(tmp_path / "blocks"))
    assert np.array_equal(opened(tmp_path / "blocks").array, EXPECTED)


def test_short_writes_are_completed(tmp_path, monkeypatch):
    blocks, pwrite = opened(tmp_path / "blocks"), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda to, data, at: pwrite(to, data[:7], at))
    fill(blocks)
    assert np.array_equal(opened(tmp_path / "blocks").array, EXPECTED)


def test_a_folder_that_is_a_file_is_reported(tmp_path):
    (tmp_path / "blocks").write_text("")
    with pytest.raises(BatchverifyError, match=r"blocks: cannot be written or read: File exists"):
        opened(tmp_path / "blocks")


WRITER = """
import sys, numpy as np
from pathlib import Path
from batchverify.training.finetuning.stored_blocks import StoredBlocks
blocks = StoredBlocks(Path(sys.argv[1]), {}, (200, 4096), np.int32, 2)
for block in blocks.missing:
    blocks.write(block, np.full((2, 4096), block + 1))
    print(block, flush=True)
"""


def test_kills_lose_at_most_the_block_that_is_written(tmp_path):
    command, dice = [sys.executable, "-c", WRITER, str(tmp_path / "blocks")], random.Random(0)
    written: list[int] = []
    for _ in range(5):
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        written += [int(writer.stdout.readline()) for _ in range(dice.randint(1, 15))]
        os.kill(writer.pid, signal.SIGKILL)
        written += map(int, writer.communicate()[0].split())
        blocks = StoredBlocks(tmp_path / "blocks", {}, (200, 4096), np.int32, 2)
        # The last note may be there before its line.
        assert len(blocks.notes) - len(written) in (0, 1) and blocks.missing
        written = sorted(blocks.notes)
        for block in written:
            assert (blocks.array[list(blocks.span(block))] == block + 1).all()
    subprocess.run(command, check=True, capture_output=True)
    blocks = StoredBlocks(tmp_path / "blocks", {}, (200, 4096), np.int32, 2)
    assert blocks.missing == []
    assert np.array_equal(blocks.array[:, 0], np.repeat(np.arange(1, 101), 2))


@pytest.mark.parametrize("fault", DISK)
def test_every_call_may_fail_and_the_next_run_does_the_rest(tmp_path, fault):
    with failing_calls(tmp_path) as calls:
        with calls.failing():
            fill(opened(tmp_path / "undisturbed"))
        assert len(calls.seen) > 20
        for number in range(len(calls.seen)):
            folder, said = tmp_path / str(number), ""
            with calls.failing(number, fault):
                try:
                    fill(opened(folder))
                except BatchverifyError as exc:
                    said = str(exc)
            where = f"call {number}, {calls.hit}: {said}"
            assert not said or f"{folder}: cannot be written or read: " in said, where
            if not said:
                assert opened(folder).missing == [], where
            fill(opened(folder))
            again = opened(folder)
            assert again.missing == [] and np.array_equal(again.array, EXPECTED), where
