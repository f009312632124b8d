"""glibc's heap, told how to serve large tensors. With another C library, nothing happens."""

import ctypes
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # malloc.h


def keep() -> None:
    """Keep the memory of large tensors for the next ones: as it comes, each is given back to the system, and the page
    faults take a third of the time of a large batch."""
    _call("mallopt", MMAP_THRESHOLD, 2**30)
    _call("mallopt", TRIM_THRESHOLD, 2**31 - 1)


def share() -> None:
    """One heap for all threads: of the many that there would be, each would keep what its largest job took."""
    _call("mallopt", ARENA_MAX, 1)


def give_back() -> None:
    """What is free goes to the system."""
    _call("malloc_trim", 0)


def _call(name: str, *args: int) -> None:
    with suppress(OSError, AttributeError):
        getattr(ctypes.CDLL(None), name)(*args)
