"""A cluster of several nodes as separate processes: a command submitted, nodes killed and joined on the way."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray_nodes import RayNodes
from repository import REPOSITORY

import batchverify

pytestmark = pytest.mark.ray
TOKEN = "a token of this test alone"
SAMPLES = REPOSITORY / "sample_manifests"
SHIPPED = "0.0.0+shipped"


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayNodes]:
    """A head that does no work and two nodes with one CPU each."""
    nodes = RayNodes(TOKEN)
    try:
        nodes.start("head", 0)
        wait_for(lambda: answers(nodes), 60)
        assert "does not exist" in submit(nodes, "--status", "nobody").stderr
        nodes.start("second", 1)
        nodes.start("third", 1)
        yield nodes
    finally:
        nodes.close()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """A copy of the package that differs from what the nodes could import by themselves."""
    folder = tmp_path_factory.mktemp("shipped")
    shutil.copytree(REPOSITORY / "batchverify", folder / "batchverify", ignore=shutil.ignore_patterns("__pycache__"))
    version = folder / "batchverify" / "version.py"
    version.write_text(version.read_text().replace(batchverify.__version__, SHIPPED))
    return folder


def wait_for(condition: Callable[[], object], seconds: float = 60) -> object:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def answers(nodes: RayNodes) -> bool:
    """Whether the job server knows that there is no such job. A command that asks takes a second each time."""
    with closing(HTTPConnection("127.0.0.1", nodes.dashboard, timeout=10)) as server:
        try:
            server.request("GET", "/api/jobs/nobody", headers={"Authorization": f"Bearer {TOKEN}"})
            return server.getresponse().status == 404
        except (OSError, HTTPException):
            return False


def start(nodes: RayNodes, *arguments: str, package: Path = REPOSITORY, **environment: str) -> subprocess.Popen:
    """`batchverify submit` with the package that lies in `package`."""
    settings = {"RAY_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(package), **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "batchverify.cli", "submit", "--address", nodes.url, *arguments],
        env=nodes.environment(**settings),
        cwd=nodes.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def submit(nodes: RayNodes, *arguments: str, **options) -> subprocess.CompletedProcess:
    process = start(nodes, *arguments, **options)
    try:
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def embedding_node(nodes: RayNodes, names: tuple[str, ...]) -> str:
    """The node whose actor is embedding in this moment; empty for none. Ray writes that into its title."""
    for name in names:
        for process in nodes.processes(name):
            with suppress(OSError):
                if b"PairWorker.embed" in Path(f"/proc/{process}/cmdline").read_bytes():
                    return name
    return ""


@pytest.mark.parametrize("token", ["", "another"])
def test_a_token_is_asked_for(cluster, tmp_path, token):
    done = submit(cluster, "--status", "nobody", RAY_AUTH_TOKEN=token, HOME=str(tmp_path))
    assert done.returncode == 2
    assert "the cluster requires a token, and it is missing or wrong: set RAY_AUTH_TOKEN to the token" in done.stderr


def test_the_token_in_rays_file_opens_a_cluster_of_this_machine(cluster, tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    done = submit(cluster, "--status", "nobody", RAY_AUTH_TOKEN="", HOME=str(tmp_path))
    assert "Job nobody does not exist" in done.stderr


def test_a_job_outlives_its_nodes_and_gives_what_a_local_run_gives(cluster, shipped, tmp_path):
    output, cache = tmp_path / "scores.parquet", tmp_path / "cache"
    command = ["score", "faces.csv", "-o", str(output), "--json"]
    process = start(
        cluster, "--working-dir", str(SAMPLES), "--env", "BATCHVERIFY_CACHE", "--", *command,
        package=shipped, BATCHVERIFY_CACHE=str(cache),
    )  # fmt: skip
    try:
        first = wait_for(lambda: embedding_node(cluster, ("second", "third")))
        assert cluster.kill(first)
        other = wait_for(lambda: embedding_node(cluster, tuple({"second", "third"} - {first})))
        assert cluster.kill(other)
        cluster.start("fourth", 1)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert err.count("is gone: its tasks are repeated") == 2
    summary = json.loads(out)
    assert (summary["embedded"], summary["failed"], summary["failed_rows"]) == (24, 0, 0)
    assert TOKEN not in out + err
    assert str(cache) not in err
    table = pq.read_table(output)
    assert json.loads(pq.read_metadata(output).metadata[b"batchverify"])["version"] == SHIPPED
    local = batchverify.score(SAMPLES / "faces.csv", no_cache=True, quiet=True).to_arrow()
    assert table.equals(local)
    assert list(cache.rglob("*.parquet"))
    assert not list(cache.rglob(".batchverify-*"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_exit_code_is_the_jobs(cluster, tmp_path):
    faces, one, two = str(SAMPLES / "faces.csv"), tmp_path / "one.parquet", tmp_path / "two.parquet"
    # The same words lead every process to its own folder, and every node was started in one of its own.
    own = "/proc/self/cwd"
    unseen = r"node \S+ \(\w+\) does not see this folder as the driver does; give a folder that all nodes mount"
    cases = [
        (["/absent/pairs.csv", "-o", str(one), "--no-cache"], 2, "/absent/pairs.csv"),
        (
            [faces, "-o", str(one), "--no-cache", "--image-root", "/absent", "--engine", "local"],
            3,
            "nothing could be scored",
        ),
        (
            [faces, "-o", str(two), "--cache", f"{own}/cache"],
            2,
            f"batchverify: --cache {own}/cache: {unseen}",
        ),
        ([faces, "-o", f"{own}/out/scores", "--no-cache"], 2, f"batchverify: {own}/out/scores: {unseen}"),
    ]
    started = [start(cluster, "--in-image", "--", "score", *arguments) for arguments, _, _ in cases]
    for process, (arguments, code, message) in zip(started, cases, strict=True):
        said = process.communicate(timeout=90)[1]
        assert process.returncode == code, said
        assert re.search(message, said), said
        assert f"failed with exit code {code}" in said
        assert (f"{faces} exists on this machine: can the nodes see it too?" in said) == (arguments[0] == faces)
    assert not list(cluster.folder.rglob(".batchverify-*"))


def test_ctrl_c_leaves_the_job_which_stop_ends(cluster, tmp_path):
    command = ["score", str(SAMPLES / "faces.csv"), "-o", str(tmp_path / "out.parquet"), "--no-cache"]
    process = start(cluster, "--in-image", "--", *command, "--device", "cuda")
    said = ""
    while "waiting for a node with a GPU" not in said:
        said += process.stderr.readline()
        assert process.poll() is None, said
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 130, rest
    (job,) = {word for word in rest.split() if word.startswith("raysubmit_")}
    assert f"--stop {job}" in rest
    assert submit(cluster, "--status", job).stdout.startswith(f"job {job}: running")
    assert submit(cluster, "--stop", job).stdout.startswith(f"job {job}: stopped")
    done = submit(cluster, "--follow", job)
    assert done.returncode == 130
    assert "batchverify: interrupted" in done.stderr
