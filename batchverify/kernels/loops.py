"""Loops over pixels, boxes and pairs that no library has: the one door to them.

Each has a twin in numpy (`plain_loops`) that gives the same bits. A process begins with the twins:
importing numba takes a second, compiling all loops for the first time five. Once the twins have taken `PATIENCE`
seconds, the loops in numba (`numba_loops`) take over. `BATCHVERIFY_KERNELS` is `auto` (this), `on` (numba at once)
or `off` (twins alone). Where numba cannot be imported, the twins stay. A compiled loop that fails ends no run: it is
compiled again without the files that were kept, and if that fails, too, its twin takes its place in this process.

Arrays are C-contiguous unless their description says otherwise; the loops check neither shapes nor bounds.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import cache
from threading import RLock
from types import ModuleType
from typing import Any

import numpy as np

from batchverify.errors import UsageError
from batchverify.kernels import plain_loops

VARIABLE = "BATCHVERIFY_KERNELS"
# Of `distances`: see there.
EPSILON, LANES = plain_loops.EPSILON, plain_loops.LANES

log = logging.getLogger(__name__)

# Seconds of the twins after which numba is worth its start.
PATIENCE = 1.0
# What they have taken so far; threads may lose some of it to each other, which does no harm.
_spent = [0.0]
# What each loop is called by, once it has been called.
_chosen: dict[str, Callable[..., Any]] = {}
_lock = RLock()


def integrate(image: np.ndarray, sums: np.ndarray) -> None:
    """Fill a summed-area table. image: (H, W, 3) uint8; sums: (H + 1, W + 1, 4) int32, modulo 2**32.

    The first row, the first column and the fourth channel become zero.
    """
    _run("integrate", image, sums)


def resample(
    sums: np.ndarray, regions: np.ndarray, places: np.ndarray, reciprocal: bool, patches: np.ndarray
) -> None:
    """Means of the cells of regions, as `interpolate(mode="area")` cuts them, normalised to -1..1.

    sums: from `integrate`; a cell's own sum must be below 2**31. regions: (K, 4) int64 left, top, right,
    bottom, half open. places: (K, 5) int64 patch, top, left, height, width. reciprocal: multiply sums by one
    over the area, which rounds differently from a division. patches: (N, h, w, 3) float32, filled at the
    places.
    """
    _run("resample", sums, regions, places, reciprocal, patches)


def suppress(boxes: np.ndarray, order: np.ndarray, threshold: float) -> np.ndarray:
    """Indices, (N,) int64, kept by suppression with intersection over union above a threshold, in order.

    boxes: (K, 4) float32 x0 y0 x1 y1. order: (K,) int64, best first.
    """
    return _run("suppress", boxes, order, threshold)


def distances(
    first: np.ndarray, second: np.ndarray, a: np.ndarray, b: np.ndarray, chi: np.ndarray, dots: np.ndarray
) -> None:
    """Chi-square distances and dot products of rows `a` of `first` and `b` of `second`.

    The distance is the sum over (x - y)² / (|x| + |y| + `EPSILON`). first, second: (M, F), (K, F) int16, the
    bits of float16, or both int32, the bits of float32; F a multiple of `LANES`. a, b: (N,) int64. chi, dots:
    (N,) float32, filled. The sums have one order on every machine.
    """
    _run("distances", first, second, a, b, chi, dots)


def _run(name: str, *arguments: Any) -> Any:
    """Call a loop."""
    way = _chosen.get(name)
    if way is None:
        if _mode() == "auto" and _spent[0] < PATIENCE:
            return _timed(getattr(plain_loops, name), arguments)
        way = _choose(name)
    try:
        return way(*arguments)
    except MemoryError:
        raise  # no fault of the loop
    except Exception as exc:
        if way is getattr(plain_loops, name):
            raise
        return _run_again(name, way, exc, arguments)


def _timed(twin: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    started = time.perf_counter()
    found = twin(*arguments)
    _spent[0] += time.perf_counter() - started
    return found


def _choose(name: str) -> Callable[..., Any]:
    with _lock:
        return _chosen.setdefault(name, getattr(_loops(), name))


def _run_again(name: str, failed: Callable[..., Any], error: Exception, arguments: tuple[Any, ...]) -> Any:
    """Call a loop, whose compiled code failed, by other means, and stay with those in this process."""
    with _lock:
        if _chosen[name] is not failed:  # another thread was here before
            return _run(name, *arguments)
        try:
            way = _loops().compiled_anew(failed)
            found, outcome = way(*arguments), "it was compiled again"
        except MemoryError:
            raise
        except Exception as exc:  # noqa: BLE001  see `_run`
            way = getattr(plain_loops, name)
            found, outcome = way(*arguments), f"numpy takes its place ({_text(exc)})"
        _chosen[name] = way
    log.warning("the compiled loop %s failed (%s): %s", name, _text(error), outcome)
    return found


@cache
def _mode() -> str:
    """`auto`, `on` or `off`; `UsageError` for another value of the variable."""
    value = os.environ.get(VARIABLE) or "auto"
    if value not in ("auto", "on", "off"):
        raise UsageError(f"{VARIABLE} must be auto, on or off, got {value!r}")
    return value


@cache
def _loops() -> ModuleType:
    """The module with the loops."""
    if _mode() == "off":
        return plain_loops
    try:
        from batchverify.kernels import numba_loops
    except Exception as exc:  # noqa: BLE001  the seam to numba: it fails in many ways beside a numpy too new
        log.warning("numba cannot be imported (%s): numpy takes its place, more slowly", _text(exc))
        return plain_loops
    return numba_loops


def _text(exc: Exception) -> str:
    """Type and first line: numba's go on for pages."""
    return f"{type(exc).__name__}: {str(exc).partition(chr(10))[0]}"
