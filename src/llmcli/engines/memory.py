"""How much memory a batch takes, learnt from those that ran."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

SHARE = 0.8  # of what is free, that a batch may take


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Bytes: taken now, taken at most until now, and free for more."""

    taken: int
    peak: int
    free: int


class MemoryEstimator:
    """`fits` says whether a batch of so many tokens, padding and answers included, finds room; it always does until
    one has run."""

    def __init__(self, read: Callable[[], MemoryUsage]) -> None:
        self._read = read
        self._before = read()
        self._each = 0.0  # bytes a token

    def learn(self, tokens: int) -> None:
        """A batch of so many has run."""
        now = self._read()
        most = max(now.taken, now.peak if now.peak > self._before.peak else 0)  # to load the model may have taken more
        self._each = max(self._each, (most - self._before.taken) / tokens)

    def fits(self, tokens: int) -> bool:
        now = self._read()
        return tokens * self._each <= SHARE * (now.free + now.taken - self._before.taken)


def reader(device: str) -> Callable[[], MemoryUsage]:
    """Reads the memory of that device."""
    return _of_accelerator if device == "cuda" else _of_machine


def _of_machine() -> MemoryUsage:
    import resource

    import psutil

    found = psutil.Process().memory_info()
    shared = getattr(found, "shared", 0)  # files, as weights are: they come in while the first batch runs
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # What the largest batch took stays with the process, and counts as taken: it is there for the next.
    return MemoryUsage(found.rss - shared, peak - shared, psutil.virtual_memory().available)


def _of_accelerator() -> MemoryUsage:
    import torch

    taken, held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return MemoryUsage(taken, torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[0] + held - taken)
