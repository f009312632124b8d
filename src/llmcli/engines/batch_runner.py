"""Runs requests through a loaded pipeline in batches. What happens to one request does not affect the others."""

import inspect
import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from llmcli import console
from llmcli.engines.batching import BatchPolicy
from llmcli.engines.requests import OnText, Request, RequestSettings, Row, capture_errors
from llmcli.errors import LlmcliError, RecordError, UsageError
from llmcli.job import JsonObject
from llmcli.models.devices import device_error, is_out_of_memory

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig, Pipeline

    from llmcli.pipelines.running import BatchSettings, RunningBatch

MIN_PREFIX_TOKENS = 16  # a shorter prefix costs more to copy than to compute again

MergeConfig = Callable[[str, bool], "GenerationConfig"]


class BatchRunner:
    """Runs requests on a pipeline: `add` them, then `step` until the queue is empty.

    `parameters` are the pipeline's; it generates if they have a merged `generation_config`. `merge(options,
    is_constrained)` returns that of a request with options of its own, as JSON. `logprobs` is the number of
    alternatives to each token. `on_token`, if set, is called after each token that a batch generates; it may raise.
    """

    def __init__(
        self, pipeline: "Pipeline", policy: BatchPolicy, parameters: JsonObject, *, truncate: bool,
        merge: MergeConfig | None = None, logprobs: int | None = None,
    ) -> None:  # fmt: skip
        self.pipeline, self.policy = pipeline, policy
        self.on_token: Callable[[], None] | None = None
        self.queue: dict[Row, None] = {}  # rows that wait or run, in the order of their arrival
        self._finished: list[Request] = []
        self._running: dict[int, Row] = {}  # by their numbers in the batch
        self._group: tuple[int | None, ...] = ()  # of these
        self._batch: RunningBatch | None = None
        self._settings: BatchSettings | None = None  # of the last batch that generated
        self._added = 0  # rows, to that batch
        self._last_refusal = inf  # how many rows were running when no other could join
        before, _, self._postprocess_parameters = pipeline._sanitize_parameters(**parameters)
        self._preprocess_parameters = {**before, "truncate": truncate}
        self._takes_rows = inspect.isgeneratorfunction(pipeline.preprocess)
        self._unfinished: dict[str, Request] = {}  # by key, to find duplicates, which run once
        self._config: GenerationConfig | None = None
        self._merge, self._logprobs = merge, logprobs
        self._max_new_tokens = 0
        self._can_share_prefix = pipeline.max_shared_tokens != 0
        self._prefix: tuple[list[int], Cache | None] = [], None
        if config := parameters.get("generation_config"):
            self._config = config
            self._preprocess_parameters["truncate"] = (config.max_new_tokens or 0) if truncate else None
            self._max_new_tokens = config.max_new_tokens or config.max_length or 0
            self._is_single = (config.num_beams or 1) == 1 and (config.num_return_sequences or 1) == 1
            self._can_share_prefix &= self._is_single

    @property
    def window(self) -> int:
        """How many rows should be in the queue, so that batches of similar rows can be chosen among them."""
        return self.policy.window

    def add(self, requests: Sequence[Request]) -> None:
        """Queue the rows of requests. A request that cannot be preprocessed fails at once."""
        for request in requests:
            with capture_errors(request):
                own, maximum, grammar, seed = request.settings, self._max_new_tokens, None, None
                config, parameters = self._find_config(own), self._preprocess_parameters
                logprobs = self._logprobs if request.logprobs is None else request.logprobs
                is_repeatable = not (config and config.do_sample) or (own and own.seed is not None)
                if is_repeatable and (original := self._unfinished.get(request.key)):
                    original.duplicates.append(request)
                    continue
                if own and config:
                    maximum, seed = own.generation.get("max_new_tokens", maximum), own.seed
                    if parameters["truncate"] is not None:
                        parameters = {**parameters, "truncate": maximum}
                    if own.constraint:
                        parameters, grammar = {**parameters, "is_constrained": True}, own.grammar
                made = self.pipeline.preprocess(request.input, **parameters)
                rows = []
                for i, inputs in enumerate(made if self._takes_rows else [made]):
                    remaining = self.pipeline.remaining_context(inputs) if config else None
                    limit = maximum if remaining is None else min(remaining, maximum)
                    length = inputs.get("length") or len(inputs["input_ids"])
                    group = id(config), limit if config and not self.pipeline.can_mix_limits else 0, logprobs
                    rows.append(Row(request, i, inputs, length, limit, config, grammar, seed, logprobs, group))
                request.row_count = len(rows)
                self._unfinished[request.key] = request
                self.queue.update(dict.fromkeys(rows))
            if request.failure:
                self._finished.append(request)

    def step(self, on_text: OnText | None = None) -> list[Request]:
        """Run a batch of rows that are only read, or go on with the batch that generates. Return what has finished.

        `on_text` receives the text of a row that generates alone.
        """
        if self.queue:
            try:
                if self._config:
                    self._generate(on_text)
                else:
                    self._read()
            except Exception as exc:  # one record must not fail the others
                if not self._running or (isinstance(exc, LlmcliError) and not isinstance(exc, RecordError)):
                    raise
                self._recover(exc)
        finished, self._finished = self._finished, []
        return finished

    def _find_config(self, own: RequestSettings | None) -> "GenerationConfig | None":
        """Return the config of a request, the same object for all to which the same options apply."""
        if not (own and self._config and self._merge):
            return self._config
        options = dict(own.generation)
        if self._config.max_new_tokens:  # else it has a limit of another kind
            options.pop("max_new_tokens", None)
        has_stops = bool(self._config.stop_strings or "stop_strings" in options)
        if not (options or (own.constraint and has_stops)):
            return self._config
        try:
            return self._merge(json.dumps(options, sort_keys=True), bool(own.constraint))
        except UsageError as exc:
            raise RecordError("invalid_settings", exc.message, exc.hint) from exc

    def _find_candidates(self) -> list[Row]:
        """Return the row that has waited longest, and all rows that may share a batch with it."""
        rows = [*self.queue]
        if len(rows) == 1:
            return rows
        first, maximum = rows[0], self.pipeline.max_batched_tokens
        if maximum is not None:  # The model computes longer rows otherwise than alone.
            rows = [row for row in rows if row.total <= maximum] if first.total <= maximum else rows[:1]
        return [row for row in rows if row.group == first.group]

    def _read(self) -> None:
        """Run the pipeline's forward pass with the row that has waited longest, and similar ones."""
        from llmcli.pipelines.running import split_outputs

        rows = self._find_candidates()
        if is_measured := len(self.queue) > 1:  # A single record tells nothing about batches.
            rows = [rows[i] for i in self.policy.choose(self._own_lengths(rows))]
            self.policy.memory.start_batch()
        self._running = dict(enumerate(rows))
        inputs = {name: [row.inputs[name] for row in rows] for name in rows[0].inputs}
        prefix = self._find_prefix(rows)
        start = time.perf_counter()
        outputs = self.pipeline.forward(inputs, **({"prefix": prefix} if prefix else {}))
        if is_measured:
            lengths = self._own_lengths(rows)
            self.policy.observe(lengths, len(rows) * max(lengths) / (time.perf_counter() - start))
        self._take_outputs(split_outputs(outputs, range(len(rows))))

    def _generate(self, on_text: OnText | None) -> None:
        """Go on with the running batch, or start one. Rows join it as soon as a quarter of its places is free."""
        start, count, known = time.perf_counter(), len(self._running), self._settings
        can_join = self._batch and self._batch.can_add and count < min(len(self.queue), self._last_refusal)
        if not (count and known):
            self._start_batch(on_text)
        elif can_join and known.has_room(count):
            self._let_join(known)
        assert self._batch
        assert self._settings
        count, places = len(self._running), self._settings.max_rows
        if count > max(1, len(self.policy.largest)):
            self.policy.largest = self._own_lengths(self._running.values())
        outputs = self._batch.step()
        if count > 1:  # A single row tells little about batches.
            speed = count * self._batch.speed
            if not speed and len(outputs) == count:
                speed = sum(self.policy.largest) / (time.perf_counter() - start)
            self.policy.observe_step(len(outputs), speed, is_full=4 * count >= 3 * places)
        self._take_outputs(outputs)
        if not self.queue:
            self._batch = None

    def _start_batch(self, on_text: OnText | None) -> None:
        """Start with the row that has waited longest and similar ones: in the last batch, if it is suited."""
        from llmcli.pipelines.answers import DeltaStreamer
        from llmcli.pipelines.running import BatchSettings

        rows, last = self._find_candidates(), self._settings
        chosen = [rows[i] for i in self.policy.choose(self._own_lengths(rows))]
        config, longest, limit = chosen[0].config, max(row.total for row in chosen), self.pipeline.max_shared_tokens
        assert config
        max_rows, max_length, streamer = self.policy.size, longest, None
        if len(rows) > 1:
            if limit and longest <= limit:  # Longer rows would keep the others from leaving the batch when they end.
                rows = [row for row in rows if row.total <= limit]
            lengths = self._own_lengths(rows)
            max_rows, max_own = self.policy.plan(lengths, self._own_lengths(chosen))
            totals = [row.total for row, length in zip(rows, lengths, strict=True) if length <= max_own]
            max_length = max([longest, *totals])
        elif on_text or len(self.queue) > 1:  # No other row may join.
            max_rows = 1
            if on_text and self._is_single:
                streamer = DeltaStreamer(self.pipeline.decoder(chosen[0].inputs), config.stop_strings or (), on_text)
        if max_rows > 4 * len(rows):  # The input is slow, or short: later rows may be longer.
            max_length = max(max_length, min(2 * max_length, limit or 2 * max_length))
        is_open = self._batch and self._batch.can_add and self._added < self.window
        is_suited = last and max_length <= last.max_length and chosen[0].group == self._group
        if last and is_open and is_suited and min(max_rows, last.max_rows) > 1:
            last.max_rows = max_rows
        else:
            given = config, chosen[0].logprobs, streamer, self.on_token, max_rows, max_length, self.policy.is_fixed
            self._batch, self._added, self._settings = None, 0, BatchSettings(*given)
        if len(chosen) > 1:
            self.policy.memory.start_batch()
        self._add_rows(chosen)

    def _let_join(self, settings: "BatchSettings") -> None:
        """Add rows that are suited to the running batch. The others wait, but neither for ever nor for a slow input."""
        running = {*self._running.values()}
        self._last_refusal = len(running)
        waiting = [row for row in self.queue if row not in running]
        rows = [row for row in waiting if row.group == self._group and row.total <= settings.max_length]
        may_pass = self._added < self.window and len(self.queue) >= settings.max_rows
        if rows and (may_pass or rows[0] is waiting[0]):
            lengths, known = self._own_lengths(rows), self._own_lengths(running)
            settings.max_rows, _ = self.policy.plan(lengths, known)
            if chosen := self.policy.choose(lengths, known, settings.max_rows):
                self._add_rows([rows[i] for i in chosen])

    def _add_rows(self, rows: list[Row]) -> None:
        from llmcli.pipelines.running import GeneratingRow

        self._running.update(enumerate(rows, self._added))
        self._added += len(rows)
        self._group, self._last_refusal = rows[0].group, inf
        assert self._settings
        self._batch = self._batch or self.pipeline.start(self._settings)
        added = [GeneratingRow(row.inputs, row.max_new_tokens, row.constraint, row.seed) for row in rows]
        self._batch.add(added, self._find_prefix(rows))

    def _take_outputs(self, outputs: Mapping[int, Any]) -> None:
        for number, output in outputs.items():
            row = self._running.pop(number)
            del self.queue[row]
            request = row.request
            request.row_outputs[row.index] = output
            if len(request.row_outputs) == request.row_count:
                self._finish(request)

    def _recover(self, exc: Exception) -> None:
        """Leave the rows of a failed batch to smaller batches if it was out of memory, else to batches of one row."""
        rows, self._running, self._batch = [*self._running.values()], {}, None
        if error := device_error(exc):
            raise error from exc
        if len(rows) == 1 and (not self._config or self._added == 1):
            with capture_errors(rows[0].request):
                raise exc
            self._finish(rows[0].request)
        elif is_out_of_memory(exc) and len(rows) > 1:
            self.policy.observe_out_of_memory(self._own_lengths(rows))
            console.warning(f"out of memory with a batch of {len(rows)} records; retrying with smaller batches")
        else:
            for row in rows:
                row.group = (id(row),)  # alone

    def _own_lengths(self, rows: Collection[Row]) -> list[int]:
        """Return the tokens of each row after the prefix, and those that it may generate beyond the job's maximum."""
        shared, limit = self.policy.shared_tokens, self._max_new_tokens
        return [max(1, row.length - shared) + max(0, row.max_new_tokens - limit) for row in rows]

    def _find_prefix(self, rows: list[Row]) -> "tuple[list[int], Cache | None] | None":
        """Return the tokens that all prompts of this batch and earlier ones begin with, and their keys and values."""
        known, _ = self._prefix
        if not self._can_share_prefix or len(self._running) == 1 or (len(rows) == 1 and not known):
            return None
        maximum = self.pipeline.max_shared_tokens
        if maximum and max(row.length for row in rows) + max(row.max_new_tokens for row in rows) > maximum:
            return None
        # The last token of a prompt has to be computed: its logits give the first new token.
        prompts = [row.inputs["input_ids"].tolist()[:-1] for row in rows]
        prefix = list(os.path.commonprefix([*prompts, known or prompts[0]]))  # noqa: RUF071  # of lists, not of paths
        if len(prefix) < MIN_PREFIX_TOKENS:
            self._can_share_prefix = False
        elif prefix != known:
            self._prefix = prefix, self.pipeline.prefill(prefix)
            self._can_share_prefix = self._prefix[1] is not None
        self.policy.shared_tokens = len(prefix) if self._can_share_prefix else 0
        return self._prefix if self._can_share_prefix else None

    def _finish(self, request: Request) -> None:
        if not request.failure:
            with capture_errors(request):
                rows = [request.row_outputs[i] for i in range(request.row_count)]
                made = rows if self._takes_rows else rows[0]
                parameters = self._postprocess_parameters
                if request.settings and self._config:
                    parameters = {**parameters, "generation_config": self._find_config(request.settings)}
                request.output = self.pipeline.postprocess(made, **parameters)
        elif len(request.row_outputs) < request.row_count:
            self.queue = {row: None for row in self.queue if row.request is not request}
        request.row_outputs = {}
        self._unfinished.pop(request.key, None)
        for duplicate in request.duplicates:
            duplicate.output, duplicate.failure = request.output, request.failure
        self._finished += [request, *request.duplicates]
