"""Decoding with what transformers' `generate` lacks: forced tokens, and a random state for each row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from llmcli.compat.cache import filled_cache
from llmcli.compat.transformers import sample_tokens
from llmcli.pipelines.constraints import ConstraintProcessor

# What a forward pass costs whatever it reads, measured in tokens. A GPU reads all that a batch may have in that time.
PASS_TOKENS = {"cpu": 64}
PASS_TOKENS_ACCELERATOR = 4096
SEED_STRIDE = 0x9E3779B9  # between the seeds of a prompt's sequences: a CPU looks at 32 bits of each


class RowSampler(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """As the last of the list, draw the next token of each row by a random state of its own, and exclude all others.

    Rows without a seed draw by the common random state. `rows` are those whose scores it gets, all if None.
    """

    rows: Sequence[int] | None = None

    def __init__(self, seeds: Sequence[int | None], copies: int, device: torch.device) -> None:
        self._generators = [
            None if seed is None else torch.Generator(device).manual_seed((seed + i * SEED_STRIDE) % 2**64)
            for seed in seeds
            for i in range(copies)
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        generators = [self._generators[i] for i in self.rows or range(len(scores))]
        rows = zip(scores.softmax(-1), generators, strict=True)
        drawn = [torch.multinomial(probability, 1, generator=generator) for probability, generator in rows]
        return torch.full_like(scores, -torch.inf).scatter_(1, torch.stack(drawn), 0.0)


@dataclass
class Decoder:
    """Decodes greedily or by sampling: what `generate` takes as `custom_generate`.

    Tokens that a row's grammar forces are not chosen: the model reads them in one forward pass, with at most
    `max_columns` columns in its cache then. None: no maximum; 0: they come one by one.
    """

    constraint: ConstraintProcessor | None
    seeds: Sequence[int | None] | None
    streamer: BaseStreamer | None
    max_columns: int | None
    sampler: RowSampler | None = None

    def __call__(
        self, model: PreTrainedModel, input_ids: torch.Tensor, logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList, generation_config: GenerationConfig, **settings: Any,
    ) -> torch.Tensor:  # fmt: skip
        if self.seeds and generation_config.do_sample:
            self.sampler = RowSampler(self.seeds, len(input_ids) // len(self.seeds), input_ids.device)
            logits_processor.append(self.sampler)
        parts = model, input_ids, logits_processor, stopping_criteria, generation_config
        # All but warpers look at the tokens so far, and expect rows of the same length.
        others = [item for item in logits_processor if not type(item).__name__.endswith("Warper")]
        is_simple = len(input_ids) == 1 or all(item in (self.constraint, self.sampler) for item in others)
        cache = filled_cache(settings)
        if self.constraint and self.max_columns != 0 and is_simple and cache is not None:
            return _ForcedBatch(self, *parts, cache, settings).run()
        return sample_tokens(*parts, streamer=self.streamer, **settings)


class _ForcedBatch:
    """B rows that may be at different lengths, because their grammars force tokens.

    A pass reads the same number of columns of all rows, and each row's tokens are at their right end: before them is
    padding, which stays in the cache and is masked.
    """

    def __init__(
        self, decoder: Decoder, model: PreTrainedModel, ids: torch.Tensor, processors: LogitsProcessorList,
        criteria: StoppingCriteriaList, config: GenerationConfig, cache: DynamicCache, settings: dict[str, Any],
    ) -> None:  # fmt: skip
        self.decoder, self.model, self.processors, self.criteria = decoder, model, processors, criteria
        self.config, self.cache, self.settings = config, cache, settings
        self.ids, self.start = ids, ids.shape[1]
        self.tokens = [list[int]() for _ in ids]  # new ones
        self.read_counts = [0] * len(ids)  # of these, how many the model has read
        self.unfinished = set(range(len(ids)))
        self.unread = ids[:, cache.get_seq_length() :]  # of the prompts
        self.mask: torch.Tensor | None = settings.pop("attention_mask", None)
        if self.mask is None and len(ids) > 1:
            self.mask = torch.ones_like(ids)
        self.positions: torch.Tensor | None = settings.pop("position_ids", None)

    def run(self) -> torch.Tensor:
        """Return prompts and new tokens, padded at the right end, as `generate` does."""
        constraint, sampler = self.decoder.constraint, self.decoder.sampler
        assert constraint
        self._append({i: constraint.read_forced_tokens(i, []) for i in self.unfinished})
        while self.unfinished:
            logits = self._read(self._choose_columns())
            rows = [i for i in sorted(self.unfinished) if self.read_counts[i] == len(self.tokens[i])]
            if not rows:
                continue
            constraint.rows = rows
            if sampler:
                sampler.rows = rows
            scores = self.processors(self.ids[rows], logits[rows].to(self.ids.device, torch.float32))
            if self.config.do_sample and not sampler:
                chosen = torch.multinomial(scores.softmax(-1), 1).flatten()
            else:
                chosen = scores.argmax(-1)
            tokens = dict(zip(rows, chosen.tolist(), strict=True))
            new = {i: constraint.read_forced_tokens(i, [*self.tokens[i], token]) for i, token in tokens.items()}
            self._append({i: [token, *new[i]] for i, token in tokens.items()})
        if self.decoder.streamer:
            self.decoder.streamer.end()
        return self.ids

    def _choose_columns(self) -> int:
        """Return the number of columns with which passes read the maximum number of tokens per second."""
        counts = [len(self.tokens[i]) - self.read_counts[i] for i in self.unfinished]
        if not all(counts):  # Some rows begin without forced tokens: their prompts have to be at the right end.
            return 0
        most = max(counts)
        if self.decoder.max_columns:  # The tokens that may still come need a column each.
            later = self.config.max_length - self.start - min(map(len, self.tokens))
            most = min(most, max(1, self.decoder.max_columns - self.cache.get_seq_length() - later))
        fixed = PASS_TOKENS.get(self.ids.device.type, PASS_TOKENS_ACCELERATOR)

        def speed(columns: int) -> float:
            return sum(min(count, columns) for count in counts) / (fixed + columns * len(self.ids))

        return max(range(1, most + 1), key=speed)

    def _read(self, columns: int) -> torch.Tensor:
        """Read at most that many tokens of each row, and return the logits (B, V) after the last one."""
        block = np.zeros((3, len(self.ids), columns), np.int64)  # tokens, mask, positions
        for i in self.unfinished:
            begin = self.read_counts[i]
            part = self.tokens[i][begin : begin + columns]
            block[:, i, columns - len(part) :] = part, [1] * len(part), range(begin, begin + len(part))
            self.read_counts[i] += len(part)
        ids, mask, positions = torch.from_numpy(block).to(self.ids.device)
        ids, self.unread = torch.cat([self.unread, ids], 1), self.unread[:, :0]
        if self.mask is not None:
            self.mask = torch.cat([self.mask, mask], 1)
        if self.positions is not None:
            first = self.positions[:, self.start - 1 : self.start] + 1
            self.positions = torch.cat([self.positions, first + positions], 1)
        for part_ids in ids.split(self.config.prefill_chunk_size or ids.shape[1], 1):
            begin = self.cache.get_seq_length()
            end = begin + part_ids.shape[1]
            inputs = {} if self.mask is None else {"attention_mask": self.mask[:, :end]}
            if self.positions is not None:
                inputs["position_ids"] = self.positions[:, begin:end]
            output = self.model(input_ids=part_ids, **inputs, **self.settings, return_dict=True)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _append(self, new: dict[int, list[int]]) -> None:
        """Append the new tokens of rows one by one, until the stopping criteria end the row."""
        while new := {i: tokens for i, tokens in new.items() if tokens and i in self.unfinished}:
            length = self.start + min(len(self.tokens[i]) for i in new)
            if length == self.ids.shape[1]:
                padding = self.ids.new_full((len(self.ids), 1), self.config.pad_token_id or 0)
                self.ids = torch.cat([self.ids, padding], 1)
            rows = [i for i in new if self.start + len(self.tokens[i]) == length]
            column = torch.tensor([new[i].pop(0) for i in rows])
            self.ids[rows, length] = column.to(self.ids.device)
            for i, token in zip(rows, column.tolist(), strict=True):
                self.tokens[i].append(token)
            if self.decoder.streamer:
                self.decoder.streamer.put(column)
            is_done = self.criteria(self.ids[:, : length + 1], None).tolist()
            self.unfinished -= {i for i in rows if is_done[i]}
