"""Batches of any model that `generate` decodes greedily or by sampling: rows leave them when they end."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from llmcli.compat.cache import can_select_rows, select_rows, shares_sources
from llmcli.compat.transformers import (
    beam_search,
    excluded_tokens,
    read_next,
    single_token_context,
    uses_sdpa,
)
from llmcli.models.loading import architectures
from llmcli.pipelines.decoding import ORDER, SCORES, RowSampler, find_best, kind_of
from llmcli.pipelines.running import FREE_FRACTION, BatchSettings, WholeBatch, split_outputs

if TYPE_CHECKING:
    from llmcli.pipelines.base import Inputs

# Each `LogitsProcessor` that changes scores of a row by this row alone, and keeps nothing of it.
BY_ROW = {
    *SCORES, *ORDER, "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor", "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
}  # fmt: skip


class SegmentedBatch(WholeBatch):
    """Rows that begin in one call of the pipeline, and leave when they end. None may join them."""

    _parts: "Iterator[tuple[Inputs, list[int]]] | None" = None

    @staticmethod
    def is_possible(settings: BatchSettings) -> bool:
        """Return whether rows may leave: beams and the sequences of one prompt end together."""
        config = settings.config
        is_plain = config.get_generation_mode() in ("greedy_search", "sample")
        is_single = (config.num_return_sequences or 1) == 1 and settings.streamer is None
        return is_plain and is_single and settings.max_rows > 1 and settings.logprobs is None

    def step(self) -> "dict[int, Inputs]":
        if self._parts is None:
            self._parts = self._pipeline.forward(self._inputs, **self._options, is_segmented=True)["parts"]
        else:
            self._timer.times = [time.perf_counter()]
        with self._pipeline.device_placement(), self._pipeline.get_inference_context()():
            outputs, ended = next(self._parts)
        self.speed = self._timer.speed
        return split_outputs(outputs, ended)


class TokenExclusion(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Excludes tokens from rows that are shorter than a length, in place."""

    def __init__(self, tokens: Sequence[int], length: float) -> None:
        self._tokens, self._length = torch.tensor(tokens, dtype=torch.int64), length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] < self._length:
            scores.index_fill_(1, self._tokens.to(scores.device), -torch.inf)
        return scores


def exclude_in_place(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Return each `LogitsProcessor`, without the copies (B, V) that transformers' own make to exclude a few tokens."""
    known = ((processor, excluded_tokens(processor)) for processor in processors)
    return LogitsProcessorList(TokenExclusion(*tokens) if tokens else processor for processor, tokens in known)


def search_beams(
    model: PreTrainedModel, ids: torch.Tensor, logits_processor: LogitsProcessorList, *,
    generation_config: GenerationConfig, **settings: Any,
) -> torch.Tensor:  # fmt: skip
    """Search beams as `generate` does, but read what the model has of a source once for all beams of that source."""
    is_known = model.config.model_type in architectures()["sources"]
    if is_known and uses_sdpa(model) and shares_sources(settings):
        sources = torch.arange(0, len(ids), generation_config.num_beams, device=ids.device)
        for name in ("encoder_outputs", "attention_mask"):
            settings[name] = select_rows(settings[name], sources, len(ids))
    processors = exclude_in_place(logits_processor)
    return beam_search(model, ids, processors, generation_config=generation_config, **settings)


def decode_in_segments(sampler: RowSampler) -> Callable[..., Iterator[tuple[torch.Tensor, list[int]]]]:
    """Return a `custom_generate` that decodes as `generate` does, but draws tokens by a sampler.

    It returns an iterator, which goes on until rows have ended: over all tokens so far (B, T), and those rows.
    """

    def run(*args: Any, **settings: Any) -> Iterator[tuple[torch.Tensor, list[int]]]:
        rows = _Rows(sampler, *args, **settings)
        while rows.unfinished:
            with single_token_context(rows.model):
                ended = rows.decode()
            yield rows.ids, ended

    return run


class _Rows:
    """B rows. The model reads those of `places`, among which are the unfinished ones, at the same length.

    All rows keep their place in `ids`: what changes scores or ends rows may count on it.
    """

    def __init__(
        self, sampler: RowSampler, model: PreTrainedModel, ids: torch.Tensor, logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig, **settings: Any,
    ) -> None:  # fmt: skip
        self.sampler, self.model, self.ids, self.config = sampler, model, ids, generation_config
        self.criteria = stopping_criteria
        self.places, self.unfinished = list(range(len(ids))), list(range(len(ids)))
        self.is_by_row = all(kind_of(processor) in BY_ROW for processor in logits_processor)
        self.processors = exclude_in_place(logits_processor)
        self.logits, self.settings = read_next(model, ids, settings, generation_config)
        has_own_cache = generation_config.cache_implementation is not None
        self.can_leave = not has_own_cache and can_select_rows(model, self.settings, len(ids))

    def decode(self) -> list[int]:
        """Decode until rows have ended, or all if they cannot leave, and return them."""
        ended = list[int]()
        while self.unfinished and not (ended and self.can_leave):
            if self.logits is None:
                self.logits, self.settings = read_next(self.model, self.ids[self.places], self.settings)
            column = self.ids.new_full((len(self.ids),), self.config.pad_token_id or 0)
            column[self.unfinished] = self._choose()[self.unfinished]
            self.ids, self.logits = torch.cat([self.ids, column[:, None]], 1), None
            is_done = self.criteria(self.ids, None).tolist()
            ended += [i for i in self.unfinished if is_done[i]]
            self.unfinished = [i for i in self.unfinished if not is_done[i]]
        if 0 < len(self.unfinished) <= (1 - FREE_FRACTION) * len(self.places):
            kept = torch.tensor([self.places.index(i) for i in self.unfinished], device=self.ids.device)
            total, self.places = len(self.places), self.unfinished
            self.settings = {name: select_rows(value, kept, total) for name, value in self.settings.items()}
        return ended

    def _choose(self) -> torch.Tensor:
        """Return the next tokens (B,), any for rows that the model does not read."""
        places, logits = self.places, self.logits
        if not self.is_by_row and len(places) < len(self.ids):
            logits = logits.new_zeros(len(self.ids), logits.shape[1])
            logits[places], places = self.logits, list(range(len(self.ids)))
        scores = self.processors(self.ids[places], logits)
        chosen = self.sampler.draw(places, scores) if self.config.do_sample else find_best(scores)
        tokens = torch.zeros_like(self.ids[:, -1])
        tokens[places] = chosen
        return tokens
