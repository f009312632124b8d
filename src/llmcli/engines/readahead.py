"""Reading ahead in a thread, so that a slow input never delays records that are there already."""

import contextlib
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
        self._queue: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(ahead)
        self._iterator = iter(items)
        self._stopped = False
        self.ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def take(self, most: int, *, least: int) -> list[T]:
        """Up to `most` items: those that are there, and where they are fewer than `least`, as many once they come."""
        taken: list[T] = []
        while len(taken) < most and not self.ended:
            try:
                item, problem, is_last = self._queue.get(block=len(taken) < least)
            except queue.Empty:
                break
            if is_last and problem and taken:
                self._queue.put((item, problem, is_last))
                break
            if problem:
                raise problem
            if is_last:
                self.ended = True
            else:
                taken.append(item)  # type: ignore[arg-type]
        return taken

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        with contextlib.suppress(queue.Empty):  # wakes a thread that waits to put
            self._queue.get_nowait()

    def _read(self) -> None:
        problem: BaseException | None = None
        try:
            for item in self._iterator:
                self._queue.put((item, None, False))
                if self._stopped:
                    return
        except BaseException as caught:  # handed to the reading side, whatever it is
            problem = caught
        self._queue.put((None, problem, True))
