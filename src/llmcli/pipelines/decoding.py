"""The sequences of a batch, the choice of their next tokens, and a step without the Python code of the model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from llmcli import console
from llmcli.compat.cache import SlotCache
from llmcli.compat.recording import Recording, RecordingError
from llmcli.compat.torch import capture_graph
from llmcli.compat.transformers import sample_tokens
from llmcli.errors import first_line
from llmcli.pipelines.base import check_finite

if TYPE_CHECKING:
    from llmcli.pipelines.answers import TokenDecoder

SEED_STRIDE = 0x9E3779B9  # between the seeds of a prompt's sequences: a CPU looks at 32 bits of each
# Each `LogitsProcessor` by what it reads beside the scores: nothing, which tokens are there, and in which order.
SCORES = ("Warper", "SuppressTokensLogitsProcessor", "InfNanRemoveLogitsProcessor", "LogitNormalization")
TOKENS = ("RepetitionPenaltyLogitsProcessor",)
ORDER = ("NoRepeatNGramLogitsProcessor", "NoBadWordsLogitsProcessor", "SequenceBiasLogitsProcessor")


class RowSampler(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Draws the next tokens of rows, by number: each by a random state of its own if it has a seed.

    As the last `LogitsProcessor` of `generate`, it excludes all other tokens.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._generators = device, dict[int, torch.Generator]()

    def add(self, number: int, seed: int, copy: int) -> None:
        """Give a row the random state of a seed: another one for each copy of it."""
        self._generators[number] = torch.Generator(self._device).manual_seed((seed + copy * SEED_STRIDE) % 2**64)

    def remove(self, number: int) -> None:
        self._generators.pop(number, None)

    def draw(self, numbers: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
        """Return a token (R,) of each row, by its scores (R, V), as `multinomial` does, which breaks a GPU at NaN."""
        probabilities = scores.softmax(-1)
        noise = torch.empty_like(probabilities)
        if self._generators:
            for number, row in zip(numbers, noise, strict=True):
                row.exponential_(generator=self._generators.get(number))
        else:
            noise.exponential_()
        best, tokens = (probabilities / noise).max(-1)
        check_finite(best.numpy(force=True))
        return tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = self.draw(range(len(scores)), scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)


def find_best(scores: torch.Tensor) -> torch.Tensor:
    """Return the best token (R,) by scores (R, V). On a CPU, `argmax` is five times as slow as NumPy's."""
    return torch.from_numpy(scores.numpy().argmax(-1)) if scores.device.type == "cpu" else scores.argmax(-1)


def sample_with(sampler: RowSampler) -> Callable[..., torch.Tensor]:
    """Return a `custom_generate` that samples as `generate` does, but draws tokens by a sampler."""

    def run(
        model: Any, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, **settings: Any
    ) -> torch.Tensor:
        return sample_tokens(model, input_ids, LogitsProcessorList([*logits_processor, sampler]), **settings)

    return run


def can_adjust(processors: LogitsProcessorList) -> bool:
    """Return whether `adjust_scores` gives each row what it gets alone."""
    return all(kind_of(one) in (*SCORES, *TOKENS, *ORDER) for one in processors)


def kind_of(processor: LogitsProcessor) -> str:
    """Return the name of a `LogitsProcessor`, without what tells warpers from each other."""
    name = type(processor).__name__
    return "Warper" if name.endswith("Warper") else name


@dataclass(slots=True, eq=False)
class TokenSequence:
    """A sequence that a row generates: `number` of the batch, in a slot of the cache from column `begin` on."""

    number: int
    row: int
    prompt: Sequence[int]
    limit: int
    decode: "TokenDecoder | None"  # if it may end with a stop text
    deadline: float
    slot: int = -1  # none: it has ended
    begin: int = 0
    tokens: list[int] = field(default_factory=list)  # new ones
    read_count: int = 0  # of these, how many the model has read
    logprobs: list[tuple[np.ndarray, ...]] = field(default_factory=list)  # of each new token


def group_by_length(lengths: Sequence[int], known: int, tokens: int) -> Iterator[list[int]]:
    """Yield the indices of rows of similar lengths, which are read at once: at most `tokens` with padding."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * (lengths[i] - known) > tokens:
            yield group
            group = []
        group.append(i)
    yield group


def make_block(slots: Sequence[TokenSequence | None], columns: int) -> np.ndarray:
    """Return the next tokens of all slots, at the right end, their positions, and a mask (3, B, columns).

    Free slots read something too: without a token, they would have NaN.
    """
    if columns == 1:
        for sequence in slots:
            if sequence:
                sequence.read_count += 1
        tokens = [known.tokens[known.read_count - 1] if known else 0 for known in slots]
        positions = [len(known.prompt) + known.read_count - 1 if known else 0 for known in slots]
        return np.array([tokens, positions, [1] * len(tokens)])[..., None]
    block = np.zeros((3, len(slots), columns), np.int64)
    block[2, :, -1] = 1
    for slot, sequence in enumerate(slots):
        if sequence:
            begin, first = sequence.read_count, len(sequence.prompt)
            part = sequence.tokens[begin : begin + columns]
            places = range(first + begin, first + begin + len(part))
            block[:, slot, columns - len(part) :] = part, places, [1] * len(part)
            sequence.read_count += len(part)
    return block


def adjust_scores(processors: LogitsProcessorList, rows: Sequence[TokenSequence], scores: torch.Tensor) -> torch.Tensor:
    """Return scores (R, V) as each `LogitsProcessor` of `generate` changes them for rows of different lengths."""
    for processor in processors:
        kind = kind_of(processor)
        if kind in ORDER:
            texts = [torch.tensor([[*row.prompt, *row.tokens]], device=scores.device) for row in rows]
            scores = torch.cat([processor(ids, row) for ids, row in zip(texts, scores.split(1), strict=True)])
        else:
            scores = processor(_pad(rows, scores.device) if kind in TOKENS else None, scores)
    return scores


def _pad(rows: Sequence[TokenSequence], device: torch.device) -> torch.Tensor:
    """Return tokens (R, P) of rows, the shorter ones with their first token repeated."""
    length = max(len(row.prompt) + len(row.tokens) for row in rows)
    ids = np.empty((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        ids[i] = row.prompt[0]
        ids[i, length - len(row.prompt) - len(row.tokens) :] = [*row.prompt, *row.tokens]
    return torch.from_numpy(ids).to(device)


class DecodeGraph:
    """A pass that reads one token of each row of a cache, captured as a CUDA graph.

    It is launched as a whole, where a GPU would wait for the launch of each kernel. A graph reads and writes the same
    memory each time: it holds as long as the cache has the same `shape`. Attention is to all columns of the cache.
    """

    def __init__(self, call: Callable[..., torch.Tensor], cache: SlotCache) -> None:
        self._cache, self.shape = cache, cache.mask.shape
        self._ids, self._positions = (cache.mask.new_zeros(len(cache.mask), 1, dtype=torch.int64) for _ in range(2))
        self._column = cache.mask.new_zeros(1, dtype=torch.int64)
        self._column.fill_(cache.end)

        def step() -> torch.Tensor:
            cache.column = self._column
            try:
                cache.mask.index_fill_(1, self._column, True)
                return call(self._ids, cache.mask[:, None, None], self._positions, cache)
            finally:
                cache.column = None

        self._replay, self._logits = capture_graph(step, cache.mask.device)

    @classmethod
    def capture(cls, call: Callable[..., torch.Tensor], cache: SlotCache) -> "DecodeGraph | None":
        """Return the graph of a model's step, or None if the model cannot be captured."""
        try:
            return cls(call, cache)
        except RuntimeError as exc:  # A model may need a number from the GPU on the way, as some experts' routers do.
            if console.verbose:
                console.notice(f"decoding without a CUDA graph: {first_line(exc)}")
            return None

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, V) after the next tokens (B, 1) at these positions, which the next call overwrites."""
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        self._column.fill_(self._cache.end)
        self._replay()
        return self._logits


class RecordedStep:
    """A pass of a CPU that reads one token of each row of a cache, without the Python code of the model's modules.

    Its first two calls are recorded. If both made the same calls of PyTorch, later ones make these alone.
    """

    def __init__(self) -> None:
        self._first: Recording | None = None
        self._run: Callable[..., Tensor] | None = None
        self.has_failed = False

    def __call__(self, call: Callable[..., Tensor], *inputs: Tensor | None, cache: SlotCache) -> Tensor:
        """Return the logits (B, V) that the call of a model returns for inputs and a cache."""
        arguments, length = (*inputs, *cache.layers), cache.get_seq_length()
        if self._run:
            return self._run(*arguments, length)
        if self.has_failed:
            return call(*inputs, cache)
        try:
            first, self._first = self._first, Recording(lambda *_: call(*inputs, cache), arguments, length)
            logits, run = self._first.result, first.bind(self._first) if first else None
            if run and not torch.allclose(run(*arguments, length), logits, 0, 0, equal_nan=True):
                raise RecordingError("it computes something else in each step")
        except Exception as exc:  # If it has another cause, the same call without a recording will raise it, too.
            self._first, self.has_failed = None, True
            if console.verbose:
                console.notice(f"decoding without a recorded step: {first_line(exc)}")
            return call(*inputs, cache)
        self._run = run
        return logits
