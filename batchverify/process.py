"""This process: its allocator, its garbage collector, its peak memory, and whether it was forked too late."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import re
import resource
import sys
from pathlib import Path

from batchverify.errors import UsageError

# Parameters of glibc's mallopt, from <malloc.h>.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_KEEP = 1 << 30
# New objects between two garbage collections; Python's default is 700 or 2,000.
_COLLECT_AFTER = 50_000
# The process that first computed with a library, by its name. Forked processes inherit it.
_users: dict[str, int] = {}


def keep_freed_memory() -> bool:
    """Let malloc keep up to 1 GB of freed memory; False if the C library is not glibc.

    By default, memory of tensors of some megabytes returns to the kernel after every operation, and the
    detector's networks spend half of their time on page faults. Call it only in processes of batchverify's own.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_set = mallopt(_TRIM_THRESHOLD, _KEEP)
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and trim_set)


def collect_rarely() -> None:
    """Collect garbage less often, and not at exit: saves half a second of a short run.

    Importing torch makes a million objects that stay. Call it only in processes of batchverify's own.
    """
    gc.set_threshold(_COLLECT_AFTER, *gc.get_threshold()[1:])
    atexit.register(_skip_collection_at_exit)


def _skip_collection_at_exit() -> None:
    # Triton, which training imports, reports objects that were not collected as leaks on stderr.
    if "triton" not in sys.modules:
        gc.freeze()


def require_own_process(library: str) -> None:
    """Raise `UsageError` in a process that was forked from one that has computed with `library`.

    It has the library's memory but none of its threads, for which it would wait for ever.
    """
    if _users.setdefault(library, os.getpid()) != os.getpid():
        raise UsageError(
            f"this process was forked from one that had computed with {library} already, whose threads it lacks: "
            "start processes with multiprocessing.get_context('spawn'), or fork before anything is embedded"
        )


def peak_memory() -> float:
    """The peak memory of this process so far, in MB (1e6 bytes); 0 if unknown."""
    try:
        # Not getrusage: its value starts at the parent's memory.
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
    match = re.search(r"^VmHWM:\s*(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) * 1024 / 1e6 if match else 0.0
