"""Batching policies: which rows run together, how many, and whether they fit in memory."""

from collections.abc import Sequence
from itertools import pairwise

from llmcli.engines.memory import MemoryEstimator

INITIAL_ROWS = 16
MAX_ROWS = {"cpu": 64}  # larger batches gain nothing there
MAX_ROWS_ACCELERATOR = 256
TOKENS_PER_ROW = {"cpu": 16}  # the length of a row where a batch is measured in tokens
TOKENS_PER_ROW_ACCELERATOR = 64
MIN_SPEED_RATIO = 0.7  # a larger batch may seem slower only because its rows are longer


class BatchPolicy:
    """Chooses batches. `choose` one, then report by `observe` or `observe_out_of_memory` how it went.

    A batch is measured in rows: for generation, where each step takes as long for long rows as for short ones. The
    `size` of batches, if None, doubles while throughput improves, unless `is_fixed`. A batch also has to fit in
    memory, with `answer_tokens` for each row. A batch that ran out of memory limits the tokens of later ones, not their
    rows: one long record does not make batches of short records smaller.
    """

    def __init__(
        self, size: int | None, device: str, memory: MemoryEstimator, answer_tokens: int = 0, is_fixed: bool = False
    ) -> None:
        self.memory = memory
        self.shared_tokens = 0  # of each row, which no batch computes again, but copies
        self.size = size or INITIAL_ROWS
        self._max_size = size or MAX_ROWS.get(device, MAX_ROWS_ACCELERATOR)
        self._tokens_per_row = TOKENS_PER_ROW.get(device, TOKENS_PER_ROW_ACCELERATOR)
        self._answer_tokens = answer_tokens
        self._is_settled = is_fixed or size is not None
        self._is_fixed = is_fixed
        self._best_speed = 0.0

    def choose(self, lengths: Sequence[int]) -> list[int]:
        """Return the indices of the next batch, the first row and similar ones, by the `lengths` of all rows."""
        fits = self.memory.is_below_failure if self._is_fixed else self.memory.fits
        size = self.size
        while True:
            batch = self._select(lengths, size)
            chosen = [lengths[i] for i in batch]
            if len(batch) == 1 or fits(self._count_tokens(chosen)):
                return batch
            size = max(1, self._measure(chosen) // 2)

    def observe(self, lengths: Sequence[int], tokens_per_second: float) -> None:
        self.memory.observe(self._count_tokens(lengths))
        rows = self._measure(lengths)
        if self._is_settled or rows <= self.size // 2:  # the last rows of an input tell nothing about a full batch
            return
        if tokens_per_second < MIN_SPEED_RATIO * self._best_speed:
            self._is_settled = True
            self.size = max(INITIAL_ROWS, self.size // 2)
        else:
            self._best_speed = max(tokens_per_second, self._best_speed)
            self.size = min(2 * self.size, self._max_size)
            self._is_settled = self.size == self._max_size

    def observe_out_of_memory(self, lengths: Sequence[int]) -> None:
        self.memory.observe_failure(self._count_tokens(lengths))

    def _count_tokens(self, lengths: Sequence[int]) -> int:
        """Return the tokens of a batch, with padding and answers."""
        return len(lengths) * (self.shared_tokens + max(lengths) + self._answer_tokens)

    def _select(self, lengths: Sequence[int], size: int) -> list[int]:
        """Return the indices of the first row and of rows of similar length, at most `size`.

        Sorted by length, all rows are divided into as few equal batches as possible, so that no batch mixes what is
        left.
        """
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        count = -(-len(order) // size)
        ends = [i * len(order) // count for i in range(count + 1)]
        position = order.index(0)
        start, end = next((start, end) for start, end in pairwise(ends) if start <= position < end)
        return order[start:end]

    def _measure(self, lengths: Sequence[int]) -> int:
        return len(lengths)


class TokenBatchPolicy(BatchPolicy):
    """Measures a batch in tokens: where one forward pass reads all of them. `size` counts rows of a fixed length."""

    def _select(self, lengths: Sequence[int], size: int) -> list[int]:
        """Return the indices of the first row and of similar ones: with padding at most `size`, at least one row."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) + 1) * lengths[i] > size * self._tokens_per_row:
                if 0 in batch:
                    break
                batch = []
            batch.append(i)
        return batch

    def _measure(self, lengths: Sequence[int]) -> int:
        return len(lengths) * max(lengths) // self._tokens_per_row
