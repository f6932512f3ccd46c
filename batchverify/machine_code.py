"""Loops compiled by numba, and where their machine code is kept: neither damage to it nor a full disk ends a run."""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from llvmlite import binding
from numba import njit
from numba.core import config
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher

log = logging.getLogger(__name__)

Loop = TypeVar("Loop", bound=Callable[..., Any])

# Division by zero follows numpy and nothing is reordered: the same bits on every machine, but for what `tiles.py` and
# `grids.py` sum up, which CPUs without fused multiplication round once more.
_SETTINGS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
# Modules that become part of loops in others.
_SHARED = ("instructions.py", "tiles.py", "grids.py", "vectors.py")
# What a file that was cut off, or that cannot be written, raises.
_BROKEN = (OSError, EOFError, pickle.UnpicklingError)


def compiled(loop: Loop) -> Loop:
    """Compile at the first call and keep the machine code beside the module, or in the user's cache folder."""
    if loop.__closure__:
        # A name of its own for what it closes over: numba numbers symbols of one name by the order in which a
        # process compiles them, and of two with one number the first that is loaded would stand for both.
        digest = hashlib.sha256(repr(_closed_over(loop)).encode()).hexdigest()[:8]
        loop.__qualname__ = f"{loop.__qualname__}.{digest}"
    dispatcher = njit(**_SETTINGS)(loop)
    try:
        dispatcher._cache = MachineCode(loop)
    except RuntimeError:
        # Neither place can be written: it is compiled in every process.
        log.debug("no folder for machine code")
    return dispatcher


class MachineCode(FunctionCache):
    """numba's cache of one loop, beside its module or in the user's cache folder.

    Files that cannot be read are dropped and the loop is compiled again; what cannot be written is not kept.
    Each kind of CPU has files of its own: in numba's the index knows the CPU, the code does not, and machines
    of two kinds that compile at once in one folder may leave one the other's instructions. Nor does the index
    know the modules of `_SHARED`, which become part of loops elsewhere.
    Raises `RuntimeError` where no folder can be written.
    """

    def __init__(self, loop: Callable[..., Any]) -> None:
        super().__init__(loop)
        name = f"{self._impl.filename_base}.{_kind()}"
        self._cache_file = IndexDataCacheFile(self._cache_path, name, self._impl.locator.get_source_stamp())

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        """As numba's, but loops that a loop closes over are known by what they are, not by when they were made."""
        closed = repr(_closed_over(self._py_func)).encode()
        bytecode = self._py_func.__code__.co_code
        return sig, codegen.magic_tuple(), hashlib.sha256(bytecode + closed).hexdigest()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The code for a signature; None where there is none that can be read."""
        try:
            return super().load_overload(sig, target_context)
        except _BROKEN as exc:
            log.debug("%s: machine code dropped: %s", self._cache_path, exc)
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the code for a signature, where it can be."""
        try:
            super().save_overload(sig, data)
        except _BROKEN as exc:
            log.debug("%s: machine code not kept: %s", self._cache_path, exc)


def _closed_over(loop: Callable[..., Any]) -> list[Any]:
    """The numbers that a loop closes over, and the loops (of the same module) with theirs; no arrays."""
    values = [cell.cell_contents for cell in loop.__closure__ or ()]
    return [
        (each.py_func.__qualname__, _closed_over(each.py_func)) if isinstance(each, Dispatcher) else each
        for each in values
    ]


@cache
def _kind() -> str:
    """A short name of this kind of CPU and of the instructions that loops are made of."""
    told = (vars(config)[name] for name in ("CPU_NAME", "CPU_FEATURES", "ENABLE_AVX"))
    cpu = f"{binding.get_host_cpu_name()} {binding.get_host_cpu_features().flatten()} {list(told)}"
    code = [Path(__file__).with_name(name).read_bytes() for name in _SHARED]
    return hashlib.sha256(cpu.encode() + b"".join(code)).hexdigest()[:8]
