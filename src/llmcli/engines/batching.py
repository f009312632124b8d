"""Which rows run together, and how many."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

FIRST, MOST = 8, 128
GAIN = 1.1  # a greater batch has to be so much quicker a token


def neighbours(lengths: Sequence[int], size: int) -> list[int]:
    """Indices of up to `size` rows: the first, which has waited longest, and those nearest to it in length."""
    if len(lengths) <= size:
        return list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    low = high = order.index(0)
    while high - low + 1 < size:
        below = lengths[0] - lengths[order[low - 1]] if low else float("inf")
        above = lengths[order[high + 1]] - lengths[0] if high + 1 < len(order) else float("inf")
        if below <= above:
            low -= 1
        else:
            high += 1
    return order[low : high + 1]


class BatchSize:
    """Rows a batch: as asked for or, where that is None, doubled while that makes a token cheaper. Memory that runs
    out halves it for good."""

    def __init__(self, asked: int | None) -> None:
        self.now = asked or FIRST
        self.most = asked or MOST
        self._settled = asked is not None
        self._best = 0.0

    @contextmanager
    def measured(self, rows: int, tokens: int) -> Iterator[None]:
        """Around one batch of so many rows and tokens, padding included."""
        start = time.perf_counter()
        yield
        if self._settled or rows < self.now:  # the last rows of an input say nothing of a full batch
            return
        speed = tokens / (time.perf_counter() - start)
        if speed < GAIN * self._best:
            self._settled = True
            self.now = max(FIRST, self.now // 2)
        else:
            self._best = speed
            self.now = min(2 * self.now, self.most)
            self._settled = self.now == self.most

    def halve(self) -> None:
        """Memory ran out."""
        self.now = self.most = max(1, self.now // 2)
        self._settled = True


def common(rows: Sequence[list[int]]) -> list[int]:
    """What all of them begin with."""
    least, most = min(rows), max(rows)  # of sorted rows, the first and the last differ earliest
    end = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), min(len(least), len(most)))
    return least[:end]
