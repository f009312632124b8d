"""Keys and values of a batch, that grow in place."""

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens for which there is room at first


class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """transformers' own layer makes a copy of everything for each new token; this one leaves room behind it."""

    keys: Any
    values: Any

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        super().lazy_initialization(key_states, value_states)
        self._rooms: dict[str, Any] = {}

    def update(self, key_states: Any, value_states: Any, *args: Any, **settings: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._longer("keys", self.keys, key_states)
        self.values = self._longer("values", self.values, value_states)
        return self.keys, self.values

    def _longer(self, name: str, known: Any, new: Any) -> Any:
        """What is known, the beginning of its room, with the new behind it; in greater room where that is full, or
        where `known` has been replaced by other rows."""
        length = known.shape[-2] if known.numel() else 0
        total, room = length + new.shape[-2], self._rooms.get(name)
        if room is None or room.data_ptr() != known.data_ptr() or room.shape[-2] < total:
            room = new.new_empty(*new.shape[:-2], total + max(ROOM, total // 4), new.shape[-1])
            if length:
                room[..., :length, :] = known
            self._rooms[name] = room
        room[..., length:total, :] = new
        return room[..., :total, :]


def growing(model: Any, config: Any) -> DynamicCache | None:
    """An empty cache for `model.generate`; None where the model keeps anything else than keys and values of all it has
    read, where the generation config wants another cache or beams, and on a GPU, where copies are cheap."""
    if (config.num_beams or 1) > 1 or config.use_cache is False or config.cache_implementation:
        return None
    if model.device.type != "cpu" or not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache
