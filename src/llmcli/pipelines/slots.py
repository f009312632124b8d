"""A batch of a causal language model whose rows leave when they end, and give their places to others."""

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache, LogitsProcessorList

from llmcli.compat.cache import SlotCache, cache_argument, repeat_cache
from llmcli.compat.transformers import single_token_context, takes, uses_sdpa
from llmcli.pipelines.answers import end_tokens
from llmcli.pipelines.constraints import RowConstraints
from llmcli.pipelines.decoding import (
    DecodeGraph,
    RecordedStep,
    RowSampler,
    TokenSequence,
    adjust_scores,
    find_best,
    group_by_length,
    make_block,
)
from llmcli.pipelines.logprobs import measure_logprobs, stack_logprobs
from llmcli.pipelines.running import FREE_FRACTION, BatchSettings, GeneratingRow, Prefix, RunningBatch
from llmcli.pipelines.stopping import StopTexts

if TYPE_CHECKING:
    from llmcli.pipelines.base import Inputs
    from llmcli.pipelines.causal import CausalPipeline

# By type of device: what a forward pass costs whatever it reads, in tokens. A GPU reads a whole batch in that time.
PASS_TOKENS = defaultdict(lambda: 4096, cpu=64)
PREFILL_TOKENS = defaultdict(lambda: 2**15, cpu=4096)  # of prompts, read at once: more leave a CPU's caches
SPARE_COLUMNS = 64  # minimum room for later tokens
SPARE_COLUMNS_ACCELERATOR = 128  # beyond the longest row
GRAPH_STEPS = 32  # Fewer do not repay the capture of a graph, or a recording.
REPORT_S = 0.1  # in which rows leave at the latest after they have ended


class SlotBatch(RunningBatch):
    """Greedy decoding, or sampling, of rows in the slots of a cache.

    Each pass of the model reads the same number of columns of all slots: as a rule one, the last token of each row;
    more if grammars force tokens, which are not chosen then. A row's tokens are at the right end, and padding before
    them is masked. Free slots are computed too, until others join or the batch is made smaller.
    """

    def __init__(self, pipeline: "CausalPipeline", settings: BatchSettings, processors: LogitsProcessorList) -> None:
        self._pipeline, self._model, self._settings = pipeline, pipeline.model, settings
        self._device, self._is_cpu = self._model.device, self._model.device.type == "cpu"
        self._cache, self._is_sdpa = SlotCache(self._device), uses_sdpa(self._model)
        self._graph: DecodeGraph | None = None
        places = {*(getattr(self._model, "hf_device_map", None) or {"": self._device}).values()}
        self._can_capture = self._device.type == "cuda" and len(places) == 1 and self._is_sdpa
        self._slots: list[TokenSequence | None] = []
        self._rows: dict[int, tuple[GeneratingRow, list[TokenSequence]]] = {}  # unfinished
        self._ended: dict[int, Inputs] = {}
        self._row_count = self._sequence_count = 0
        self._longest = settings.max_length
        config = settings.config
        self._ends, self._copies = frozenset(end_tokens(config)), config.num_return_sequences or 1
        self._end_ids = torch.tensor([*self._ends], dtype=torch.int64, device=self._device)
        self._texts = StopTexts(config.stop_strings) if config.stop_strings else None
        self._processors, self._minimum = processors, (config.min_new_tokens or 0) if self._ends else 0
        self._constraints: RowConstraints | None = None
        self._sampler = RowSampler(self._device) if config.do_sample else None
        (self._cache_name,) = cache_argument(self._model, self._cache)
        self._options: dict[str, Any] = {"use_cache": True, "return_dict": True}
        self._options |= {"logits_to_keep": 1} if takes(self._model, "logits_to_keep") else {}
        self._takes_positions = takes(self._model, "position_ids")

    @property
    def can_add(self) -> bool:  # type: ignore[override]
        return self._settings.has_room(len(self._rows))

    def add(self, rows: Sequence[GeneratingRow], prefix: Prefix | None = None) -> None:
        lengths = [len(row.inputs["input_ids"]) for row in rows]
        longest = max(length + row.max_new_tokens for length, row in zip(lengths, rows, strict=True))
        first, known = self._row_count, len(prefix[0]) if prefix else 0
        self._row_count, self._longest = first + len(rows), max(longest, self._longest)
        used = len(self._slots) - self._slots.count(None)
        needed = used + len(rows) * self._copies
        with self._pipeline.device_placement(), torch.inference_mode():
            if needed > len(self._slots) or max(lengths) > self._cache.end or used == 0:
                self._arrange(max(needed, 0 if self._is_cpu else len(self._slots)), 0, max(lengths))
            for group in group_by_length(lengths, known, PREFILL_TOKENS[self._device.type]):
                self._begin({first + i: rows[i] for i in group}, prefix)

    def step(self) -> "dict[int, Inputs]":
        start, passes, could_add = time.perf_counter(), 0, self.can_add
        with self._pipeline.device_placement(), torch.inference_mode():
            if self._is_cpu and self._slots.count(None) >= FREE_FRACTION * len(self._slots):
                self._arrange(len(self._slots) - self._slots.count(None))
            while self._rows:
                self._advance()
                passes += 1
                is_late = not self._settings.is_fixed and time.perf_counter() - start > REPORT_S
                if (self.can_add and not could_add) or (is_late and (self._ended or self.can_add)):
                    break
        self.speed = passes / (time.perf_counter() - start)
        self._cache.begin = min((known.begin for known in self._slots if known), default=self._cache.end)
        ended, self._ended = self._ended, {}
        return ended

    def _begin(self, rows: dict[int, GeneratingRow], prefix: Prefix | None) -> None:
        """Read the prompts of rows, put them into free slots, and choose their first tokens."""
        ids, known = [row.inputs["input_ids"] for row in rows.values()], len(prefix[0]) if prefix else 0
        read, mask = self._pipeline.pad([row[known:] for row in ids], left=True)
        cache = repeat_cache(prefix[1], len(read)) if prefix else DynamicCache()
        if prefix:
            mask = torch.cat([mask.new_ones(len(mask), known), mask], 1)
        is_padded, positions = len({*map(len, ids)}) > 1, (mask.cumsum(1) - 1).clamp(min=0)
        width = max(1, PREFILL_TOKENS[self._device.type] // len(read))
        for part in read.split(width, 1):
            begin, end = cache.get_seq_length(), cache.get_seq_length() + part.shape[1]
            logits = self._call(part, mask[:, :end] if is_padded else None, positions[:, begin:end], cache)
        if self._copies > 1:
            cache.batch_repeat_interleave(self._copies)
            mask, logits = (tensor.repeat_interleave(self._copies, 0) for tensor in (mask, logits))
        sequences = [sequence for number, row in rows.items() for sequence in self._make_sequences(number, row)]
        free = [i for i, known in enumerate(self._slots) if known is None]
        for sequence, slot in zip(sequences, free, strict=False):
            sequence.slot, sequence.begin = slot, self._cache.end - mask.shape[1]
            self._slots[slot] = sequence
        self._cache.put([sequence.slot for sequence in sequences], cache, mask)
        if self._constraints:
            self._append_forced_tokens(sequences)
        if unforced := [i for i, sequence in enumerate(sequences) if not sequence.tokens]:
            self._choose([sequences[i] for i in unforced], logits[unforced])

    def _make_sequences(self, number: int, row: GeneratingRow) -> list[TokenSequence]:
        config, settings = self._settings.config, self._settings
        if row.constraint and self._constraints is None:
            self._constraints = RowConstraints(self._pipeline.compile_grammar, end_tokens(config))
        made, ids = [], row.inputs["input_ids"]
        decode = self._pipeline.decoder(row.inputs) if self._texts else None
        deadline = time.perf_counter() + (config.max_time or float("inf"))
        for i in range(self._copies):
            made.append(TokenSequence(self._sequence_count, number, ids, row.max_new_tokens, decode, deadline))
            if row.constraint and self._constraints:
                self._constraints.add(self._sequence_count, row.constraint)
            if row.seed is not None and self._sampler:
                self._sampler.add(self._sequence_count, row.seed, i)
            self._sequence_count += 1
        self._rows[number] = row, made
        if settings.streamer:
            settings.streamer.put(torch.tensor(ids))
        return made

    def _advance(self) -> None:
        """Read the next tokens of all rows, and choose those that follow."""
        logits = self._read(self._choose_columns() if self._constraints else 1)
        ready = [known for known in self._slots if known and known.read_count == len(known.tokens)]
        if ready:
            slots = [sequence.slot for sequence in ready]
            self._choose(ready, logits if len(slots) == len(logits) else logits[slots])
        if self._settings.on_token:
            self._settings.on_token()

    def _choose_columns(self) -> int:
        """Return the number of columns with which passes read the maximum number of tokens per second."""
        known = [sequence for sequence in self._slots if sequence]
        counts = [len(sequence.tokens) - sequence.read_count for sequence in known]
        most = max(counts)
        if (maximum := self._pipeline.max_shared_tokens) and len(self._slots) > 1:
            # Padding takes room in an attention window, and the tokens that may still come need a column each.
            later = max(sequence.limit - len(sequence.tokens) for sequence in known)
            most = min(most, max(1, maximum - self._cache.end + self._cache.begin - later))
        fixed = PASS_TOKENS[self._device.type]

        def speed(columns: int) -> float:
            return sum(min(count, columns) for count in counts) / (fixed + columns * len(self._slots))

        return max(range(1, most + 1), key=speed)

    def _read(self, columns: int) -> torch.Tensor:
        """Read at most that many tokens of each row, and return the logits (B, V) after the last one."""
        cache = self._cache
        if cache.end + columns > cache.mask.shape[1]:
            self._arrange(len(self._slots), columns)
        ids, positions, mask = torch.from_numpy(make_block(self._slots, columns)).to(self._device)
        if columns == 1 and (graph := self._find_graph()):
            logits = graph(ids, positions)
        else:
            end = cache.end + columns
            known = cache.mask[: len(ids), cache.begin : end]
            known[:, -columns:] = mask.bool()
            is_padded = len(known) > 1 or not self._is_cpu or not bool(known.all())
            if columns == 1 and (step := self._find_step(is_padded)):
                logits = step(self._call, ids, known[:, None, None] if self._is_sdpa else None, positions, cache=cache)
            else:
                logits = self._call(ids, known.long() if is_padded else None, positions, cache)
        cache.end += columns
        return logits

    def _call(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        inputs = {"position_ids": positions} if self._takes_positions else {}
        inputs |= {"attention_mask": mask} if mask is not None else {}
        output = self._model(input_ids=ids, **inputs, **{self._cache_name: cache}, **self._options)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _find_step(self, is_padded: bool) -> RecordedStep | None:
        """Return the step for the present number of rows, recorded if that is worth it."""
        maximum, rows, steps = self._pipeline.max_shared_tokens, len(self._slots), self._pipeline.recorded_steps
        has_window = maximum is not None and self._cache.get_seq_length() >= maximum
        if not self._is_cpu or has_window or (is_padded and not self._is_sdpa):  # The mask would be the model's own.
            return None
        return steps[rows] if rows in steps or self._count_steps() >= GRAPH_STEPS else None

    def _find_graph(self) -> DecodeGraph | None:
        """Return the graph of the step with the present size of the cache, captured if that is worth it."""
        maximum = self._pipeline.max_shared_tokens
        if not self._can_capture or (maximum is not None and self._longest > maximum):
            return None  # The graph's mask knows no windows.
        if self._graph is None or self._graph.shape != self._cache.mask.shape:
            self._graph = None  # frees its memory
            if self._count_steps() >= GRAPH_STEPS:
                with single_token_context(self._model) if len(self._slots) == 1 else nullcontext():
                    self._graph = DecodeGraph.capture(self._call, self._cache)
                self._can_capture = self._graph is not None
        return self._graph

    def _count_steps(self) -> int:
        return max(known.limit - len(known.tokens) for known in self._slots if known)

    def _choose(self, sequences: list[TokenSequence], logits: torch.Tensor) -> None:
        """Choose the next token of each sequence by its logits (R, V)."""
        scores = logits = logits.to(self._device, torch.float32)
        numbers = [sequence.number for sequence in sequences]
        if short := [i for i, known in enumerate(sequences) if len(known.tokens) < self._minimum]:
            scores = scores.index_fill(1, self._end_ids, -torch.inf)
            if others := sorted({*range(len(scores))}.difference(short)):
                scores[others] = logits[others]
        if self._processors:
            scores = adjust_scores(self._processors, sequences, scores)
        if self._constraints:
            scores = self._constraints.mask(numbers, scores)
        chosen = self._sampler.draw(numbers, scores) if self._sampler else find_best(scores)
        if self._settings.logprobs is not None:
            measured = measure_logprobs(logits, chosen, self._settings.logprobs)
            for sequence, logprobs in zip(sequences, measured, strict=True):
                sequence.logprobs.append(logprobs)
        for sequence, token in zip(sequences, chosen.tolist(), strict=True):
            self._append(sequence, token)
        if self._constraints:
            self._append_forced_tokens(sequences)

    def _append_forced_tokens(self, sequences: list[TokenSequence]) -> None:
        """Let matchers read the new tokens of unfinished sequences, and append what must follow these."""
        assert self._constraints
        for sequence in sequences:
            if sequence.slot < 0:
                continue
            if self._settings.logprobs is not None:  # A log-probability needs the logits before its token.
                self._constraints.advance(sequence.number, sequence.tokens)
                continue
            for token in self._constraints.read_forced_tokens(sequence.number, sequence.tokens):
                if sequence.slot >= 0:
                    self._append(sequence, token)

    def _append(self, sequence: TokenSequence, token: int) -> None:
        """Append a new token, which may end the sequence."""
        sequence.tokens.append(token)
        if self._settings.streamer:
            self._settings.streamer.put(torch.tensor([token]))
        has_ended = token in self._ends or len(sequence.tokens) >= sequence.limit
        if not has_ended and sequence.decode and self._texts:
            has_ended = self._texts.end(sequence.decode, sequence.tokens)
        if has_ended or time.perf_counter() > sequence.deadline:
            self._end(sequence)

    def _end(self, sequence: TokenSequence) -> None:
        """Give the slot of a sequence free, and report its row once all sequences of the row have ended."""
        self._slots[sequence.slot], sequence.slot = None, -1
        row, sequences = self._rows[sequence.row]
        if any(known.slot >= 0 for known in sequences):
            return
        del self._rows[sequence.row]
        if self._sampler:
            for known in sequences:
                self._sampler.remove(known.number)
        length, padding = max(len(known.tokens) for known in sequences), self._pipeline.tokenizer.pad_token_id
        ids = np.full((1, self._copies, length), padding)
        for i, known in enumerate(sequences):
            ids[0, i, : len(known.tokens)] = known.tokens
        output = {"sequences": ids, **row.inputs}
        if self._settings.logprobs is not None:
            output |= stack_logprobs(sequences[0].logprobs)
        if self._constraints:
            output["completion"] = np.array([[self._constraints.end(one.number, one.tokens) for one in sequences]])
        self._ended[sequence.row] = output
        if self._settings.streamer:
            self._settings.streamer.end()

    def _arrange(self, rows: int, columns: int = 0, width: int = 0) -> None:
        """Move the sequences to the first of that many slots, with room for columns, after at least `width` of them."""
        used = [(i, known) for i, known in enumerate(self._slots) if known]
        self._cache.begin = min((known.begin for _, known in used), default=self._cache.end)
        width = max(width, self._cache.end - self._cache.begin)
        if self._is_cpu:
            total = width + max(SPARE_COLUMNS, width // 4, columns)
        else:  # The size should stay the same, as a graph holds for one size.
            total = max(self._longest, width + columns) + SPARE_COLUMNS_ACCELERATOR
            total, rows = max(self._cache.mask.shape[1], _round_up(total, 64)), _round_up(rows, 8 if rows > 1 else 1)
        shift = width - self._cache.end
        self._cache.arrange([i for i, _ in used], rows, total, width)
        self._slots = [*(known for _, known in used), *[None] * (rows - len(used))]
        for slot, (_, known) in enumerate(used):
            known.slot, known.begin = slot, known.begin + shift


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
