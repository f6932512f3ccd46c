"""A Ray cluster of several nodes on this machine, each with processes and an object store of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))
STORE_BYTES = 200_000_000
# How long the head of a cluster may take to answer.
HEAD_SECONDS = 60
# Ray's usual patience with a silent node is most of a minute.
QUICK = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    # Ray's own 15 has workers wait for all other processes of a busy machine.
    "RAY_worker_niceness": "0",
}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_of(session: int, marker: str) -> list[int]:
    """The processes of a session, and those that were started with `marker` in their environment.

    Ray's workers write their titles over their environment; jobs have sessions of their own.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                process = int(entry.name)
                if os.getsid(process) == session or marker.encode() in (entry / "environ").read_bytes():
                    found.append(process)
    return found


class RayNodes:
    """`ray start` once for the head and once for each further node; all processes are ended by their ids.

    token: what the cluster asks its clients for.
    """

    def __init__(self, token: str) -> None:
        # Short: paths of sockets have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="bv", dir="/tmp"))
        self._marker = f"BATCHVERIFY_TEST_NODE={uuid.uuid4().hex}"
        self.gcs, self.dashboard = free_port(), free_port()
        self.token = token
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        """Of the job server."""
        return f"http://127.0.0.1:{self.dashboard}"

    def environment(self, **more: str) -> dict[str, str]:
        """That of a client: without the variables that this process may have for another Ray."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**kept, "OMP_NUM_THREADS": "1", **more}

    def start(self, name: str, cpus: int, *options: str, **environment: str) -> None:
        """Start a node, the first as head. environment: variables of its processes, also in place of `QUICK`."""
        place = [f"--address=127.0.0.1:{self.gcs}"]
        if not self._started:
            place = [
                "--head",
                f"--port={self.gcs}",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={self.dashboard}",
                f"--ray-client-server-port={free_port()}",
            ]
        common = [
            "--block",
            # Two nodes of one folder that start together would take the same sockets.
            f"--temp-dir={self.folder / name}",
            "--node-ip-address=127.0.0.1",
            f"--num-cpus={cpus}",
            "--num-gpus=0",
            f"--object-store-memory={STORE_BYTES}",
            "--dashboard-agent-listen-port=0",
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--disable-usage-stats",
        ]
        place_of_node = self.folder / name
        place_of_node.mkdir()
        marker, _, value = self._mark(name).partition("=")
        settings = {
            **QUICK,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}",
            marker: value,
        }
        log = (self.folder / f"{name}.log").open("wb")
        with log:
            process = subprocess.Popen(
                [RAY, "start", *place, *common, *options],
                env=self.environment(**{**settings, **environment}),
                cwd=place_of_node,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        is_head = not self._started
        self._started[name] = process
        if is_head:
            self._wait_for_head(process)

    def _wait_for_head(self, process: subprocess.Popen[bytes]) -> None:
        """Until the head answers, which takes long on a busy machine: a driver that comes earlier gives up."""
        deadline = time.monotonic() + HEAD_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.gcs), timeout=1):
                return
            time.sleep(0.1)

    def processes(self, name: str) -> list[int]:
        """Those of a node."""
        return processes_of(self._started[name].pid, self._mark(name))

    def kill(self, name: str) -> int:
        """Kill every process of a node at once, as when its machine goes; returns how many there were."""
        killed = self.processes(name)
        for process in killed:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return len(killed)

    def close(self) -> None:
        """End everything that was started, jobs too."""
        for name, process in self._started.items():
            deadline = time.monotonic() + 10
            while self.kill(name) and time.monotonic() < deadline:
                process.poll()
                time.sleep(0.1)
            process.wait(timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _mark(self, name: str) -> str:
        """What stands in the environment of every process that a node starts."""
        return f"{self._marker}-{name}"
