"""Ray's start: folders whose sockets would have too long paths, or that cannot be written to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import REPOSITORY

from batchverify.engine.ray.start import LONGEST_SOCKET, SHORT_FOLDERS, SOCKET_BYTES, choose_folder
from batchverify.errors import UsageError

MOST = LONGEST_SOCKET - SOCKET_BYTES
TMP, OTHER = SHORT_FOLDERS
LONG = f"{TMP}/slurm_jobdir_1355700_" + "x" * MOST


@pytest.fixture
def environment(monkeypatch):
    """Sets RAY_TMPDIR and TMPDIR for a test, or removes them; returns what `choose_folder` makes of RAY_TMPDIR."""

    def choose(ray: str | None, temporary: str | None) -> str | None:
        for name, value in (("RAY_TMPDIR", ray), ("TMPDIR", temporary)):
            # Also what the function sets is undone after the test.
            monkeypatch.setenv(name, value or "")
            if value is None:
                monkeypatch.delenv(name)
        choose_folder()
        return os.environ.get("RAY_TMPDIR")

    return choose


def test_a_short_folder_is_left_to_ray(environment):
    assert environment(None, None) is None
    assert environment(None, TMP) is None
    assert environment(OTHER, LONG) == OTHER
    assert environment(None, f"{TMP}/" + "x" * (MOST - 5)) is None


@pytest.mark.parametrize("temporary", [LONG, f"{TMP}/" + "é" * (MOST // 2), "relative", "/proc/nowhere"])
def test_another_one_gives_way_to_a_short_one(environment, temporary):
    assert environment(None, temporary) in SHORT_FOLDERS


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        (LONG, f"the path has more than {MOST} bytes"),
        ("relative", "the path is not absolute"),
        ("/proc/nowhere", "the folder cannot be made: "),
    ],
)
def test_a_folder_that_was_named_for_ray_is_refused_in_one_line(environment, named, problem):
    with pytest.raises(UsageError) as caught:
        environment(named, None)
    assert str(caught.value).startswith(f"RAY_TMPDIR={named}: {problem}")


@pytest.mark.ray
def test_a_run_whose_tmpdir_is_long(tmp_path, cache):
    long = tmp_path / LONG.rpartition("/")[2]
    long.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"}
    options = [
        "-o",
        str(tmp_path / "o.parquet"),
        "--engine",
        "ray",
        "--num-cpus",
        "1",
        "--cache",
        cache,
        "--json",
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "batchverify.cli",
            "score",
            str(REPOSITORY / "sample_manifests/faces.csv"),
            *options,
        ],
        env={**environment, "TMPDIR": str(long)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["engine"] == "ray"
    assert not Path(long, "ray").exists()
