"""What the C library does with memory that was freed. glibc only; elsewhere nothing happens."""

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE = 2 << 20  # bytes of a tensor that gets pages of its own: from here on torch asks for pages of this size
KEPT = 32 << 20  # bytes at the end of the heap that may stay for what comes next


def return_freed_memory() -> None:
    """Let the pages of large tensors leave the process as soon as they are freed.

    As a rule glibc keeps them for reuse, in pieces that do not fit what comes next: a training step then peaks above what it
    holds. Getting new pages from the kernel takes time.
    """
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.mallopt(M_TRIM_THRESHOLD, KEPT)


def trim() -> None:
    """Return what is free now."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
