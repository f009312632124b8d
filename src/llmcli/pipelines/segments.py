"""Batches of any model that `generate` decodes greedily or by sampling: rows leave them when they end."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from llmcli.compat.cache import can_select_rows, select_rows
from llmcli.compat.transformers import optimized_decoding, read_next, read_prompts
from llmcli.pipelines.decoding import RowSampler
from llmcli.pipelines.running import BatchSettings, GeneratingRow, Prefix, WholeBatch

if TYPE_CHECKING:
    from llmcli.pipelines.base import Inputs

MIN_ENDED_FRACTION = 0.25  # of the rows that the model reads: to drop fewer is not worth a copy of the others' cache
# Beside warpers, what changes the scores of a row by this row alone, and keeps nothing of it.
ROW_PROCESSORS = {
    "ExponentialDecayLengthPenalty", "ForcedBOSToken", "ForcedEOSToken", "InfNanRemove", "LogitNormalization",
    "MinLength", "MinNewTokensLength", "NoBadWords", "NoRepeatNGram", "SequenceBias", "SuppressTokens",
    "SuppressTokensAtBegin",
}  # fmt: skip


class SegmentedBatch(WholeBatch):
    """Rows that begin in one call of the pipeline, and leave when they end. None may join them."""

    @staticmethod
    def is_possible(settings: BatchSettings) -> bool:
        """Return whether rows may leave: beams and the sequences of one prompt end together."""
        config = settings.config
        is_plain = config.get_generation_mode() in ("greedy_search", "sample")
        is_single = (config.num_return_sequences or 1) == 1 and settings.streamer is None
        return is_plain and is_single and settings.max_rows > 1 and settings.logprobs is None

    def add(self, rows: Sequence[GeneratingRow], prefix: Prefix | None = None) -> None:
        super().add(rows, prefix)
        self._parts: Iterator[tuple[Inputs, list[int]]] | None = None

    def step(self) -> "dict[int, Inputs]":
        if self._count == 1:
            return super().step()
        if self._parts is None:
            self._parts = self._pipeline.forward(self._inputs, **self._options, is_segmented=True)["parts"]
        else:
            self._timer.times = [time.perf_counter()]
        with self._pipeline.device_placement(), self._pipeline.get_inference_context()():
            outputs, ended = next(self._parts)
        self.speed = self._timer.speed
        return self._split(outputs, ended)


@dataclass
class SegmentDecoder:
    """Decodes greedily or by sampling: what `generate` takes as `custom_generate`, which then returns an iterator.

    Each item has all tokens so far (B, T), prompts included, and the rows that have ended since the one before.
    """

    seeds: Sequence[int | None] | None

    def __call__(
        self, model: PreTrainedModel, input_ids: torch.Tensor, logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig, **settings: Any,
    ) -> Iterator[tuple[torch.Tensor, list[int]]]:  # fmt: skip
        if self.seeds and generation_config.do_sample:
            logits_processor.append(RowSampler(self.seeds, 1, input_ids.device))
        rows = _Rows(model, input_ids, logits_processor, stopping_criteria, generation_config, settings)
        while rows.unfinished:
            with optimized_decoding(model):
                ended = rows.decode()
            yield rows.ids, ended


class _Rows:
    """B rows. The model reads those of `places`, among which are the unfinished ones, at the same length.

    All rows keep their place in `ids`, so that processors and criteria find there what they keep of each.
    """

    def __init__(
        self, model: PreTrainedModel, ids: torch.Tensor, processors: LogitsProcessorList,
        criteria: StoppingCriteriaList, config: GenerationConfig, settings: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.ids, self.processors, self.criteria, self.config = model, ids, processors, criteria, config
        self.unfinished, self.padding = list(range(len(ids))), config.pad_token_id or 0
        self.places = torch.arange(len(ids), device=ids.device)
        names = [type(processor).__name__.removesuffix("LogitsProcessor") for processor in processors]
        self.is_by_row = all(name.endswith("Warper") or name in ROW_PROCESSORS for name in names)
        self.logits, self.settings = read_prompts(model, ids, config, settings)
        self.can_leave = not config.cache_implementation and can_select_rows(model, self.settings, len(ids))

    def decode(self) -> list[int]:
        """Decode until rows have ended, or all if they cannot leave, and return them."""
        ended = list[int]()
        while self.unfinished and not (ended and self.can_leave):
            if self.logits is None:
                self.logits, self.settings = read_next(self.model, self.ids[self.places], self.settings)
            column = self.ids.new_full((len(self.ids),), self.padding)
            column[self.unfinished] = self._choose()[self.unfinished]
            self.ids, self.logits = torch.cat([self.ids, column[:, None]], 1), None
            is_done = self.criteria(self.ids, None).tolist()
            ended += [i for i in self.unfinished if is_done[i]]
            self.unfinished = [i for i in self.unfinished if not is_done[i]]
        if len(self.unfinished) <= (1 - MIN_ENDED_FRACTION) * len(self.places) and self.unfinished:
            kept = torch.isin(self.places, torch.tensor(self.unfinished, device=self.places.device))
            self.settings = select_rows(self.settings, kept.nonzero().flatten(), len(kept))
            self.places = self.places[kept]
        return ended

    def _choose(self) -> torch.Tensor:
        """Return the next token of all rows, any for those that the model does not read."""
        places, logits = self.places, self.logits
        if not self.is_by_row:
            places = torch.arange(len(self.ids), device=self.ids.device)
            logits = logits.new_zeros(len(places), logits.shape[1]).index_copy_(0, self.places, logits)
        scores = self.processors(self.ids[places], logits)
        chosen = torch.multinomial(scores.softmax(-1), 1).flatten() if self.config.do_sample else scores.argmax(-1)
        return self.ids.new_zeros(len(self.ids)).index_copy_(0, places, chosen)
