"""Every I/O call of the `cache` commands fails once: an error of one line or a report, and nothing is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from cache_samples import entry, failure, flip, segments, write
from click.testing import Result
from failing_calls import DISK, Bench, fail_every_call, failing_calls


class CacheBench(Bench):
    """A `cache` command on a cache of three segments, one of which is damaged."""

    def __init__(self, folder: Path, *command: str) -> None:
        super().__init__(folder)
        self.command = command

    def furnish(self, place: Path) -> None:
        cache = place / "cache"
        write(cache, [entry(1), entry(2), failure(3)])
        [damaged] = write(cache, [entry(4)])
        flip(damaged, 200)

    def arguments(self, place: Path) -> list[str]:
        return ["cache", *self.command, "--cache", str(place / "cache"), "--json"]

    def outcome(self, place: Path, result: Result) -> Any:
        """How many segments lie where, and the figures of the report."""
        kept, moved = len(segments(place)), len(list(place.glob("cache/v1/*/quarantine/*")))
        if "--quarantine" in self.command:
            return len(segments(place / "cache")), moved
        said = json.loads(result.stdout) if result.stdout.startswith("{") else {}
        report = said.get("fingerprints", [said])
        report = report if isinstance(report, list) else [said]
        keys = ("keys", "vectors", "segments", "rows", "ok")
        return result.exit_code, kept, [[each.get(key) for key in keys] for each in report]

    def excuses(self, place: Path, hit: tuple[str, str], result: Result, expected: Any) -> bool:
        """A segment that cannot be read is named."""
        return hit[1] in result.stdout


@pytest.mark.parametrize("command", [("info",), ("verify",), ("verify", "--quarantine")], ids=" ".join)
def test_any_call_of_a_cache_command_may_fail(tmp_path: Path, command: tuple[str, ...]) -> None:
    with failing_calls(tmp_path) as calls:
        findings = fail_every_call(CacheBench(tmp_path, *command), calls, DISK)
    print(findings)
    assert not findings.wrong, "\n".join(findings.wrong)
