"""Which rows run together, and how many."""

from collections.abc import Sequence
from itertools import pairwise

FIRST = 16
MOST = {"cpu": 64}  # more gains nothing there
MOST_ELSEWHERE = 256
UNIT = {"cpu": 16}  # tokens of a row, where batches are measured in tokens
UNIT_ELSEWHERE = 64
LOSS = 0.7  # how slow a greater batch may seem: the next rows may just be longer, and attention slower for that


def neighbours(lengths: Sequence[int], size: int) -> list[int]:
    """Indices of at most `size` rows: the first, which has waited longest, and rows of about its length. In the order
    of length all rows are dealt into equal batches, as few as can be, so that none is left for the odd ones."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = -(-len(order) // size)
    ends = [i * len(order) // batches for i in range(batches + 1)]
    return next(batch for a, b in pairwise(ends) if 0 in (batch := order[a:b]))


def alike(lengths: Sequence[int], tokens: int) -> list[int]:
    """The same by tokens: as many rows of about the first one's length as have so many with their padding; one at
    least."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > tokens:
            if 0 in batch:
                break
            batch = []
        batch.append(i)
    return batch


class BatchSize:
    """Rows a batch: as asked for or, where that is None, doubled until a token gets dearer or the device
    has work enough. Memory that runs out halves it for good."""

    def __init__(self, asked: int | None, device: str) -> None:
        self.now = asked or FIRST
        self.most = asked or MOST.get(device, MOST_ELSEWHERE)
        self._settled = asked is not None
        self._best = 0.0

    def learn(self, rows: int, speed: float) -> None:
        """A batch of so many rows ran at `speed`, in tokens a second."""
        if self._settled or rows <= self.now // 2:  # the last rows of an input say nothing of a full batch
            return
        if speed < LOSS * self._best:
            self._settled = True
            self.now = max(FIRST, self.now // 2)
        else:
            self._best = max(speed, self._best)
            self.now = min(2 * self.now, self.most)
            self._settled = self.now == self.most

    def halve(self) -> None:
        """Memory ran out."""
        self.now = self.most = max(1, self.now // 2)
        self._settled = True
