"""How a process of ours keeps memory: what is freed is used again, not given back page by page."""

from __future__ import annotations

import ctypes

# glibc's mallopt, by <malloc.h>.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_KEEP = 1 << 30


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
