"""Memory of batches: how much one takes, and whether the next one fits."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from llmcli.models.memory import available_memory, take_peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USABLE_FRACTION = 0.8  # of the free memory, for one batch


class MemoryUsage(NamedTuple):
    """Bytes in use now, the peak since the last measurement if it can be reset, and bytes free for more."""

    used: int
    peak: int
    free: int


class MemoryEstimator:
    """Learns how much memory a token of a batch takes, padding and answers included. `probe` measures, and resets."""

    def __init__(self, probe: Callable[[], MemoryUsage]) -> None:
        self._probe = probe
        self._baseline: MemoryUsage | None = None  # before the first batch
        self._last = MemoryUsage(0, 0, 0)
        self._bytes_per_token = 0.0
        self._measured_tokens = 0  # of the largest batch
        self._failed_tokens: int | None = None  # the smallest batch that ran out of memory

    def start_batch(self) -> None:
        if self._baseline is None:
            self._baseline = self._last = self._probe()

    def observe(self, tokens: int) -> None:
        usage = self._probe()
        # A peak that is the same as before is that of an earlier batch, or of loading the model: it cannot be reset.
        peak = max(usage.used, usage.peak if usage.peak != self._last.peak else 0)
        # The process keeps what the largest batch took, and a small one would seem to have taken all of it.
        if self._baseline and tokens >= self._measured_tokens:
            self._measured_tokens, self._bytes_per_token = tokens, (peak - self._baseline.used) / tokens
        self._last = usage

    def observe_failure(self, tokens: int) -> None:
        self._failed_tokens = min(tokens, self._failed_tokens or tokens)

    def is_below_failure(self, tokens: int) -> bool:
        return self._failed_tokens is None or tokens < self._failed_tokens

    def fits(self, tokens: int) -> bool:
        """Return whether a batch of that many tokens is expected to fit. Any does until one has run."""
        if not self.is_below_failure(tokens):
            return False
        taken = self._last.used - (self._baseline.used if self._baseline else 0)
        return tokens * self._bytes_per_token <= USABLE_FRACTION * (self._last.free + taken)


def probe_memory(model: "PreTrainedModel") -> MemoryUsage:
    """Measure the devices that hold a model, several if Accelerate has spread it, and reset their peaks."""
    import psutil
    import torch

    from llmcli.compat.torch import free_gpu_memory

    places = (getattr(model, "hf_device_map", None) or {"": model.device}).values()
    devices = {torch.device(place) for place in places if place != "disk"}
    gpus = [device for device in devices if device.type == "cuda"]
    used = peak = free = 0
    for gpu in gpus:
        used += torch.cuda.memory_allocated(gpu)
        peak += torch.cuda.max_memory_allocated(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        free += free_gpu_memory(gpu)
    if gpus:
        return MemoryUsage(used, peak, free)

    info = psutil.Process().memory_info()
    shared = getattr(info, "shared", 0)  # mapped files, such as weights, which are read during the first batch
    # The process keeps what its largest batch took, and the next batch uses it again.
    return MemoryUsage(info.rss - shared, take_peak_memory() - shared, available_memory())
