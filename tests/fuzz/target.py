"""A fuzz target: a reader of files that others wrote, which may only answer or raise what it documents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path


class Target(ABC):
    """A reader. folder: for its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def seeds(self) -> list[bytes]:
        """Inputs that are right, from which the fuzzer starts."""

    @abstractmethod
    def run(self, data: bytes) -> None:
        """Read an input. Raises for what a reader may not do."""


def require(holds: bool, what: str) -> None:
    """Raise `AssertionError` for a broken promise."""
    if not holds:
        raise AssertionError(what)
