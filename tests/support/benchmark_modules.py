"""Benchmarks as modules. They are scripts beside each other, which a program starts from their own folder."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import pytest
from repository import REPOSITORY


@contextmanager
def benchmark_module(name: str) -> Iterator[ModuleType]:
    """A benchmark, imported; afterwards neither it nor `results` is left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        yield import_module(name)
    for each in (name, "results"):
        sys.modules.pop(each, None)
