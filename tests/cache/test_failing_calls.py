"""Every I/O call of the `cache` commands fails once: an error of one line or a report, and nothing is lost."""

from pathlib import Path

import pytest
from failing_calls import DISK, fail_every_call, failing_calls
from failing_commands import COMMANDS


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.startswith("cache ")])
def test_any_call_of_a_cache_command_may_fail(tmp_path: Path, name: str) -> None:
    step = 3 if name in ("cache compact", "cache forget") else 1
    with failing_calls(tmp_path) as calls:
        findings = fail_every_call(COMMANDS[name](tmp_path), calls, DISK, step=step)
    print(findings)
    assert not findings.wrong, "\n".join(findings.wrong)
