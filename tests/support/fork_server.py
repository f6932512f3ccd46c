"""Commands in processes that are forked from one where everything is imported: each takes tenths of a second.

Run as a program, this is that process. It reads one order a line, forks and says the child's process number; asked
for it, it says how the child ended. The child is in all else a command of its own: it embeds with the toy.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

# Images of a chunk and of a segment: few, so that small runs have many of both.
CHUNK, SEGMENT = 16, 32


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: its exit code, -9 after SIGKILL. said: on stdout and stderr.

    calls: names of its I/O calls below its folder, if they were counted; incomplete after a kill.
    """

    code: int
    said: str
    calls: list[str]


class ForkServer:
    """Starts commands, one at a time. folder: where they say what they say."""

    def __init__(self, folder: Path) -> None:
        self._log, self._calls = folder / "said", folder / "calls"
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, arguments: Sequence[str], place: Path, *, count: bool = False, at: int = -1) -> int:
        """Start `batchverify` with its folder for temporary files in `place`; returns its process number.

        count: count its I/O calls below `place`. at: the call before which it kills itself, from 0.
        """
        self._calls.unlink(missing_ok=True)
        order = {"arguments": list(arguments), "place": str(place), "count": count, "at": at}
        return int(self._ask(json.dumps(order | {"log": str(self._log), "calls": str(self._calls)})))

    def wait(self) -> Ended:
        """Wait until the command has ended. Until this is asked, nobody else gets its process number."""
        code = int(self._ask(""))
        calls = json.loads(self._calls.read_text()) if self._calls.exists() else []
        return Ended(code, self._log.read_text(), calls)

    def close(self) -> None:
        """End the server."""
        self._process.communicate(timeout=60)

    def _ask(self, line: str) -> str:
        said = cast(IO[str], self._process.stdin)
        said.write(line + "\n")
        said.flush()
        return cast(IO[str], self._process.stdout).readline()


def serve() -> None:
    """Read orders until there are no more."""
    from functools import partial

    from batchverify.cache.embedding_cache import EmbeddingCache
    from batchverify.engine import base
    from batchverify.scoring import job

    base.CPU_CHUNK = CHUNK
    vars(job)["EmbeddingCache"] = partial(EmbeddingCache, commit_rows=SEGMENT)
    while line := sys.stdin.readline():
        order = json.loads(line)
        child = os.fork()
        if not child:
            obey(order)
        print(child, flush=True)
        sys.stdin.readline()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def obey(order: dict[str, Any]) -> None:
    """Run the command of an order in this process, and end it."""
    from failing_benches import toy_embedder
    from failing_calls import failing_calls

    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    place = Path(order["place"])
    os.environ["TMPDIR"] = str(place / "tmp")
    with toy_embedder(Path(f"{order['log']}.embedded")):
        if not order["count"]:
            code = command(order["arguments"])
        else:
            with failing_calls(place) as calls:
                calls.event = lambda: os.kill(os.getpid(), signal.SIGKILL)
                with calls.failing(order["at"], "event"):
                    code = command(order["arguments"])
            Path(order["calls"]).write_text(json.dumps([name for name, _ in calls.seen]))
    sys.stdout.flush()
    os._exit(code)


def command(arguments: list[str]) -> int:
    """Run a command; its exit code."""
    from batchverify.cli.app import main

    try:
        main(arguments)
    except SystemExit as exc:
        return int(exc.code or 0)
    except BaseException:  # noqa: BLE001  a traceback on stderr, as Python prints it
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    # What the command would import by itself, each time.
    import failing_benches  # noqa: F401
    import pandas  # noqa: F401
    from PIL import Image

    import batchverify.heads.scorer
    import batchverify.scoring.score  # noqa: F401

    Image.init()

    serve()
