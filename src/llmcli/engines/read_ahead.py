"""Reading input ahead in a thread, so that a slow input does not delay records that have already arrived."""

import queue
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(AbstractContextManager["ReadAhead[T]"], Generic[T]):
    """Items of a slow iterable, as they arrive. At most `ahead` of them wait in memory.

    An exception of the iterable is raised by `take` after the items that precede it.
    """

    def __init__(self, items: Iterable[T], ahead: int) -> None:
        # A Queue with a maximum would lock and wake four times for each item.
        self._queue: queue.SimpleQueue[tuple[T | None, BaseException | None, bool]] = queue.SimpleQueue()
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
                item, exc, is_last = self._queue.get(block=waits)
            except queue.Empty:
                break
            if is_last and exc and taken:
                self._queue.put((item, exc, is_last))
                break
            if exc:
                raise exc
            if is_last:
                self.has_ended = True
            else:
                taken.append(item)  # type: ignore[arg-type]
        self._vacancy.set()
        return taken

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._vacancy.set()

    def _read(self) -> None:
        exc: BaseException | None = None
        try:
            for item in self._iterator:
                self._queue.put((item, None, False))
                if self._queue.qsize() >= self._ahead:
                    self._wait()
                if self._stopped:
                    return
        except BaseException as caught:  # raised again in the thread that takes the items
            exc = caught
        self._queue.put((None, exc, True))

    def _wait(self) -> None:
        """Wait until items are taken."""
        self._vacancy.clear()
        if self._queue.qsize() >= self._ahead and not self._stopped:  # checked again: items may just have been taken
            self._vacancy.wait()
