"""transformers' cache of keys and values: how to recognize it, and a layer of it that grows in place."""

import copy
from collections.abc import Mapping
from functools import partial

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from llmcli.compat.transformers import takes

SPARE_TOKENS = 64  # minimum room for later tokens
CACHE_NAMES = ("cache", "past_key_values")  # the first since transformers 5.24


class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A layer with room for later tokens; transformers' own copies everything for each new token."""

    keys: torch.Tensor
    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._buffers: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **settings: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, known: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Write `new` after `known` in its buffer; in a larger one if that is full or holds something else."""
        length = known.shape[-2] if known.numel() else 0
        total, buffer = length + new.shape[-2], self._buffers.get(name)
        if buffer is None or buffer.data_ptr() != known.data_ptr() or buffer.shape[-2] < total:
            buffer = new.new_empty(*new.shape[:-2], total + max(SPARE_TOKENS, total // 4), new.shape[-1])
            if length:
                buffer[..., :length, :] = known
            self._buffers[name] = buffer
        buffer[..., length:total, :] = new
        return buffer[..., :total, :]


def growing_cache(model: PreTrainedModel, config: GenerationConfig) -> DynamicCache | None:
    """Return an empty cache that grows in place.

    None if the model keeps anything other than the keys and values of all tokens, if the generation config asks for
    another cache or for beams, or on a GPU, where copies are cheap.
    """
    uses_cache = getattr(model.config, "use_cache", True) if config.use_cache is None else config.use_cache
    if (config.num_beams or 1) > 1 or not uses_cache or config.cache_implementation:
        return None
    if model.device.type != "cpu" or not model._supports_default_dynamic_cache() or not _cache_name(model):
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache


def key_value_cache(model: PreTrainedModel) -> DynamicCache | None:
    """Return an empty cache to read a text in parts, or None if the model keeps anything other than keys and values."""
    if cache := growing_cache(model, model.generation_config):
        return cache
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    is_complete = cache.layers and all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    return cache if is_complete and _cache_name(model) else None


def cache_argument(model: PreTrainedModel, cache: DynamicCache | None) -> dict[str, DynamicCache]:
    """Return the keyword argument that passes a cache to a model or to its `generate`; none without a cache."""
    name = _cache_name(model)
    return {name: cache} if cache is not None and name else {}


def _cache_name(model: PreTrainedModel) -> str | None:
    return next(filter(partial(takes, model), CACHE_NAMES), None)


def filled_cache(output: object) -> DynamicCache | None:
    """Return the cache that a forward pass returned, or took as an argument, if `repeat_cache` can copy it."""
    fields = output if isinstance(output, Mapping) else {}
    cache = next((value for name in CACHE_NAMES if (value := fields.get(name)) is not None), None)
    return cache if type(cache) is DynamicCache else None


def repeat_cache(cache: DynamicCache, rows: int) -> DynamicCache:
    """Return a copy of a cache of one row, for a batch."""
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(rows)
    return cache
