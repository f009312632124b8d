"""The lock on the device: one job computes at a time, and makes way for the others after each token."""

import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class FairLock:
    """A lock that goes to the thread that has waited longest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()  # the holder's, then those of the threads that wait

    @property
    def has_waiters(self) -> bool:
        return len(self._queue) > 1

    def acquire(self) -> None:
        granted = threading.Event()
        with self._lock:
            self._queue.append(granted)
            if self._queue[0] is granted:
                return
        granted.wait()

    def release(self) -> None:
        with self._lock:
            self._queue.popleft()
            if self._queue:
                self._queue[0].set()


class DeviceLock(AbstractContextManager["DeviceLock"]):
    """One job's hold on the device, with its own state of torch's random numbers. It is reentrant."""

    def __init__(self, lock: FairLock) -> None:
        self._lock = lock
        self._depth = 0
        self._rng_states: list[Tensor] = []  # the CPU's, then each CUDA device's

    def __enter__(self) -> "DeviceLock":
        if not self._depth:
            self._acquire()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._release()

    @contextmanager
    def unlocked(self) -> Iterator[None]:
        """Release the lock for a while, however deeply it is held."""
        depth, self._depth = self._depth, 0
        if depth:
            self._release()
        try:
            yield
        finally:
            if depth:
                self._acquire()
            self._depth = depth

    def yield_to_others(self) -> None:
        if self._lock.has_waiters:
            with self.unlocked():
                pass

    def _acquire(self) -> None:
        self._lock.acquire()
        if "torch" in sys.modules:
            import torch

            with suppress(RuntimeError):  # of a device that has failed: what the job runs next raises it too
                if self._rng_states:
                    cpu, *cuda = self._rng_states
                    torch.set_rng_state(cpu)
                    torch.cuda.set_rng_state_all(cuda)
                else:
                    torch.seed()  # No job's random numbers follow from the seed of another.

    def _release(self) -> None:
        if "torch" in sys.modules:
            import torch

            self._rng_states = [torch.get_rng_state()]
            with suppress(RuntimeError):
                self._rng_states += torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._lock.release()
