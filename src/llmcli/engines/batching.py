"""Batching policies: which rows run together, how many, and whether they fit in memory."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from llmcli.engines.memory import MemoryEstimator

INITIAL_ROWS = {"cpu": 16}
INITIAL_ROWS_ACCELERATOR = 256  # fewer do not keep it busy
MAX_ROWS = {"cpu": 64}  # larger batches gain nothing there
MAX_ROWS_ACCELERATOR = 1024
TOKENS_PER_ROW = {"cpu": 16}  # the length of a row where a batch is measured in tokens
TOKENS_PER_ROW_ACCELERATOR = 256
WINDOW_BATCHES = 8  # among whose rows a batch is chosen
MIN_SPEED_RATIO = 0.7  # a larger batch may seem slower only because its rows are longer


class BatchPolicy:
    """Chooses batches. `choose` one, then report by `observe` or `observe_out_of_memory` how it went.

    A batch is measured in rows: for generation, where each step takes as long for long rows as for short ones. The
    `size` of batches, if None, doubles while throughput improves, unless `is_fixed`; on a CPU it `starts_full` where no
    rows can join a small batch later. A batch also has to fit in memory, with `answer_tokens` for each row. A batch
    that ran out of memory limits the tokens of later ones, not their rows: one long record does not make batches of
    short records smaller.
    """

    def __init__(
        self, size: int | None, device: str, memory: MemoryEstimator, answer_tokens: int = 0, is_fixed: bool = False,
        starts_full: bool = False,
    ) -> None:  # fmt: skip
        self.memory = memory
        self.shared_tokens = 0  # of each row, which no batch computes again, but copies
        self._min_size = INITIAL_ROWS.get(device, INITIAL_ROWS_ACCELERATOR)
        maximum = MAX_ROWS.get(device, MAX_ROWS_ACCELERATOR)
        self.size = size or (maximum if starts_full and device == "cpu" else self._min_size)
        self._max_size = size or (self.size if is_fixed else maximum)
        self._tokens_per_row = TOKENS_PER_ROW.get(device, TOKENS_PER_ROW_ACCELERATOR)
        self._answer_tokens = answer_tokens
        self._is_settled = is_fixed or size is not None
        self.is_fixed = is_fixed
        self._best_speed = 0.0
        self._forget_steps()

    @property
    def window(self) -> int:
        """How many rows to choose batches from."""
        return WINDOW_BATCHES * self.size

    def choose(self, lengths: Sequence[int], running: Sequence[int] = (), size: int | None = None) -> list[int]:
        """Return the indices of the next batch, the first row and similar ones, by the `lengths` of all rows.

        If rows are `running`, return those that join them, up to `size` rows: none if memory does not allow it.
        """
        room = (size or self.size) - len(running)
        while room > 0:
            batch = self._select(lengths, room)
            together = [*running, *(lengths[i] for i in batch)]
            if len(together) == 1 or self._fits(len(together), max(together)):
                return batch
            room = max(not running, self._measure([lengths[i] for i in batch]) // 2)
        return []

    def plan(self, lengths: Sequence[int], chosen: Sequence[int]) -> tuple[int, int]:
        """Return how many rows a batch of the `chosen` ones may come to have, and the maximum of their lengths.

        The maximum is by the `lengths` of those that wait. The few that are far longer would make all others longer.
        """
        ordered, others = sorted(lengths), self.shared_tokens + self._answer_tokens
        limit = 2 * (ordered[len(ordered) * 7 // 8] + others) - others
        fitting = (length for length in reversed(ordered) if length <= limit and self._fits(len(chosen), length))
        longest = max(next(fitting, 0), *chosen)
        sizes = range(self.size, len(chosen), -1)
        return next((size for size in sizes if self._fits(size, longest)), len(chosen)), longest

    def observe_step(self, ended: int, speed: float, is_full: bool) -> None:
        """Note the speed of a step of a running batch, and how many of its rows have ended."""
        self._ended += ended
        if is_full:
            self._speeds.append(speed)
        if self._ended >= len(self.largest):  # only then, rows have taken the memory of whole answers
            self.observe(self.largest, median(self._speeds or [0.0]))
            self._forget_steps()

    def observe(self, lengths: Sequence[int], tokens_per_second: float) -> None:
        """Note the speed of a batch, 0 if it is unknown, and the memory that it has taken."""
        self.memory.observe(self._count_tokens(len(lengths), max(lengths)), len(lengths))
        rows = self._measure(lengths)
        # The last rows of an input tell nothing about a full batch.
        if self._is_settled or rows <= self.size // 2 or not tokens_per_second:
            return
        if tokens_per_second < MIN_SPEED_RATIO * self._best_speed:
            self._is_settled = True
            self.size = max(self._min_size, self.size // 2)
        else:
            self._best_speed = max(tokens_per_second, self._best_speed)
            self.size = min(2 * self.size, self._max_size)
            self._is_settled = self.size == self._max_size

    def observe_out_of_memory(self, lengths: Sequence[int]) -> None:
        self._forget_steps()
        self.memory.observe_failure(self._count_tokens(len(lengths), max(lengths)))

    def _forget_steps(self) -> None:
        self.largest: Sequence[int] = ()  # lengths of the largest running batch since the last observation
        self._ended, self._speeds = 0, list[float]()

    def _count_tokens(self, rows: int, longest: int) -> int:
        """Return the tokens of a batch, with padding and answers."""
        return rows * (self.shared_tokens + longest + self._answer_tokens)

    def _fits(self, rows: int, longest: int) -> bool:
        tokens = self._count_tokens(rows, longest)
        return self.memory.is_below_failure(tokens) if self.is_fixed else self.memory.fits(tokens, rows)

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

    _mean_length = 1.0  # of the rows that wait

    @property
    def window(self) -> int:
        return int(WINDOW_BATCHES * self.size * self._tokens_per_row / self._mean_length)

    def _select(self, lengths: Sequence[int], size: int) -> list[int]:
        """Return the indices of the first row and of similar ones: with padding at most `size`, at least one row."""
        self._mean_length = sum(lengths) / len(lengths)
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
