"""Reading input ahead in a thread, so that a slow input does not delay records that have already arrived."""

import queue
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(AbstractContextManager["ReadAhead[T]"], Generic[T]):
    """Items of a slow iterable, as they arrive; at most `ahead` wait. Its exception is raised after its last item."""

    def __init__(self, items: Iterable[T], ahead: int) -> None:
        # A Queue with a maximum would lock and wake four times for each item.
        self._queue: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self._vacancy = threading.Event()
        self._ahead = ahead
        self._iterator = iter(items)
        self._stopped = False
        self.has_ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def take(self, maximum: int, *, minimum: int) -> list[T]:
        """Return the items that have arrived, at most `maximum`; wait only for the first `minimum`."""
        taken: list[T] = []
        while len(taken) < maximum and not self.has_ended:
            if waits := len(taken) < minimum:
                self._vacancy.set()
            try:
                item = self._queue.get(block=waits)
            except queue.Empty:
                break
            if not isinstance(item, BaseException):
                taken.append(item)
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
                self._queue.put(item)
                if self._queue.qsize() >= self._ahead:
                    self._vacancy.clear()
                    if self._queue.qsize() >= self._ahead and not self._stopped:  # items may just have been taken
                        self._vacancy.wait()
                if self._stopped:
                    return
        except BaseException as exc:  # raised again in the thread that takes the items
            end = exc
        self._queue.put(end)
