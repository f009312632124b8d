"""Main memory: the peak of this process, what is free within the limits of a container, and glibc's malloc."""

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path

PROCESS_CGROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
VERSION_1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
VERSION_2 = ("", "memory.max", "memory.current", "")
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # options of mallopt, in malloc.h
_highest_peak = 0  # of those that have been reset


def peak_memory() -> int:
    """Return the most bytes of main memory that this process has had."""
    return max(_highest_peak, _read_peak())


def take_peak_memory() -> int:
    """Return the peak since the last call, and reset it. Where the system cannot, it is that of the whole process."""
    global _highest_peak
    peak = _read_peak()
    _highest_peak = max(_highest_peak, peak)
    with suppress(OSError):  # not on Linux
        Path("/proc/self/clear_refs").write_text("5")
    return peak


def _read_peak() -> int:
    # On Linux, getrusage may return the peak of the process that started this one.
    with suppress(OSError, IndexError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory() -> int:
    """Return the bytes that this process can still take: free on the machine, and in each of its control groups."""
    import psutil

    available = psutil.virtual_memory().available
    lines = PROCESS_CGROUPS.read_text().splitlines() if PROCESS_CGROUPS.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, usage, prefix = VERSION_1 if controllers else VERSION_2
        folder = CGROUPS / root / path.lstrip("/")  # in a container, possibly the path on the host; the root exists
        for group in (folder, *folder.parents):
            with suppress(OSError, ValueError, KeyError):  # ValueError: the limit is "max"
                free = int((group / limit).read_text()) - int((group / usage).read_text())
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                cached = sum(int(statistics[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
                available = min(available, free + cached)
    return available


def keep_freed_memory() -> None:
    """Keep the memory of large tensors: the page faults of new memory take a third of the time of a large batch."""
    _call_glibc("mallopt", MMAP_THRESHOLD, 2**30)
    _call_glibc("mallopt", TRIM_THRESHOLD, 2**31 - 1)


def use_one_arena() -> None:
    """Use one arena for all threads: otherwise each of many would keep what its largest job took."""
    _call_glibc("mallopt", ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Return free memory to the system and to the accelerator, for other models and processes."""
    _call_glibc("malloc_trim", 0)
    if "torch" in sys.modules:
        import torch

        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()


def _call_glibc(name: str, *args: int) -> None:
    with suppress(AttributeError):  # another C library
        getattr(ctypes.CDLL(None), name)(*args)
