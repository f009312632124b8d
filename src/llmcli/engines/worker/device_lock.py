"""Whose turn it is to compute: one job at a time, until the others' next token."""

import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class FairLock:
    """Held by one thread at a time; who has waited longest is next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._is_held = False

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it."""
        return bool(self._waiting)

    def take(self) -> None:
        with self._lock:
            if not self._is_held:
                self._is_held = True
                return
            given = threading.Event()
            self._waiting.append(given)
        given.wait()

    def pass_on(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._is_held = False


class DeviceLock(AbstractContextManager["DeviceLock"]):
    """The turns of one job, with a state of torch's random numbers of its own. They nest; `released` lets others go
    first for a while."""

    def __init__(self, baton: FairLock) -> None:
        self._baton = baton
        self._depth = 0
        self._random: list[Any] = []

    def __enter__(self) -> "DeviceLock":
        if not self._depth:
            self._begin()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._end()

    @contextmanager
    def released(self) -> Iterator[None]:
        depth, self._depth = self._depth, 0
        if depth:
            self._end()
        try:
            yield
        finally:
            if depth:
                self._begin()
            self._depth = depth

    def offer(self) -> None:
        """Let others go first, if there are any."""
        if self._baton.is_wanted:
            with self.released():
                pass

    def _begin(self) -> None:
        self._baton.take()
        if generators := _generators():
            if self._random:
                for module, state in zip(generators, self._random, strict=False):
                    module.set_rng_state(state)
            else:
                generators[0].seed()  # of all devices: nobody's numbers follow from another's seed

    def _end(self) -> None:
        self._random = [module.get_rng_state() for module in _generators()]
        self._baton.pass_on()


def _generators() -> list[Any]:
    """Modules of torch, if it is loaded, that have random states of their own."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_rng_state"):  # maybe another thread is importing it
        return []
    return [torch, torch.cuda] if torch.cuda.is_initialized() else [torch]
