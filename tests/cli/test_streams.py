"""Standard streams that are closed, or that nobody reads: the run is done as with /dev/null."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from repository import REPOSITORY

import batchverify

FACES = str(REPOSITORY / "sample_manifests" / "faces.csv")
COMMAND = f"exec {sys.executable} -m batchverify.cli"


def in_shell(line: str) -> int:
    """The exit code of a command line, whose streams the line itself redirects."""
    return subprocess.run(["bash", "-c", f"{COMMAND} {line}"], stdout=subprocess.DEVNULL).returncode


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_no_run(cache, tmp_path, closed):
    output = tmp_path / "o.parquet"
    assert in_shell(f"score {FACES} -o {output} --cache {cache} --json {closed}") == 0
    assert pq.read_metadata(output).num_rows > 0


def test_no_file_takes_the_number_of_a_closed_stream():
    code = (
        "from batchverify.cli.output import open_streams; open_streams()\n"
        "import os; descriptor = os.open('/dev/null', os.O_RDONLY)\n"
        "os._exit(0 if descriptor > 2 and os.get_inheritable(2) else 1)"
    )
    for closed in ("2>&-", "<&- >&- 2>&-"):
        assert subprocess.run(["bash", "-c", f'exec {sys.executable} -c "{code}" {closed}']).returncode == 0


@pytest.mark.parametrize(("manifest", "code"), [(FACES, 0), ("absent.csv", 2)])
def test_a_reader_that_has_ended_changes_no_exit_code(cache, tmp_path, manifest, code):
    reader, writer = os.pipe()
    os.close(reader)
    command = [
        sys.executable,
        "-m",
        "batchverify.cli",
        "score",
        manifest,
        "-o",
        str(tmp_path / "o"),
        "--cache",
        cache,
    ]
    try:
        assert subprocess.run(command, stderr=writer).returncode == code
    finally:
        os.close(writer)
    assert (tmp_path / "o" / "_SUCCESS").exists() == (code == 0)


def test_the_python_api_needs_no_stderr(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    summary = batchverify.score(FACES, tmp_path / "o.parquet", cache=cache)
    assert summary.scored > 0
    truth = Path(FACES)
    assert batchverify.evaluate(tmp_path / "o.parquet", tmp_path / "report", truth=str(truth), draws=0)
