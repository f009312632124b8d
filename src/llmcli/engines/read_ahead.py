"""Reading input ahead in a thread, so that a slow input does not delay records that have already arrived."""

import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(AbstractContextManager["ReadAhead[T]"], Generic[T]):
    """Items of a slow iterable, as they arrive; those that wait have at most the size `ahead`, except for the last one.
    The exception of the iterable is raised after its last item."""

    def __init__(self, items: Iterable[T], ahead: int, size: Callable[[T], int] = lambda item: 1) -> None:
        # A Queue with a maximum would lock and wake four times for each item.
        self._queue: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self._vacancy = threading.Event()
        self._ahead, self._size = ahead, size
        self._size_read = self._size_taken = 0  # each changed by one thread
        self._iterator = iter(items)
        self._stopped = False
        self.has_ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def take(self, maximum: int, *, minimum: int) -> list[T]:
        """Return the items that have arrived, until their size is `maximum`; wait only for the first `minimum`."""
        taken: list[T] = []
        size = 0
        while size < maximum and not self.has_ended:
            if waits := size < minimum:
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

    def _read(self) -> None:
        end: BaseException = StopIteration()
        try:
            for item in self._iterator:
                self._size_read += self._size(item)
                self._queue.put(item)
                if self._size_read - self._size_taken >= self._ahead:
                    self._vacancy.clear()
                    # Items may just have been taken.
                    if self._size_read - self._size_taken >= self._ahead and not self._stopped:
                        self._vacancy.wait()
                if self._stopped:
                    return
        except BaseException as exc:  # raised again in the thread that takes the items
            end = exc
        self._queue.put(end)
