"""Temporary files of killed processes are removed by the next run, those of living ones never."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from batchverify.storage.location import Location
from batchverify.storage.temporary import drop, hold, sweep, temporary_name, writing_to

HOLDER = """
import sys
from pathlib import Path
from batchverify.storage.temporary import hold, temporary_name
for name in ("a.bin", "b.bin"):
    hold(Path(sys.argv[1]) / temporary_name(name))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds two files."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.communicate()


def kill(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_files_of_a_living_process_stay_and_those_of_a_killed_one_go(tmp_path, holder):
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    kill(holder)
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_whoever_writes_a_file_removes_what_was_left_of_it_alone(tmp_path, holder):
    kill(holder)
    Location.parse(tmp_path / "a.bin").write_bytes(b"a")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and names[0].startswith(".b.bin.") and names[1] == "a.bin"


def test_files_of_others_stay(tmp_path):
    """Of other kernels, whose locks may not be seen, of other programs, and what only looks like ours."""
    ours = temporary_name("a.bin")
    mark = ours.split(".")[-2][:8]
    others = [ours.replace(mark, "0" * 8), ".a.bin.01234567.tmp", f"a.bin.{mark}01234567.tmp", f".{mark}.tmp"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ours).mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, ours])


def test_a_held_file_can_be_written_by_its_name_and_is_dropped(tmp_path):
    path = tmp_path / temporary_name("a.bin")
    hold(path)
    path.write_bytes(b"a")
    sweep(tmp_path)
    assert path.read_bytes() == b"a"
    drop(path)
    drop(path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_held_until_it_has_its_name(tmp_path):
    path = tmp_path / temporary_name("a.bin")
    with writing_to(path) as file:
        sweep(tmp_path)
        file.write(b"a")
        file.flush()
        path.rename(tmp_path / "a.bin")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("a.bin", b"a")]


def test_a_folder_that_cannot_be_listed_is_no_error(tmp_path):
    sweep(tmp_path / "absent")
    assert not (Path(tmp_path) / "absent").exists()
