"""Reading input ahead in a thread, so that a slow input does not delay records that have already arrived."""

import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from math import inf
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(AbstractContextManager["ReadAhead[T]"], Generic[T]):
    """Items of a slow iterable, as they arrive. At most `ahead` wait, and their size is at most `max_size`, except for
    the last one. The exception of the iterable is raised after its last item."""

    def __init__(
        self, items: Iterable[T], ahead: int, size: Callable[[T], int] = lambda item: 1, max_size: float = inf
    ) -> None:
        # A Queue with a maximum would lock and wake four times for each item.
        self._queue: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self._vacancy = threading.Event()
        self.ahead, self._size, self._max_size = ahead, size, max_size
        self._size_read = self._size_taken = 0  # each changed by one thread
        self._iterator = iter(items)
        self._stopped = False
        self.has_ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def take(self, maximum: int, *, minimum: int, max_size: float = inf) -> list[T]:
        """Return the items that have arrived, up to `maximum` or the size; wait only for the first `minimum`."""
        taken: list[T] = []
        size = 0
        while len(taken) < maximum and size < max_size and not self.has_ended:
            if waits := len(taken) < minimum:
                self._vacancy.set()
            try:
                item = self._queue.get(block=waits)
            except queue.Empty:
                break
            if not isinstance(item, BaseException):
                taken.append(item)
                size += self._size(item)
                self._size_taken += self._size(item)
            elif isinstance(item, StopIteration):
                self.has_ended = True
            elif taken:
                self._queue.put(item)
                break
            else:
                raise item
        self._vacancy.set()
        return taken

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._vacancy.set()

    @property
    def _is_full(self) -> bool:
        return self._queue.qsize() >= self.ahead or self._size_read - self._size_taken >= self._max_size

    def _read(self) -> None:
        end: BaseException = StopIteration()
        try:
            for item in self._iterator:
                self._size_read += self._size(item)
                self._queue.put(item)
                if self._is_full:
                    self._vacancy.clear()
                    if self._is_full and not self._stopped:  # Items may just have been taken.
                        self._vacancy.wait()
                if self._stopped:
                    return
        except BaseException as exc:  # raised again in the thread that takes the items
            end = exc
        self._queue.put(end)
