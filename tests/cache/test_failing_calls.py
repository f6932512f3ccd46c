"""Every I/O call of the `cache` commands fails once: an error of one line or a report, and nothing is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from cache_samples import FINGERPRINT, entry, failure, flip, key, segments, values, write
from click.testing import Result
from failing_calls import DISK, Bench, fail_every_call, failing_calls

from batchverify.cache.embedding_cache import EmbeddingCache


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


class RewritingBench(Bench):
    """`forget` or `compact` on a cache of five small segments."""

    def __init__(self, folder: Path, *command: str) -> None:
        super().__init__(folder)
        self.command = command

    def furnish(self, place: Path) -> None:
        for number in range(4):
            write(place / "cache", [entry(number), entry(number + 10)])
        write(place / "cache", [failure(20)])

    def arguments(self, place: Path) -> list[str]:
        return ["cache", *self.command, "--cache", str(place / "cache"), "--json"]

    def outcome(self, place: Path, result: Result) -> Any:
        """What the cache answers, and in how many files a forgotten image is named.

        A rewritten segment may lie beside the old one: a row is there twice until the next compaction.
        """
        numbers = (*range(4), *range(10, 14), 20)
        answers = EmbeddingCache(str(place / "cache"), FINGERPRINT).get_many([key(each) for each in numbers])
        named = [path for path in place.rglob("*") if path.is_file() and key(1) in path.read_bytes()]
        left = len(segments(place / "cache")) if "compact" in self.command else 0
        return result.exit_code, values(answers), left, len(named)


@pytest.mark.parametrize(
    "command", [("compact",), ("forget", "--key", key(1).hex())], ids=lambda each: each[0]
)
def test_any_call_of_a_rewriting_command_may_fail(tmp_path: Path, command: tuple[str, ...]) -> None:
    with failing_calls(tmp_path) as calls:
        findings = fail_every_call(RewritingBench(tmp_path, *command), calls, DISK, step=3)
    print(findings)
    assert not findings.wrong, "\n".join(findings.wrong)
