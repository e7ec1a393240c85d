"""What the C library does with memory that was freed. glibc only; elsewhere nothing happens."""

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE = 2 << 20  # bytes of a tensor for which torch asks for pages of this size: new ones then cost little
ENDS = 4 << 20  # of such a tensor, come as slowly as small pages do: a part has small ones, and threads wait for each other
SMALL = 512 << 10  # of a tensor that gets pages of its own in a large model
MODEL = 8_000_000  # parameters from which on a model is large
KEPT = 32 << 20  # bytes at the end of the heap that may stay for what comes next


def own_pages(parameters: int) -> int:
    """Bytes from which on a tensor gets pages of its own, of a model with so many parameters, however it is cut.

    Getting pages takes time, of which the arithmetic of small models has little: the steps of the default model would take 1.7
    to 1.9 times as long.
    """
    return SMALL if parameters >= MODEL else LARGE


def return_freed_memory(size: int = LARGE) -> None:
    """Let the pages of tensors of at least `size` bytes leave the process as soon as they are freed.

    As a rule glibc keeps them for reuse, in pieces that do not fit what comes next: a training step then peaks above what it
    holds (GPT-2, 384 wide, in two stages: 497 MiB, of which tensors are 302; 341 MiB with pages from 512 KiB on).
    """
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, size)
        library.mallopt(M_TRIM_THRESHOLD, KEPT)


def trim() -> None:
    """Return what is free now."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
