"""Where a cluster's address comes from, and addresses at which no Ray answers: one line, soon, and Ctrl-C works."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from ray_nodes import free_port
from repository import REPOSITORY

from batchverify.cli.app import main
from batchverify.engine.ray.address import Address, current_cluster
from batchverify.engine.ray.start import start_ray
from batchverify.errors import BatchverifyError, UsageError

FACES = str(REPOSITORY / "sample_manifests" / "faces.csv")
# The first bytes of a gRPC server: a SETTINGS frame.
SETTINGS = b"\0\0\0\4\0\0\0\0\0"


@pytest.mark.parametrize(
    ("given", "named", "job", "found"),
    [
        (None, None, None, None),
        (None, "", None, None),
        (None, "local", None, None),
        (None, "h:1", None, "$RAY_ADDRESS h:1"),
        (None, "auto", None, "$RAY_ADDRESS auto"),
        (None, "h:1", "01", "$RAY_ADDRESS h:1"),
        (None, None, "01", "$RAY_JOB_ID auto"),
        ("g:2", "h:1", "01", "--address g:2"),
        ("auto", None, None, "--address auto"),
        # As Ray does.
        ("auto", "h:1", None, "$RAY_ADDRESS h:1"),
    ],
)
def test_option_variable_and_job_name_the_cluster_in_this_order(monkeypatch, given, named, job, found):
    for name, value in (("RAY_ADDRESS", named), ("RAY_JOB_ID", job)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    address = Address.find(given)
    assert (str(address) if address else None) == found


@contextmanager
def server(answer: bytes | None) -> Iterator[int]:
    """A port of this machine on which everybody gets this answer; None for a program that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                kept.append(connection)
                if answer is not None:
                    connection.recv(100)
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()


def test_a_port_where_nobody_listens_and_a_name_that_nobody_has():
    dead = f"127.0.0.1:{free_port()}"
    with pytest.raises(BatchverifyError, match=f"^.RAY_ADDRESS {dead}: no Ray cluster .*: Connection refused$"):
        Address(dead, "$RAY_ADDRESS").require_answer()
    with pytest.raises(BatchverifyError, match=r"^--address no.such.host.invalid:6379: no Ray cluster answers"):
        Address("no.such.host.invalid:6379").require_answer()
    with pytest.raises(BatchverifyError, match="no Ray cluster answers there"):
        Address(f"{'x' * 70}.invalid:6379").require_answer()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "timed out|nothing came within 0.5 seconds"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "another program does .*6379"),
        (b"", "another program does|reset"),
        (SETTINGS[:3], "another program does|reset"),
    ],
)
def test_a_port_where_another_program_listens(answer, message):
    with server(answer) as port, pytest.raises(BatchverifyError, match=message):
        Address(f"127.0.0.1:{port}").require_answer(seconds=0.5)


def test_a_port_where_grpc_answers():
    with server(SETTINGS) as port:
        for host in ("127.0.0.1", "localhost"):
            Address(f"{host}:{port}").require_answer()


@pytest.mark.parametrize("text", ["head", "head:", ":6379", "head:0", "head:70000", "http://head:8265", "a b:1"])
def test_what_is_no_address_is_a_usage_error(text):
    with pytest.raises(UsageError, match="a cluster's address is auto or HOST:PORT"):
        Address(text).require_answer()


def test_ray_client_is_refused_and_submit_named():
    with pytest.raises(UsageError, match="batchverify submit --address http://HEAD:8265 -- "):
        start_ray(Address("ray://head:10001"), None, verbose=False)


def test_auto_is_checked_where_ray_has_written_it_down_and_no_node_runs_here(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    processes = tmp_path / "proc"
    (processes / "17").mkdir(parents=True)
    (processes / "17" / "comm").write_text("bash\n")
    Address("auto").require_answer(processes=processes)
    current_cluster().parent.mkdir()
    dead = f"127.0.0.1:{free_port()}"
    current_cluster().write_text(f"{dead}\n")
    with pytest.raises(BatchverifyError, match=f"^--address auto: {dead} .from {tmp_path}/ray/ray_current_cluster; "):
        Address("auto").require_answer(processes=processes)
    (processes / "17" / "comm").write_text("raylet\n")
    Address("auto").require_answer(processes=processes)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 1, "no Ray cluster answers there: Connection refused"),
        (["--num-cpus", "1"], 2, "--num-cpus is for a local Ray; the cluster of $RAY_ADDRESS"),
    ],
)
def test_a_forgotten_variable_is_one_line(tmp_path, options, code, message):
    dead, output = f"127.0.0.1:{free_port()}", tmp_path / "o.parquet"
    runner = CliRunner(env={"RAY_ADDRESS": dead, "BATCHVERIFY_CACHE": str(tmp_path / "cache")})
    result = runner.invoke(main, ["score", FACES, "-o", str(output), *options], prog_name="batchverify")
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1), result.stderr
    assert message in result.stderr and f"$RAY_ADDRESS {dead}" in result.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]


def test_a_local_run_takes_its_cpus_whatever_the_variable_says(cache, tmp_path):
    runner = CliRunner(env={"RAY_ADDRESS": f"127.0.0.1:{free_port()}"})
    options = ["--engine", "local", "--num-cpus", "1", "--cache", cache, "--json"]
    result = runner.invoke(main, ["score", FACES, "-o", str(tmp_path / "o.parquet"), *options])
    assert json.loads(result.stdout)["engine"] == "local", result.stderr


def test_sigterm_ends_the_wait(tmp_path):
    with server(None) as port:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "batchverify.cli",
                "score",
                FACES,
                "-o",
                str(tmp_path / "o.parquet"),
                "--no-cache",
            ],
            env={**os.environ, "RAY_ADDRESS": f"127.0.0.1:{port}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_connection(port)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted" in said and "Traceback" not in said


def wait_for_connection(port: int) -> None:
    """Wait until somebody has connected to a port of this machine, by the kernel's own list."""
    wanted = f"0100007F:{port:04X}"
    while not any(
        fields[2] == wanted and fields[3] == "01"
        for fields in map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:])
    ):
        threading.Event().wait(0.05)
