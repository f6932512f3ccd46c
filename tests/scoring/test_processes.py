"""Real processes: Ctrl-C on a terminal, then the same command; two runs at once on one cache."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from failing_benches import rows_of
from killing import TOY, with_toys
from PIL import Image
from repository import SUPPORT

import batchverify
from batchverify.cache.maintenance import verify_cache

IMAGES = 192
# The command with chunks so small that few images are several.
PROGRAM = """
from functools import partial
from batchverify.engine import base
from batchverify.scoring import job
base.CPU_CHUNK = 16
{toy}
from batchverify.cli.app import main
main(prog_name="batchverify")
"""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        small = generator.integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(small).resize((160, 160)).save(folder / f"{number}.jpg")
    lines = [f"{number}.jpg,{(number + 1) % IMAGES}.jpg" for number in range(IMAGES)]
    (folder / "pairs.csv").write_text("image_a,image_b\n" + "\n".join(lines) + "\n")
    return folder / "pairs.csv"


def command(manifest: Path, output: Path, cache: Path, engine: str, toy_seconds: float | None = None) -> list[str]:
    """toy_seconds: the toy embeds, in so many seconds a chunk, where it does not matter what is computed."""
    toy = "" if toy_seconds is None else TOY.format(log=f"{cache}.embedded", pause=toy_seconds)
    options = ["--crop", "none", "--cache", str(cache), "--engine", engine, "--num-cpus", "2", "--json"]
    return [sys.executable, "-c", PROGRAM.format(toy=toy), "score", str(manifest), "-o", str(output), *options]


def stop_when_embedding(arguments: list[str], marker: str, stop: Callable[[int], None]) -> tuple[int, str]:
    """Run a command on its own terminal and stop it once something is embedded."""
    master, slave = pty.openpty()
    environment = {**os.environ, **with_toys(), "MARKER": marker}
    process = subprocess.Popen(
        arguments,
        env=environment,
        stdin=slave,
        stderr=slave,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(slave)
    seen, pressed = "", False
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:  # the terminal's other end is closed: the command has ended
            break
        if not data:
            break
        seen += data.decode(errors="replace")
        if not pressed and re.search(r"embedded [1-9]", seen):
            stop(process.pid)
            assert processes_with(marker)
            pressed = True
    os.close(master)
    return process.wait(timeout=60), seen


def processes_with(marker: str) -> list[str]:
    """Command lines of all processes whose environment holds `marker`."""
    commands = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                commands.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return commands


def terminate(process: int) -> None:
    """What `kill`, Kubernetes and `ray job stop` send, to the command alone."""
    os.kill(process, signal.SIGTERM)


def press_ctrl_c(process: int) -> None:
    """What a terminal sends, to the whole process group."""
    os.killpg(process, signal.SIGINT)


@pytest.mark.parametrize(
    ("engine", "stops"),
    [
        ("local", [press_ctrl_c]),
        pytest.param("ray", [press_ctrl_c, terminate], marks=pytest.mark.ray),
    ],
)
def test_stopped_then_the_same_command(manifest, tmp_path, engine, stops):
    output, cache = tmp_path / "out" / "scores.parquet", tmp_path / "cache"
    arguments = command(manifest, output, cache, engine, 0.2 if engine == "ray" else None)
    marker, kept = f"marker of {tmp_path}", 0
    # The hint must not repeat --overwrite: that would start anew once more.
    first, hint = ([*arguments, "--overwrite"], " without --overwrite") if engine == "local" else (arguments, "")
    for stop in stops:
        code, seen = stop_when_embedding(first, marker, stop)
        assert code == 130, seen
        assert f"interrupted; finished work is kept, run the same command{hint} to finish the rest" in seen
        assert "Traceback" not in seen
        assert [path.name for path in output.parent.iterdir()] == ["scores.parquet.job"]
        before, kept = kept, sum(pq.read_metadata(path).num_rows for path in cache.rglob("data/*.parquet"))
        assert before < kept < IMAGES
        assert list(cache.rglob("tmp/*")) == []
        deadline = time.monotonic() + 10
        while processes_with(marker) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert processes_with(marker) == []
    again = begun(arguments)
    summary = json.loads(again.communicate(timeout=120)[0])
    assert again.returncode == 0
    assert (summary["cached"], summary["embedded"]) == (kept, IMAGES - kept)
    assert pq.read_table(output).num_rows == IMAGES
    assert [path.name for path in output.parent.iterdir()] == ["scores.parquet"]


def begun(arguments: list[str]) -> subprocess.Popen[str]:
    """A command in a process of its own, which may embed with the toy."""
    environment = {**os.environ, **with_toys()}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_runs_at_once_on_one_cache(manifest, tmp_path):
    outputs = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
    arguments = [[*command(manifest, path, tmp_path / "cache", "local", 0.1), "--limit", "96"] for path in outputs]
    runs = [begun(each) for each in arguments]
    summaries = [json.loads(run.communicate(timeout=120)[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert [summary["scored"] for summary in summaries] == [96, 96]
    one, two = (pq.read_table(path) for path in outputs)
    assert one.equals(two)
    arguments[0].append("--overwrite")
    after = begun(arguments[0])
    assert json.loads(after.communicate(timeout=60)[0])["embedded"] == 0
    assert pq.read_table(outputs[0]).equals(two)
    assert verify_cache(str(tmp_path / "cache")).ok


def test_two_runs_at_once_on_one_output(manifest, tmp_path):
    output = tmp_path / "out" / "scores.parquet"
    arguments = [*command(manifest, output, tmp_path / "cache", "local", 0.1), "--limit", "96", "-q"]
    runs = [begun(arguments) for _ in range(2)]
    said = [run.communicate(timeout=120)[1] for run in runs]
    # Who comes last is refused, or finds the output finished.
    for run, error in zip(runs, said, strict=True):
        assert run.returncode == 0 or (run.returncode == 2 and "another run is writing this output" in error)
    assert 0 in [run.returncode for run in runs], said
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    alone = batchverify.score(manifest, crop="none", cache=str(tmp_path / "cache"), limit=96, quiet=True)
    assert rows_of(output).equals(alone.to_arrow().replace_schema_metadata())


HANGING = """
import sys, time
sys.path.insert(0, {tests!r})
from functools import partial
from batchverify.engine import stages
from batchverify.scoring import embedding_run
from batchverify.cli.app import main
embedding_run.ImageRun = partial(embedding_run.ImageRun, patience=0.3)
stages.read_image = lambda *_: time.sleep(3600)
main({arguments!r})
"""


def test_threads_that_hang_do_not_keep_the_command_alive(manifest, tmp_path):
    arguments = command(manifest, tmp_path / "out.parquet", tmp_path / "cache", "local")[3:]
    script = HANGING.format(tests=str(SUPPORT), arguments=arguments)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "batchverify: no progress at" in ended.stderr
    assert list(tmp_path.glob("*out.parquet*")) == []
