"""Memory of batches: how much one takes, and whether the next one fits."""

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

from llmcli.models.memory import available_memory, take_peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USABLE_FRACTION = 0.8  # of the free memory, for one batch
MIN_RATIO = 0.5  # of what a batch took to what was estimated: less means that it was not measured well
LOGIT_BYTES = 16  # of a row and a token of the vocabulary: float32, and what chooses a token makes copies
LAYER_SIZE = 14  # of what a layer computes for a token, in hidden sizes


class MemoryUsage(NamedTuple):
    """Bytes in use now, the peak since the last measurement if it can be reset, and bytes free for more."""

    used: int
    peak: int
    free: int
    is_exact: bool = False  # of tensors alone: what an earlier batch took is free again


class MemoryEstimator:
    """Knows how much memory a batch takes, padding and answers included: estimated, then measured.

    `probe` measures, and resets the peak. `estimate(rows, tokens)` returns bytes.
    """

    def __init__(
        self, probe: Callable[[], MemoryUsage], estimate: Callable[[int, int], float] = lambda rows, tokens: tokens
    ) -> None:
        self._probe, self._estimate = probe, estimate
        self._ratio = 1.0  # of the memory that batches take to their estimates
        self._baseline: MemoryUsage | None = None  # before the first batch; if exact, before the last one
        self._last = MemoryUsage(0, 0, 0)
        self._measured_tokens = 0  # of the largest batch
        self._failed_tokens: int | None = None  # the smallest batch that ran out of memory

    def start_batch(self) -> None:
        """Measure what is in use before a batch."""
        if self._baseline is None or self._baseline.is_exact:
            self._baseline = self._last = self._probe()

    def observe(self, tokens: int, rows: int = 1) -> None:
        """Learn from the batch that has run since `start_batch`."""
        usage = self._probe()
        # A peak that is the same as before is that of an earlier batch, or of loading the model: it cannot be reset.
        peak = max(usage.used, usage.peak if usage.is_exact or usage.peak != self._last.peak else 0)
        # The process keeps what the largest batch took, and a small one would seem to have taken all of it.
        if self._baseline and tokens >= self._measured_tokens:
            self._measured_tokens = tokens
            self._ratio = max(MIN_RATIO, (peak - self._baseline.used) / self._estimate(rows, tokens))
        self._last = usage

    def observe_failure(self, tokens: int) -> None:
        self._failed_tokens = min(tokens, self._failed_tokens or tokens)

    def is_below_failure(self, tokens: int) -> bool:
        return self._failed_tokens is None or tokens < self._failed_tokens

    def fits(self, tokens: int, rows: int = 1) -> bool:
        """Return whether a batch of that many tokens, in that many rows, is expected to fit."""
        if not self.is_below_failure(tokens):
            return False
        if self._baseline is None:
            self.start_batch()
            assert self._baseline
        taken = self._last.used - self._baseline.used
        return self._ratio * self._estimate(rows, tokens) <= USABLE_FRACTION * (self._last.free + taken)


def make_estimate(model: "PreTrainedModel", copies: int = 1) -> Callable[[int, int], float]:
    """Return how many bytes a batch takes by the sizes of the model; `copies` of each row generate, such as beams."""
    from llmcli.compat.cache import cached_layers

    config, size = model.config.get_text_config(decoder=True), model.dtype.itemsize
    layers = cache(partial(cached_layers, model, config))  # takes milliseconds, and only if a batch has several rows

    def estimate(rows: int, tokens: int) -> float:
        length = tokens / rows
        row = length * LAYER_SIZE * getattr(config, "hidden_size", 1) * size
        if model.can_generate():
            kept = sum(width * min(length, maximum) for width, maximum in layers())
            row += copies * (kept * size + getattr(config, "vocab_size", 0) * LOGIT_BYTES)
        return float(rows * row)

    return estimate


def probe_memory(model: "PreTrainedModel") -> MemoryUsage:
    """Measure the devices that hold a model, several if Accelerate has spread it, and reset their peaks."""
    import psutil
    import torch

    from llmcli.compat.torch import read_memory

    places = (getattr(model, "hf_device_map", None) or {"": model.device}).values()
    devices = {torch.device(place) for place in places if place != "disk"}
    if usages := [read_memory(device) for device in devices if device.type != "cpu"]:
        used, peak, free = zip(*usages, strict=True)
        for device in devices:
            if device.type not in ("cpu", "mps"):
                torch.get_device_module(device).reset_peak_memory_stats(device)
        # Each has a part of all layers, and so of the batch: the one with the least left ends it for all.
        return MemoryUsage(sum(used), sum(peak), len(free) * min(free), is_exact=True)

    info = psutil.Process().memory_info()
    shared = getattr(info, "shared", 0)  # mapped files, such as weights, which are read during the first batch
    # The process keeps what its largest batch took, and the next batch uses it again.
    return MemoryUsage(info.rss - shared, take_peak_memory() - shared, available_memory())
