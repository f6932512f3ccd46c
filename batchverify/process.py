"""A process of ours: its allocator, its garbage collector, its peak memory."""

from __future__ import annotations

import atexit
import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

# glibc's mallopt, by <malloc.h>.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_KEEP = 1 << 30
# New objects between two searches for garbage; Python's own is 700 or 2,000.
_COLLECT_AFTER = 50_000


def keep_freed_memory() -> bool:
    """Let malloc keep up to 1 GB of freed memory; False where the C library is another.

    By default tensors of some megabytes come from the kernel and go back to it at every operation; the
    detector's networks spend half of their time on page faults then. For processes that are ours alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    kept = mallopt(_TRIM_THRESHOLD, _KEEP)
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and kept)


def collect_rarely() -> None:
    """Search for garbage less often, and not once more at the end: half a second of a short run.

    Importing torch makes a million objects that stay. For processes that are ours alone.
    """
    gc.set_threshold(_COLLECT_AFTER, *gc.get_threshold()[1:])
    atexit.register(_skip_last_search)


def _skip_last_search() -> None:
    # Triton, which training imports, takes what is not collected for leaks and lists it on stderr.
    if "triton" not in sys.modules:
        gc.freeze()


def peak_memory() -> float:
    """The most memory that this process had so far, in MB of 1e6 bytes; 0 where that cannot be told."""
    try:
        # Not getrusage: there a process begins with what its parent had when it was started.
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6
    found = re.search(r"^VmHWM:\s*(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 / 1e6 if found else 0.0
