"""What a look at a cache found, as records, lines for people and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class FingerprintInfo:
    """What a cache holds under one fingerprint.

    document: the settings that `id` stands for, None where `fingerprint.json` cannot be read.
    vectors: rows with a vector. keys: distinct images with one. failures: distinct images without, by reason.
    segments, bytes: of files with names of ours. oldest, newest: when they were written, UTC.
    damaged: paths of segments that cannot be read. foreign: paths of what is no part of a cache.
    """

    id: str
    document: Mapping[str, Any] | None
    vectors: int = 0
    keys: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    segments: int = 0
    bytes: int = 0
    oldest: datetime | None = None
    newest: datetime | None = None
    damaged: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people: the fingerprint, its settings, its contents, and what does not belong."""
        failures = ", ".join(f"{count:,} {reason}" for reason, count in self.failures.items())
        span = (
            f", written {self.oldest:%Y-%m-%d %H:%M} to {self.newest:%Y-%m-%d %H:%M} UTC"
            if self.oldest
            else ""
        )
        return [
            f"{self.id}  {_settings(self.document)}",
            f"  images with a vector {self.keys:,} (rows {self.vectors:,}), without: {failures or 'none'}",
            f"  segments {self.segments:,}, {megabytes(self.bytes)}{span}",
            *(f"  damaged: {path} (`batchverify cache verify` says why)" for path in self.damaged),
            *(f"  not part of a cache: {path}" for path in self.foreign),
        ]

    def to_json(self) -> dict[str, Any]:
        """The same for machines; times in ISO 8601."""
        times = {"oldest": self.oldest, "newest": self.newest}
        return asdict(self) | {name: each.isoformat() if each else None for name, each in times.items()}


@dataclass(frozen=True)
class Problem:
    """Something wrong with a cache: a segment or a `fingerprint.json`, by its path, and what."""

    path: str
    what: str


@dataclass(frozen=True)
class CacheReport:
    """What `verify_cache` read and found. quarantined: where the bad segments lie now."""

    fingerprints: int
    segments: int
    rows: int
    bytes: int
    problems: tuple[Problem, ...]
    foreign: tuple[str, ...]
    quarantined: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; foreign files are not the cache's fault."""
        return not self.problems

    def lines(self) -> list[str]:
        """For people: every finding, then the sum."""
        read = f"{self.fingerprints:,} fingerprints, {self.segments:,} segments, {self.rows:,} rows"
        found = f"{len(self.problems):,} problems" if self.problems else "nothing wrong"
        return [
            *(f"{problem.path}: {problem.what}" for problem in self.problems),
            *(f"moved to {path}" for path in self.quarantined),
            *(f"not part of a cache: {path}" for path in self.foreign),
            f"{read}, {megabytes(self.bytes)} read: {found}",
        ]

    def to_json(self) -> dict[str, Any]:
        """The same for machines."""
        return {"ok": self.ok} | asdict(self)


def megabytes(size: int) -> str:
    """A size for people: `0.3 MB`."""
    return f"{size / 1e6:,.1f} MB"


def _settings(document: Mapping[str, Any] | None) -> str:
    if document is None:
        return "settings unknown: fingerprint.json cannot be read"
    crop = document.get("crop")
    crop = crop if isinstance(crop, Mapping) else {}
    margin = f", margin {crop['margin']}" if "margin" in crop else ""
    backbone = str(document.get("backbone"))[:12]
    return f"backbone {backbone}, crop {crop.get('mode')}{margin}, views {document.get('tta')}"
