"""Loaded models: each is loaded once, shared by the jobs of a process, and unloaded when it expires."""

import gc
import math
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmcli import console
from llmcli.errors import ModelTooLargeError
from llmcli.job import JsonObject
from llmcli.models.memory import return_freed_memory

if TYPE_CHECKING:
    from transformers import Pipeline

Load = Callable[[], "Pipeline"]
Unlocked = Callable[[], AbstractContextManager[object]]


@dataclass(eq=False, slots=True)
class CachedModel:
    """A pipeline that is loaded or being loaded. Times are of `time.monotonic`."""

    name: str
    loading: "Future[Pipeline]" = field(default_factory=Future)
    users: int = 0  # jobs that use the model or wait for it
    last_used: float = 0
    expires: float = math.inf

    def status(self) -> JsonObject:
        """Return the row of `llmcli ps`. The times are None while a job uses the model, or if it never expires."""
        model, now, is_idle = self.loading.result().model, time.monotonic(), not self.users
        return {
            "model": self.name,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "bytes": model.get_memory_footprint(),
            "jobs": self.users,
            "idle_seconds": round(now - self.last_used, 1) if is_idle else None,
            "expires_in_seconds": round(self.expires - now, 1) if is_idle and self.expires < math.inf else None,
        }


class ModelCache:
    """Models by key. An idle one is unloaded when it expires, or when another one needs the memory."""

    def __init__(self, keep_alive_s: float = math.inf) -> None:
        self._keep_alive_s = keep_alive_s
        self._models: dict[Hashable, CachedModel] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._models)

    def status(self) -> list[JsonObject]:
        done = [cached for cached in list(self._models.values()) if cached.loading.done()]
        return [cached.status() for cached in done if not (cached.loading.cancelled() or cached.loading.exception())]

    def acquire(self, name: str, key: Hashable, load: Load, unlocked: Unlocked = nullcontext) -> CachedModel:
        """Return the model under a key, which stays loaded until it is released.

        The first caller loads it. Others wait within `unlocked()`, which releases a lock that the first one needs.
        """
        while True:
            with self._lock:
                is_loading = key not in self._models
                cached = self._models.setdefault(key, CachedModel(name))
                cached.users += 1
            if is_loading:
                try:
                    cached.loading.set_result(self._load(load))
                except BaseException as exc:
                    with self._lock:
                        del self._models[key]
                    if isinstance(exc, Exception):
                        cached.loading.set_exception(exc)
                    else:  # The job ends, not the model: one of the callers that wait loads it.
                        cached.loading.cancel()
                    raise
                return cached
            with unlocked():
                try:
                    cached.loading.result()
                except CancelledError:
                    continue  # the job that was loading the model has been cancelled
            return cached

    def release(self, cached: CachedModel, keep_alive_s: float | None) -> None:
        with self._lock:
            cached.users -= 1
            cached.last_used = time.monotonic()
            cached.expires = cached.last_used + (self._keep_alive_s if keep_alive_s is None else keep_alive_s)

    def evict_expired(self) -> None:
        now = time.monotonic()
        self._evict([key for key, cached in list(self._models.items()) if cached.expires <= now])

    def _load(self, load: Load) -> "Pipeline":
        """Load a model. As long as it is too large, unload the idle model that was used least recently."""
        return_freed_memory()  # The model is sized by what is free.
        while True:
            try:
                return load()
            except ModelTooLargeError:
                with self._lock:
                    idle = {key: (one.last_used, one.name) for key, one in self._models.items() if not one.users}
                if not idle:
                    raise
            # Out here, neither the exception nor a variable holds a model.
            key = min(idle, key=lambda key: idle[key][0])
            console.notice(f"low memory; unloaded {idle[key][1]}")
            self._evict([key])

    def _evict(self, keys: list[Hashable]) -> None:
        """Unload those of the models that are idle."""
        with self._lock:
            idle = [key for key in keys if key in self._models and not self._models[key].users]
            for key in idle:
                del self._models[key]
        if not idle:
            return
        gc.unfreeze()  # Models are frozen when they are loaded.
        gc.collect()
        gc.freeze()
        return_freed_memory()


class ModelLease:
    """The models that one user of a cache holds: a job in the worker, or a whole process."""

    def __init__(self, cache: ModelCache, unlocked: Unlocked = nullcontext) -> None:
        self._cache, self._unlocked = cache, unlocked
        self._held: dict[Hashable, CachedModel] = {}

    def get(self, name: str, key: Hashable, load: Load) -> "Pipeline":
        if key not in self._held:
            self._held[key] = self._cache.acquire(name, key, load, self._unlocked)
        return self._held[key].loading.result()

    def release(self, keep_alive_s: float | None) -> None:
        for cached in self._held.values():
            self._cache.release(cached, keep_alive_s)
        self._held.clear()
