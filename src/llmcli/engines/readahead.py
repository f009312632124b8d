"""Reading ahead in a thread, so that a slow input never delays records that are there already."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Groups of items from a slow iterable; at most `ahead` items wait in memory.

    An exception of the iterable comes out where the items before it have been given.
    """

    def __init__(self, items: Iterable[T], ahead: int) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(ahead)
        self._iterator = iter(items)
        self._stopped = False
        self._end: tuple[BaseException | None] | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def groups(self, size: int, *, wait: bool) -> Iterator[list[T]]:
        """Lists of up to `size` items. Without `wait`, a list is cut short where the next item has not come."""
        try:
            while group := self._group(size, wait):
                yield group
        finally:
            self._stopped = True
            with contextlib.suppress(queue.Empty):  # wakes a thread that waits to put
                self._queue.get_nowait()
        if self._end and self._end[0]:
            raise self._end[0]

    def _group(self, size: int, wait: bool) -> list[T]:
        group: list[T] = []
        while len(group) < size and self._end is None:
            try:
                item, problem, is_last = self._queue.get(block=wait or not group)
            except queue.Empty:
                break
            if is_last:
                self._end = (problem,)
            else:
                group.append(item)  # type: ignore[arg-type]
        return group

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
