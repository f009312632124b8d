"""glibc's malloc, tuned for large tensors. Does nothing with another C library."""

import ctypes
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # malloc.h
MMAP_THRESHOLD_BYTES = 2**30
TRIM_THRESHOLD_BYTES = 2**31 - 1


def keep_memory() -> None:
    """Keep the memory of large tensors: the page faults of new memory take a third of the time of a large batch."""
    _call("mallopt", MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
    _call("mallopt", TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)


def use_one_arena() -> None:
    """Use one arena for all threads: otherwise each of many would keep what its largest job took."""
    _call("mallopt", ARENA_MAX, 1)


def trim() -> None:
    """Return free memory to the system."""
    _call("malloc_trim", 0)


def _call(name: str, *args: int) -> None:
    with suppress(AttributeError):  # another C library
        getattr(ctypes.CDLL(None), name)(*args)
