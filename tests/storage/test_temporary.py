"""Temporary files of killed processes are removed by the next run, those of living ones never."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Timer

import pytest

from batchverify.storage.location import Location
from batchverify.storage.temporary import drop, hold, sweep, temporary_folder, temporary_name, writing_to

HOLDER = """
import sys
from pathlib import Path
from batchverify.storage.temporary import hold, temporary_name
for name in ("a.bin", "b.bin"):
    hold(Path(sys.argv[1]) / temporary_name(name))
print("held", flush=True)
sys.stdin.read()
"""


FOLDER_HOLDER = """
import sys, tempfile
from batchverify.storage.temporary import temporary_folder
tempfile.tempdir = sys.argv[1]
with temporary_folder("work") as folder, temporary_folder("other"):
    folder.joinpath("a").mkdir()
    folder.joinpath("a", "b.bin").write_bytes(b"b")
    print("held", flush=True)
    sys.stdin.read()
"""


def start(script: str, folder: Path) -> subprocess.Popen:
    """A process that holds something in a folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def holder(tmp_path):
    """Another process that holds two files."""
    process = start(HOLDER, tmp_path)
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


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The machine's temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name.split(".")[1] for path in folder.iterdir())


def test_a_folder_of_a_living_process_stays_and_that_of_a_killed_one_goes_with_the_next(temporary):
    holder = start(FOLDER_HOLDER, temporary)
    with temporary_folder("work") as own:
        own.joinpath("c").touch()
        assert names(temporary) == ["other", "work", "work"]
    assert names(temporary) == ["other", "work"]
    kill(holder)
    holder.communicate()
    with temporary_folder("work") as own:
        assert list(own.iterdir()) == [] and own.stat().st_mode & 0o777 == 0o700
        assert names(temporary) == ["other", "work"]
    assert names(temporary) == ["other"]


def test_a_folder_goes_where_its_block_fails(temporary):
    with pytest.raises(KeyError), temporary_folder("work"):
        raise KeyError
    assert list(temporary.iterdir()) == []


def test_a_link_that_is_named_like_a_folder_leads_nowhere(temporary):
    victim = temporary / "victim"
    victim.mkdir()
    victim.joinpath("kept").touch()
    (temporary / temporary_name("work")).symlink_to(victim)
    with temporary_folder("work"):
        pass
    assert victim.joinpath("kept").exists()


def test_folders_of_other_users_stay(temporary):
    theirs = temporary / temporary_name("work")
    theirs.mkdir()
    try:
        os.chown(theirs, 65534, 65534)
    except PermissionError:
        pytest.skip("only root can give a folder away")
    with temporary_folder("work"):
        pass
    assert theirs.exists()


@pytest.mark.parametrize("make", [writing_to, lambda path: temporary_folder("work")])
def test_what_is_taken_for_abandoned_before_it_is_locked_is_made_again(temporary, monkeypatch, make):
    """Another run sweeps between the making and the locking."""
    flock, taken = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not taken:
            [made] = temporary.iterdir()
            taken.append(made)
            made.rmdir() if made.is_dir() else made.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with make(temporary / temporary_name("work")):
        [there] = temporary.iterdir()
        other = os.open(there, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
    assert len(taken) == 1


def test_a_lock_that_another_run_holds_for_a_moment_is_waited_for(temporary, monkeypatch):
    """That run found a new file unlocked, locked it, and removes it: it must not be written to."""
    flock, sweeper = fcntl.flock, []

    def meet(descriptor: int, how: int) -> None:
        if not sweeper:
            [made] = temporary.iterdir()
            other = made.open("rb")
            flock(other.fileno(), fcntl.LOCK_EX)
            sweeper.append(Timer(0.2, lambda: (made.unlink(), other.close())))
            sweeper[0].start()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", meet)
    path = temporary / temporary_name("a.bin")
    with writing_to(path) as file:
        sweeper[0].join()
        assert os.path.samestat(os.fstat(file.fileno()), path.stat())
