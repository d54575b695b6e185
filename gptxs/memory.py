"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt(), from its malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let the C library keep the memory that is freed, instead of giving it back to the system.

    Each training step, and each shard, allocates the same memory again, and Linux would have to
    clear every page of it first: a quarter to a third of a step that is not compiled (torch 2.13,
    bf16, 2 cores).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc; other libraries have none
    if mallopt is not None:
        # See mallopt(3): free memory at the end of the heap stays, and large blocks come from it.
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)
