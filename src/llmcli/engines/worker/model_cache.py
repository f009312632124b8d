"""The models that a worker keeps warm, and which of them gives way."""

import gc
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from llmcli import console
from llmcli.errors import ModelTooLargeError
from llmcli.models import malloc


@dataclass(eq=False)
class CachedModel:
    """A pipeline, and the jobs that use it now. Times are of `time.monotonic`."""

    name: str
    pipeline: Any
    users: int = 0
    used: float = field(default_factory=time.monotonic)
    until: float = math.inf

    def status(self) -> dict[str, Any]:
        """What `llmcli ps` shows of it; `idle` and `left` in seconds, null while it is used or stays for good."""
        model, now = self.pipeline.model, time.monotonic()
        tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
        is_idle = not self.users
        return {
            "model": self.name,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "bytes": sum(each.numel() * each.element_size() for each in tensors.values()),
            "jobs": self.users,
            "idle": round(now - self.used, 1) if is_idle else None,
            "left": round(self.until - now, 1) if is_idle and self.until < math.inf else None,
        }


class LRUModelCache:
    """All of them; `seconds` is how long one stays that is not used, where its job does not say."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._models: dict[Any, CachedModel] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._models)

    def status(self) -> list[dict[str, Any]]:
        return [warm.status() for warm in list(self._models.values())]

    def borrow(self, name: str, key: Any, load: Callable[[], Any]) -> CachedModel:
        """The model under that key, which stays at least until it is given back. Where memory is short, those that
        nobody uses give way, the least recently used first. Raises what `load` raises."""
        while True:
            with self._lock:
                if warm := self._models.get(key):
                    warm.users += 1
                    return warm
            try:
                loaded = CachedModel(name, load())
            except ModelTooLargeError:
                if not self._drop_oldest():
                    raise
            else:
                with self._lock:
                    self._models[key] = loaded

    def give_back(self, warm: CachedModel, seconds: float | None) -> None:
        """A job is done with it, and would have it stay for so long."""
        with self._lock:
            warm.users -= 1
            warm.used = time.monotonic()
            warm.until = warm.used + (self._seconds if seconds is None else seconds)

    def drop_expired(self) -> None:
        """Those whose time is over."""
        now = time.monotonic()
        self._drop([key for key, warm in list(self._models.items()) if not warm.users and warm.until <= now])

    def _drop_oldest(self) -> bool:
        """Whether there was one."""
        with self._lock:
            idle = [(warm.used, warm.name, key) for key, warm in self._models.items() if not warm.users]
        if not idle:
            return False
        _, name, oldest = min(idle, key=itemgetter(0))
        console.notice(f"memory is short: {name} is not kept warm any more")
        return self._drop([oldest])

    def _drop(self, keys: list[Any]) -> bool:
        with self._lock:
            dropped = [self._models.pop(key) for key in keys if key in self._models and not self._models[key].users]
        if not dropped:
            return False
        dropped.clear()
        gc.unfreeze()  # what was loaded to stay is rubbish now
        gc.collect()
        gc.freeze()
        malloc.trim()
        return True


class ModelLease:
    """The models that one job uses."""

    def __init__(self, models: LRUModelCache) -> None:
        self._models = models
        self._own: dict[Any, CachedModel] = {}

    def get(self, name: str, key: Any, load: Callable[[], Any]) -> Any:
        if key not in self._own:
            self._own[key] = self._models.borrow(name, key, load)
        return self._own[key].pipeline

    def give_back(self, seconds: float | None) -> None:
        for warm in self._own.values():
            self._models.give_back(warm, seconds)
