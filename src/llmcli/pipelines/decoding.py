"""Decoding with what transformers' `generate` lacks: forced tokens, and a random state for each row."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from llmcli.compat.cache import filled_cache
from llmcli.compat.transformers import sample_tokens

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from llmcli.pipelines.constraints import ConstraintProcessor

# What a forward pass costs whatever it reads, measured in tokens. A GPU reads all that a batch may have in that time.
PASS_TOKENS = {"cpu": 64}
PASS_TOKENS_ACCELERATOR = 4096


class RowSampler(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Draw the next token of each row by a random state of its own, so that it does not depend on the other rows.

    As the last processor, it leaves no other token a chance. Rows without a seed draw by the common random state.
    """

    def __init__(self, seeds: Sequence[int | None], rows: int, device: torch.device) -> None:
        count = rows // len(seeds)  # sequences of one prompt
        self._generators = [
            None if seed is None else torch.Generator(device).manual_seed((seed + (i << 32)) % 2**64)
            for seed in seeds
            for i in range(count)
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self.draw(scores, range(len(scores)))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def draw(self, scores: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return a token (R,) for each of these R rows, from their scores (R, V)."""
        probabilities = scores.softmax(-1)
        drawn = [torch.multinomial(probabilities[k], 1, generator=self._generators[i]) for k, i in enumerate(rows)]
        return torch.cat(drawn)


class Decoder:
    """Decodes greedily or by sampling: what `generate` takes as `custom_generate`.

    Tokens that a row's grammar forces are not chosen: the model reads them in one forward pass, with at most
    `max_columns` columns in its cache then. None: no maximum; 0: they come one by one.
    """

    def __init__(
        self, constraint: "ConstraintProcessor | None" = None, seeds: Sequence[int | None] | None = None,
        streamer: BaseStreamer | None = None, max_columns: int | None = 0,
    ) -> None:  # fmt: skip
        self.constraint, self.seeds, self.streamer, self.max_columns = constraint, seeds, streamer, max_columns

    def __call__(
        self, model: "PreTrainedModel", input_ids: torch.Tensor, logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList, generation_config: "GenerationConfig", **settings: Any,
    ) -> torch.Tensor:  # fmt: skip
        sampler = None
        if self.seeds and generation_config.do_sample:
            sampler = RowSampler(self.seeds, len(input_ids), input_ids.device)
            logits_processor.append(sampler)
        # Others than warpers look at the tokens so far, and expect rows of the same length.
        others = [item for item in logits_processor if not type(item).__name__.endswith("Warper")]
        is_simple = len(input_ids) == 1 or all(item in (self.constraint, sampler) for item in others)
        cache = filled_cache(settings)
        if self.constraint and self.max_columns != 0 and is_simple and cache is not None:
            parts = logits_processor, stopping_criteria, generation_config
            batch = _ForcedBatch(model, input_ids, *parts, cache, **settings)
            return batch.run(self.constraint, sampler, self.streamer, self.max_columns)
        return sample_tokens(
            model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=self.streamer, **settings
        )


class _ForcedBatch:
    """B rows that may be at different lengths, because a grammar forces tokens of some.

    A pass reads the same number of columns of all rows, and each row's tokens are at their right end: before them is
    padding, which stays in the cache and is masked.
    """

    def __init__(
        self, model: "PreTrainedModel", ids: torch.Tensor, processors: LogitsProcessorList,
        criteria: StoppingCriteriaList, config: "GenerationConfig", keys_values: DynamicCache, **settings: Any,
    ) -> None:  # fmt: skip
        self.model, self.ids, self.processors, self.criteria, self.config = model, ids, processors, criteria, config
        self.keys_values, self.settings = keys_values, settings
        self.start = ids.shape[1]
        self.tokens = [list[int]() for _ in ids]  # new ones
        self.read_counts = [0] * len(ids)  # of these, how many the model has read
        self.columns = self.start  # in the cache, with padding
        self.unfinished = set(range(len(ids)))
        self.mask: torch.Tensor | None = settings.pop("attention_mask", None)
        if self.mask is None and len(ids) > 1:
            self.mask = torch.ones_like(ids)
        self.positions: torch.Tensor | None = settings.pop("position_ids", None)
        self.unread = ids[:, self.keys_values.get_seq_length() :]  # of the prompts
        self.pass_tokens = PASS_TOKENS.get(ids.device.type, PASS_TOKENS_ACCELERATOR)

    def run(
        self, constraint: "ConstraintProcessor", sampler: RowSampler | None, streamer: BaseStreamer | None,
        max_columns: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """Return prompts and new tokens, padded at the right end, as `generate` does."""
        self._append({i: constraint.read_forced_tokens(i, []) for i in self.unfinished}, streamer)
        while self.unfinished:
            logits = self._read(self._choose_columns(max_columns))
            rows = [i for i in sorted(self.unfinished) if self.read_counts[i] == len(self.tokens[i])]
            if not rows:
                continue
            scores = logits[rows].float()
            for processor in self.processors:
                if processor is constraint:
                    scores = constraint.mask(scores, rows)
                elif processor is not sampler:
                    scores = processor(self.ids[rows], scores)
            if sampler:
                chosen = sampler.draw(scores, rows)
            elif self.config.do_sample:
                chosen = torch.multinomial(scores.softmax(-1), 1).flatten()
            else:
                chosen = scores.argmax(-1)
            new = {}
            for i, token in zip(rows, chosen.tolist(), strict=True):
                new[i] = [token, *constraint.read_forced_tokens(i, [*self.tokens[i], token])]
            self._append(new, streamer)
        if streamer:
            streamer.end()
        return self.ids

    def _choose_columns(self, maximum: int | None) -> int:
        """Return the number of columns with which a pass reads the most tokens in its time."""
        counts = [len(self.tokens[i]) - self.read_counts[i] for i in self.unfinished]
        most = max(counts)
        if maximum:  # The tokens that may still come need a column each.
            later = self.config.max_length - self.start - min(map(len, self.tokens))
            most = min(most, max(1, maximum - self.columns - later))

        def speed(columns: int) -> float:
            return sum(min(count, columns) for count in counts) / (self.pass_tokens + columns * len(self.ids))

        return max(range(1, most + 1), key=speed, default=0)

    def _read(self, columns: int) -> torch.Tensor:
        """Read at most that many tokens of each row, and return the logits (B, V) after the last one."""
        parts = {i: self.tokens[i][self.read_counts[i] :][:columns] for i in self.unfinished}
        block = np.zeros((3, len(self.ids), columns), np.int64)  # tokens, mask, positions
        for i, part in parts.items():
            place = slice(columns - len(part), None)
            block[0, i, place], block[1, i, place] = part, 1
            block[2, i, place] = range(self.read_counts[i], self.read_counts[i] + len(part))
            self.read_counts[i] += len(part)
        ids, mask, positions = torch.from_numpy(block).to(self.ids.device)
        ids, self.unread = torch.cat([self.unread, ids], 1), self.unread[:, :0]
        self.columns += columns
        if self.mask is not None:
            self.mask = torch.cat([self.mask, mask], 1)
        inputs: dict[str, Any] = {}
        size = self.config.prefill_chunk_size or ids.shape[1]
        if self.positions is not None:
            last = self.positions[:, self.start - 1 : self.start]
            self.positions = torch.cat([self.positions, last + 1 + positions], 1)
        for part in ids.split(size, 1):
            begin = self.keys_values.get_seq_length()
            end = begin + part.shape[1]
            if self.mask is not None:
                inputs["attention_mask"] = self.mask[:, :end]
            if self.positions is not None:
                inputs["position_ids"] = self.positions[:, begin:end]
            output = self.model(input_ids=part, **inputs, **self.settings, return_dict=True)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _append(self, new: dict[int, list[int]], streamer: BaseStreamer | None) -> None:
        """Append the new tokens of rows one by one, until the stopping criteria end the row."""
        while new := {i: tokens for i, tokens in new.items() if tokens and i in self.unfinished}:
            length = self.start + min(len(self.tokens[i]) for i in new)
            if length == self.ids.shape[1]:
                padding = self.ids.new_full((len(self.ids), 1), self.config.pad_token_id or 0)
                self.ids = torch.cat([self.ids, padding], 1)
            rows = [i for i in new if self.start + len(self.tokens[i]) == length]
            column = [new[i].pop(0) for i in rows]
            self.ids[rows, length] = self.ids.new_tensor(column)
            for i, token in zip(rows, column, strict=True):
                self.tokens[i].append(token)
            if streamer:
                streamer.put(torch.tensor(column))
            is_done = self.criteria(self.ids[:, : length + 1], None).tolist()
            self.unfinished -= {i for i in rows if is_done[i]}
