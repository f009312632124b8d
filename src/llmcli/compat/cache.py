"""transformers' cache of keys and values: how to recognize it, one that grows in place, and one whose rows change."""

import copy
import math
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch.overrides import wrap_torch_function
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

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

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if len(beam_idx) < len(self.keys):
            super().reorder_cache(beam_idx)
            return
        moved = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero().flatten()
        for known in (self.keys, self.values):
            known.index_copy_(0, moved, known.index_select(0, beam_idx[moved]))


class SourceLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that keeps what the encoder returned for each source. Beams stay with their source."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if len(beam_idx) < len(self.keys):
            super().reorder_cache(beam_idx)


class SlotCache(DynamicCache):  # type: ignore[misc]
    """A cache for a batch of which rows leave and others take their places, the slots.

    A pass may read fewer rows than there are slots: the first ones. All rows share C columns, which have room for later
    tokens, and each row has its newest token in the newest column. A pass writes the columns after `end`; the caller
    counts them. What earlier rows left in a column is masked.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.begin = self.end = 0  # of the columns in use
        self.column: torch.Tensor | None = None  # if set, where a pass writes; then attention is to all C columns
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device=device)  # which columns hold tokens of the row

    def put(self, slots: Sequence[int], cache: DynamicCache, mask: torch.Tensor) -> None:
        """Begin rows in free slots: their columns (R, P), and keys and values of these, which end in the newest one."""
        columns = slice(self.end - mask.shape[1], self.end)
        self.begin = min(self.begin, columns.start)
        index = torch.tensor(slots, device=self.mask.device)  # once: each copy to a GPU waits for it
        self.mask.index_fill_(0, index, False)
        self.mask[index, columns] = mask.bool()
        for i, layer in enumerate(cache.layers):
            if not layer.is_initialized:  # It shares those of another layer.
                continue
            while i >= len(self.layers):
                self.layers.append(_SlotLayer(self))
            self.layers[i].put(index, columns, layer.keys, layer.values)

    def arrange(self, kept: Sequence[int], rows: int, columns: int, end: int) -> None:
        """Move rows to the first of at least that many slots and columns, so that the newest column is before `end`.

        Tensors that are large enough stay in their place in memory.
        """
        source, target = slice(self.begin, self.end), slice(end - self.end + self.begin, end)
        rows, columns = max(rows, self.mask.shape[0]), max(columns, self.mask.shape[1])
        self.mask = _move(self.mask, (rows, columns), kept, source, target)
        for layer in self.layers:
            layer.move(rows, columns, kept, source, target)
        self.begin, self.end = target.start, target.stop


class _SlotLayer(DynamicLayer):  # type: ignore[misc]
    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        # In a cycle, memory would stay until it is collected.
        self._cache: SlotCache = weakref.proxy(cache)  # type: ignore[assignment]

    def put(self, slots: torch.Tensor, columns: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            rows, length = self._cache.mask.shape
            self.keys, self.values = (new.new_zeros(rows, new.shape[1], length, new.shape[3]) for new in (keys, values))
        for known, new in ((self.keys, keys), (self.values, values)):
            # Attention multiplies what is masked by 0, and another row's NaN would stay NaN.
            known.index_fill_(0, slots.to(known.device), 0)
            known[slots.to(known.device), :, columns] = new

    def move(self, rows: int, columns: int, kept: Sequence[int], source: slice, target: slice) -> None:
        if self.is_initialized:
            self.keys, self.values = (
                _move(known, (rows, known.shape[1], columns, known.shape[3]), kept, source, target)
                for known in (self.keys, self.values)
            )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **settings: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._append("keys", key_states), self._append("values", value_states)

    @wrap_torch_function(lambda _layer, _name, new: (new,))  # type: ignore[untyped-decorator]
    def _append(self, name: str, new: torch.Tensor) -> torch.Tensor:  # for a `Recording`, a single call
        cache, known = self._cache, getattr(self, name)
        if cache.column is not None:
            return known.index_copy_(2, cache.column, new)
        rows, end = len(new), cache.end + new.shape[2]
        known[:rows, :, cache.end : end] = new
        return known[:rows, :, cache.begin : end]

    def get_seq_length(self) -> int:
        return self._cache.end - self._cache.begin


def _move(
    known: torch.Tensor, shape: tuple[int, ...], kept: Sequence[int], source: slice, target: slice
) -> torch.Tensor:
    """Return a tensor (B, ..., C) or (B, H, C, D) with the columns of the kept rows in their new place."""
    between = (slice(None),) * (known.ndim // 2 - 1)
    moved = known[(list(kept), *between, source)]  # a copy
    known = known.zero_() if known.shape == shape else known.new_zeros(shape)
    known[(slice(len(kept)), *between, target)] = moved
    return known


def growing_cache(model: PreTrainedModel, config: GenerationConfig) -> Cache | None:
    """Return an empty cache that grows in place.

    None if the model keeps anything other than the keys and values of all tokens, if the generation config asks for
    another cache, or on a GPU, where copies are cheap.
    """
    uses_cache = getattr(model.config, "use_cache", True) if config.use_cache is None else config.use_cache
    if not uses_cache or config.cache_implementation or model.device.type != "cpu":
        return None
    if not model._supports_default_dynamic_cache() or not _cache_name(model):
        return None
    cache, sources = (DynamicCache(config=model.config.get_text_config(decoder=True)) for _ in range(2))
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    sources.layers = [SourceLayer() for _ in cache.layers]
    cache.layers = [GrowingLayer() for _ in cache.layers]
    return EncoderDecoderCache(cache, sources) if model.config.is_encoder_decoder else cache


def shares_sources(settings: Mapping[str, Any]) -> bool:
    """Return whether what a forward pass takes has a cache in which the beams of a source can share what it has."""
    cache = next((settings[name] for name in CACHE_NAMES if settings.get(name) is not None), None)
    return isinstance(cache, EncoderDecoderCache) and any(
        type(layer) is SourceLayer for layer in cache.cross_attention_cache.layers
    )


def cached_layers(model: PreTrainedModel, config: PreTrainedConfig) -> list[tuple[int, float]]:
    """Return for each layer with attention how many numbers it keeps of a token, and of how many tokens at most."""
    is_latent = any(hasattr(module, "expand_kv") for module in model.modules())
    found = []
    try:
        layers = DynamicCache(config=config).layers
        for layer, own in zip(layers, getattr(config, "per_layer_config", None) or repeat(config), strict=False):
            if isinstance(layer, DynamicLayer):
                heads, rotary = own.num_attention_heads, getattr(own, "qk_rope_head_dim", None)
                if rotary:
                    expanded = heads * (own.qk_nope_head_dim + rotary + own.v_head_dim)
                    size = own.kv_lora_rank + rotary if is_latent else expanded
                else:
                    get = partial(getattr, own)
                    is_single = get("multi_query", False) and not get("new_decoder_architecture", False)
                    shared = 1 if is_single else get("num_key_value_heads", None) or get("num_kv_heads", heads)
                    size = 2 * shared * (get("head_dim", None) or own.hidden_size // heads)
                found.append((size, getattr(layer, "sliding_window", None) or math.inf))
    except Exception:  # The config of a model's own code may lack anything.
        found.clear()
    return found


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


def can_select_rows(model: PreTrainedModel, settings: Mapping[str, Any], total: int) -> bool:
    """Return whether `select_rows` finds all that a model keeps of its rows, of which there are `total`.

    Some models keep states in their modules, or in a cache of their own that beam search cannot use either.
    """
    others = [value for value in settings.values() if not isinstance(value, torch.Tensor | ModelOutput | int) and value]
    if not all(isinstance(cache, Cache) and _reorders_all(type(cache)) for cache in others):
        return False
    own = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return not any(state.dim() > 1 and len(state) == total for state in own)


def _reorders_all(kind: type[Cache]) -> bool:
    return next(owner for owner in kind.__mro__ if "reorder_cache" in vars(owner)).__module__ == kind.__module__


def select_rows(value: Any, rows: torch.Tensor, total: int, dimension: int = -2) -> Any:
    """Return what a forward pass takes beside tokens for some rows of that total. A cache changes in place."""
    if isinstance(value, Cache):
        value.reorder_cache(rows)  # `batch_select_indices` leaves the states of linear attention out
    elif isinstance(value, ModelOutput):
        return type(value)(**{name: select_rows(item, rows, total, 0) for name, item in value.items()})
    elif isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[dimension] == total:
        return value.index_select(dimension, rows.to(value.device))  # Positions may have a dimension before the rows'.
    return value
