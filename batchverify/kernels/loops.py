"""Loops over pixels, boxes and pairs that no library provides. Other rooms call them only through this module.

Each loop exists twice, in numpy (`plain_loops`) and compiled by numba (`numba_loops`), with the same bits as results.
A process starts with numpy: importing numba takes half a second, and compiling all loops for the first time five.
After `PATIENCE` seconds in numpy loops, or where much work is announced (`prepare`), numba is imported beside them,
and then takes over. `BATCHVERIFY_KERNELS` is `auto` (this), `on` (numba at the start) or `off` (numpy only). If numba
cannot be imported, numpy is used. A compiled loop that fails does not end the run: it is compiled once more, without
numba's cache, and if that fails too, numpy replaces it in this process.

Arrays must be C-contiguous, but for `distances`; the loops check neither shapes nor bounds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from threading import RLock, Thread, main_thread
from types import ModuleType
from typing import Any

import numpy as np

from batchverify.errors import UsageError
from batchverify.kernels import plain_loops

VARIABLE = "BATCHVERIFY_KERNELS"
# Constants of `distances`.
EPSILON, LANES = plain_loops.EPSILON, plain_loops.LANES

log = logging.getLogger(__name__)

# Seconds in numpy loops after which starting numba is worth it.
PATIENCE = 0.3


def integrate(image: np.ndarray, sums: np.ndarray) -> None:
    """Fill a summed-area table. image: (H, W, 3) uint8; sums: (H + 1, W + 1, 4) int32, modulo 2**32.

    The first row, the first column and the fourth channel become zero.
    """
    door.run("integrate", image, sums)


def resample(
    sums: np.ndarray, regions: np.ndarray, targets: np.ndarray, reciprocal: bool, patches: np.ndarray
) -> None:
    """Scale regions of an image as torch's `interpolate(mode="area")` does, and normalise to -1..1.

    sums: from `integrate`; the sum over one output pixel must be below 2**31. regions: (K, 4) int64 left, top, right,
    bottom, half open. targets: (K, 5) int64 patch, top, left, height, width. reciprocal: multiply by one over the
    area, which rounds differently from a division. patches: (N, h, w, 3) float32, filled at the targets.
    """
    door.run("resample", sums, regions, targets, reciprocal, patches)


def suppress(boxes: np.ndarray, order: np.ndarray, threshold: float) -> np.ndarray:
    """Non-maximum suppression: the (N,) int64 indices of the boxes that remain, in order.

    boxes: (K, 4) float32 x0 y0 x1 y1. order: (K,) int64, best first. threshold: a box whose intersection over union
    with a better one is larger is dropped.
    """
    return door.run("suppress", boxes, order, threshold)


def warp(image: np.ndarray, affine: np.ndarray, reach: float, crop: np.ndarray) -> None:
    """Fill a crop with an image that is moved, turned and scaled; what lies outside of the image is black.

    image: (H, W, 3) uint8. affine: (2, 3) float64, maps a column and a row of the crop to x and y in the image, where
    whole numbers are the centres of pixels. reach: half the width of the triangle that pixels are weighted by, 1 for
    bilinear interpolation, more to take the mean of what shrinks. crop: (h, w, 3) uint8, filled.
    """
    door.run("warp", image, affine, reach, crop)


def distances(first: np.ndarray, second: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chi-square distance and dot product of rows `a` of `first` and `b` of `second`: (N,) float32 each.

    first, second: (M, F) and (K, F) float16 or float32. a, b: (N,) integers. The distance is the sum of
    (x - y)² / (|x| + |y| + `EPSILON`). The bits are the same on every machine, for both dtypes and for (b, a).
    Raises `ValueError` for other shapes and `IndexError` for rows that do not exist, which the loop does not check.
    """
    a, b = (np.ascontiguousarray(rows).astype(np.int64, casting="same_kind", copy=False) for rows in (a, b))
    if len(a) != len(b) or first.shape[1] != second.shape[1]:
        raise ValueError(f"rows {len(a)} and {len(b)} of matrices {first.shape} and {second.shape}")
    for matrix, rows in ((first, a), (second, b)):
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(matrix):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(matrix)}")
    if not first.dtype == second.dtype == np.float16:
        first, second = first.astype(np.float32, copy=False), second.astype(np.float32, copy=False)
    chi, dots = np.empty(len(a), np.float32), np.empty(len(a), np.float32)
    door.run("distances", _bits(first), _bits(second), a, b, chi, dots)
    return chi, dots


def prepare(*names: str) -> None:
    """Start numba now, in a thread: loops of these names have much to do soon. Numpy serves until it is ready."""
    door.prepare(*names)


def _bits(rows: np.ndarray) -> np.ndarray:
    """(M, F) float16 or float32 to (M, F') int16 or int32 of the same bits, F' a multiple of `LANES`."""
    missing = -rows.shape[1] % LANES
    padded = np.pad(rows, ((0, 0), (0, missing))) if missing else np.ascontiguousarray(rows)
    return padded.view(np.int16 if rows.dtype == np.float16 else np.int32)


def _mode() -> str:
    """The value of `BATCHVERIFY_KERNELS`; `UsageError` for an unknown one."""
    value = os.environ.get(VARIABLE) or "auto"
    if value not in ("auto", "on", "off"):
        raise UsageError(f"{VARIABLE} must be auto, on or off, got {value!r}")
    return value


def _compiled_loops() -> ModuleType:
    """The compiled loops; numpy's, with a warning, if numba cannot be imported."""
    # With colours in its messages, numba puts other objects in the places of stdout and stderr for a moment, and then
    # back what stood there before: in a thread that undoes what a command has put there meanwhile.
    os.environ.setdefault("NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING", "1")
    try:
        from batchverify.kernels import numba_loops
    except Exception as exc:  # noqa: BLE001  it fails in many ways if numpy is too new
        log.warning("numba cannot be imported (%s): numpy is used instead, which is slower", _text(exc))
        return plain_loops
    return numba_loops


def _text(exc: Exception) -> str:
    """Type and first line: numba's messages are pages long."""
    return f"{type(exc).__name__}: {str(exc).partition(chr(10))[0]}"


@dataclass
class Door:
    """Runs loops by name, in numpy or compiled, as a process goes on. Any number of threads may use it.

    mode: gives the value of `BATCHVERIFY_KERNELS`. compiled: imports the compiled loops. Both are called once, when
    they are needed. patience: seconds in numpy loops before numba is imported. chosen: the function that
    runs each loop, once there is a choice. spent: seconds in numpy loops so far; threads may overwrite each other's
    additions, which does no harm.
    """

    mode: Callable[[], str] = _mode
    compiled: Callable[[], Any] = _compiled_loops
    patience: float = PATIENCE
    chosen: dict[str, Callable[..., Any]] = field(default_factory=dict)
    spent: float = 0.0
    _lock: Any = field(default_factory=RLock)
    _starting: Thread | None = None
    _is_imported: bool = False

    @cached_property
    def _known_mode(self) -> str:
        return self.mode()

    @cached_property
    def _loops(self) -> Any:
        """The module whose loops are used after the first seconds."""
        return plain_loops if self._known_mode == "off" else self.compiled()

    def run(self, name: str, *arguments: Any) -> Any:
        """Call a loop."""
        loop = self.chosen.get(name) or self._choose(name)
        if loop is None:
            started = time.perf_counter()
            result = getattr(plain_loops, name)(*arguments)
            self.spent += time.perf_counter() - started
            return result
        try:
            return loop(*arguments)
        except MemoryError:
            raise  # the loop is not to blame
        except Exception as exc:
            if loop is getattr(plain_loops, name):
                raise
            return self._run_again(name, loop, exc, arguments)

    def _choose(self, name: str) -> Callable[..., Any] | None:
        """The function that runs a loop from now on; None while it is open."""
        if self._known_mode == "auto" and not self._is_ready(name):
            return None
        with self._lock:
            return self.chosen.setdefault(name, getattr(self._loops, name))

    def prepare(self, *names: str) -> None:
        """See `loops.prepare`."""
        if names and self._known_mode == "auto":
            self._begin(names)

    def _is_ready(self, name: str) -> bool:
        """Whether the compiled loops are imported. That begins, with this loop, once patience ends.

        A process that is forked meanwhile lacks the thread, and would wait for ever if it imported numba itself: it
        stays with numpy.
        """
        if self.spent >= self.patience:
            self._begin((name,))
        return self._is_imported

    def _begin(self, names: tuple[str, ...]) -> None:
        """Import the compiled loops in a thread, unless that has begun."""
        if self._starting is not None:
            return
        with self._lock:
            if self._starting is None:
                self._starting = Thread(target=self._start, args=names, name="numba")
                try:
                    self._starting.start()
                except RuntimeError:  # no thread can be started any more
                    self._start(*names)

    def _start(self, *names: str) -> None:
        """Import the compiled loops, and compile these or load their machine code, while the program runs."""
        loops = self._loops
        for name in names if loops is not plain_loops else ():
            if not main_thread().is_alive():
                break
            with contextlib.suppress(Exception):  # its first call fails, too, and knows what to do
                loops.try_out(name)
        self._is_imported = True

    def _run_again(self, name: str, failed: Callable[..., Any], error: Exception, arguments: tuple[Any, ...]) -> Any:
        """Replace a compiled loop that failed, for the rest of this process, and call the replacement."""
        with self._lock:
            if self.chosen[name] is not failed:  # another thread has replaced it
                return self.run(name, *arguments)
            try:
                loop = self._loops.compiled_anew(failed)
                result, outcome = loop(*arguments), "it was compiled again"
            except MemoryError:
                raise
            except Exception as exc:  # noqa: BLE001  numba raises many types
                loop = getattr(plain_loops, name)
                result, outcome = loop(*arguments), f"numpy is used instead ({_text(exc)})"
            self.chosen[name] = loop
        log.warning("the compiled loop %s failed (%s): %s", name, _text(error), outcome)
        return result


# That of this process.
door = Door()
