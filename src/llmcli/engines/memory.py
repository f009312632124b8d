"""Memory of a batch: measured after each batch, so that the next one fits."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USABLE_FRACTION = 0.8  # of the free memory, for one batch


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Bytes in use now, the peak since the last reset, and bytes free for more."""

    used: int
    peak: int
    free: int


class MemoryEstimator:
    """Learns how much memory a token of a batch takes. Tokens count padding and answers.

    `probe` measures the memory now; if its argument is True, the peak is counted anew from now on.
    """

    def __init__(self, probe: Callable[[bool], MemoryUsage]) -> None:
        self._probe = probe
        self._peak_before = 0
        self._bytes_per_token = 0.0
        self._failed_tokens: int | None = None  # the smallest batch that ran out of memory

    @cached_property
    def _baseline(self) -> MemoryUsage:
        """Measured before the first batch: a single record needs none."""
        return self._probe(False)

    def start_batch(self) -> None:
        """Count the peak of the next batch from now on."""
        _ = self._baseline  # measured now at the latest
        self._peak_before = self._probe(True).peak

    def observe(self, tokens: int) -> None:
        usage = self._probe(False)
        # Where the peak cannot be reset, it may be that of loading the model or of an earlier batch.
        peak = max(usage.used, usage.peak if usage.peak > self._peak_before else 0)
        self._bytes_per_token = max(self._bytes_per_token, (peak - self._baseline.used) / tokens)

    def observe_failure(self, tokens: int) -> None:
        self._failed_tokens = min(tokens, self._failed_tokens or tokens)

    def is_below_failure(self, tokens: int) -> bool:
        """Return whether the batch is smaller than all that ran out of memory."""
        return self._failed_tokens is None or tokens < self._failed_tokens

    def fits(self, tokens: int) -> bool:
        """Return whether a batch of that many tokens is expected to fit. Any does until one has run."""
        if not self.is_below_failure(tokens):
            return False
        usage = self._probe(False)
        return tokens * self._bytes_per_token <= USABLE_FRACTION * (usage.free + usage.used - self._baseline.used)


def probe_memory(model: "PreTrainedModel", reset: bool) -> MemoryUsage:
    """Measure the devices that hold a model: several if Accelerate has spread it."""
    import psutil
    import torch

    places = (getattr(model, "hf_device_map", None) or {"": model.device}).values()
    devices = {torch.device(place) for place in places if place != "disk"}
    gpus = [device for device in devices if device.type == "cuda"]
    used = peak = free = 0
    for gpu in gpus:
        if reset:
            torch.cuda.reset_peak_memory_stats(gpu)
        allocated = torch.cuda.memory_allocated(gpu)
        used += allocated
        peak += torch.cuda.max_memory_allocated(gpu)
        # The allocator's reserve is not free to others, but free to the next batch.
        free += torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) - allocated
    if gpus:
        return MemoryUsage(used, peak, free)

    if reset:
        with suppress(OSError):  # Linux; elsewhere the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")
    info = psutil.Process().memory_info()
    with suppress(ImportError):  # Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with suppress(OSError):  # Linux, where the peak can be reset
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    shared = getattr(info, "shared", 0)  # mapped files, such as weights, which are read during the first batch
    # The process keeps what its largest batch took, and the next batch uses it again.
    return MemoryUsage(info.rss - shared, peak - shared, psutil.virtual_memory().available)
