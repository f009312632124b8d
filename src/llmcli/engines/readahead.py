"""Reading ahead in a thread, so that a slow input never delays records that are there already."""

import queue
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(AbstractContextManager["ReadAhead[T]"], Generic[T]):
    """Items of a slow iterable, as they come; at most `ahead` wait in memory.

    An exception of the iterable comes out where the items before it have been given.
    """

    def __init__(self, items: Iterable[T], ahead: int) -> None:
        # A Queue with a maximum would lock and wake four times for each item.
        self._queue: queue.SimpleQueue[tuple[T | None, BaseException | None, bool]] = queue.SimpleQueue()
        self._room = threading.Event()
        self._ahead = ahead
        self._iterator = iter(items)
        self._stopped = False
        self.ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def take(self, most: int, *, least: int) -> list[T]:
        """Up to `most` items: those that are there, and where they are fewer than `least`, as many once they come."""
        taken: list[T] = []
        while len(taken) < most and not self.ended:
            if waits := len(taken) < least:
                self._room.set()
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
                self.ended = True
            else:
                taken.append(item)  # type: ignore[arg-type]
        self._room.set()
        return taken

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._room.set()

    def _read(self) -> None:
        exc: BaseException | None = None
        try:
            for item in self._iterator:
                self._queue.put((item, None, False))
                if self._queue.qsize() >= self._ahead:
                    self._wait()
                if self._stopped:
                    return
        except BaseException as caught:  # handed to the reading side, whatever it is
            exc = caught
        self._queue.put((None, exc, True))

    def _wait(self) -> None:
        """Until some are taken."""
        self._room.clear()
        if self._queue.qsize() >= self._ahead and not self._stopped:  # still, after the Event can be set again
            self._room.wait()
