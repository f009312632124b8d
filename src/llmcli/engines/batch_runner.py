"""Runs requests through a loaded pipeline in batches. What happens to one request does not affect the others."""

import inspect
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llmcli import console
from llmcli.engines.batching import BatchPolicy
from llmcli.engines.requests import OnText, Request, RequestSettings, capture_errors
from llmcli.errors import LlmcliError, RecordError, UsageError
from llmcli.job import JsonObject
from llmcli.models.devices import is_out_of_memory

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig, Pipeline

MIN_PREFIX_TOKENS = 16  # a shorter prefix costs more to copy than to compute again

MergeConfig = Callable[[str, bool], "GenerationConfig"]


@dataclass(slots=True, eq=False)
class Row:
    """A row of a batch: row `index` of its request. If it generates, `max_new_tokens` and `config` are its own."""

    request: Request
    index: int
    inputs: dict[str, Any]
    length: int
    max_new_tokens: int
    config: "GenerationConfig | None"
    constraint: str | None  # as a grammar


class BatchRunner:
    """Runs requests on a pipeline: `add` them, then `step` until the queue is empty.

    `parameters` are the pipeline's; it generates if they have a merged `generation_config`. `merge(options,
    is_constrained)` returns that of a request with options of its own, as JSON. `settings` are more of the pipeline's
    for each batch. `on_token`, if set, is called after each token that a batch generates; it may raise.
    """

    def __init__(
        self, pipeline: "Pipeline", policy: BatchPolicy, parameters: JsonObject, *, truncate: bool,
        merge: MergeConfig | None = None, settings: JsonObject = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.pipeline, self.policy = pipeline, policy
        self.on_token: Callable[[], None] | None = None
        self.queue: list[Row] = []
        before, _, self._postprocess_parameters = pipeline._sanitize_parameters(**parameters)
        self._preprocess_parameters = {**before, "truncate": truncate}
        self._takes_rows = inspect.isgeneratorfunction(pipeline.preprocess)
        self._unfinished: dict[str, Request] = {}  # by key, to find duplicates, which run once
        self._config: GenerationConfig | None = None
        self._merge, self._settings = merge, settings
        self._max_new_tokens = 0
        self._can_share_prefix = pipeline.max_shared_tokens != 0
        self._prefix: tuple[list[int], Cache | None] = [], None
        if config := parameters.get("generation_config"):
            self._config = config
            self._preprocess_parameters["truncate"] = (config.max_new_tokens or 0) if truncate else None
            self._max_new_tokens = config.max_new_tokens or config.max_length or 0
            self._is_single = (config.num_beams or 1) == 1 and (config.num_return_sequences or 1) == 1
            self._can_share_prefix &= self._is_single

    def add(self, requests: Sequence[Request]) -> None:
        """Queue the rows of requests. A request that cannot be preprocessed fails at once."""
        for request in requests:
            with capture_errors(request):
                own, maximum, grammar = request.settings, self._max_new_tokens, None
                config, parameters = self._find_config(own), self._preprocess_parameters
                is_repeatable = not (config and config.do_sample) or (own and own.seed is not None)
                if is_repeatable and (original := self._unfinished.get(request.key)):
                    original.duplicates.append(request)
                    continue
                if own:
                    maximum = own.generation.get("max_new_tokens", maximum)
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
                    rows.append(Row(request, i, inputs, length, limit, config, grammar))
                request.row_count = len(rows)
                self._unfinished[request.key] = request
                self.queue += rows

    def step(self, on_text: OnText | None = None) -> None:
        """Run one batch: the row that has waited longest, and similar ones. `on_text` receives the text of one row."""
        batch = self._find_candidates()
        if len(batch) > 1:
            first = batch[0]
            batch = [row for row in batch if row.config is first.config]
            if self._config and not self.pipeline.can_mix_limits:
                batch = [row for row in batch if row.max_new_tokens == first.max_new_tokens]
            self.policy.shared_tokens = len(self._prefix[0]) if self._can_share_prefix else 0
            batch = [batch[i] for i in self.policy.choose(self._own_lengths(batch))]
        chosen = set(map(id, batch))
        self.queue = [row for row in self.queue if id(row) not in chosen]
        self._run_batch(batch, on_text if len(batch) == 1 else None)
        for request in {id(row.request): row.request for row in batch}.values():
            if request.failure or len(request.row_outputs) == request.row_count:
                self._finish(request)

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
        """Return the row that has waited longest, and all rows that the model computes alike beside it and alone."""
        maximum = self.pipeline.max_batched_tokens if len(self.queue) > 1 else None
        if maximum is None:
            return self.queue
        fits = [row.length + row.max_new_tokens <= maximum for row in self.queue]
        return list(compress(self.queue, fits)) if fits[0] else self.queue[:1]

    def _run_batch(self, rows: list[Row], on_text: OnText | None = None) -> None:
        """Run a batch. Out of memory, queue it again for smaller batches; after another error, run each row alone."""
        if len(rows) == 1:
            with capture_errors(rows[0].request):
                self._run_forward(rows, on_text)
            return
        try:
            self._run_forward(rows)
            return
        except Exception as exc:  # one record must not fail the others
            if isinstance(exc, LlmcliError) and not isinstance(exc, RecordError):
                raise
            is_oom = is_out_of_memory(exc)
        # Out here, the exception no longer holds the memory of the failed batch.
        if is_oom:
            self.policy.observe_out_of_memory(self._own_lengths(rows))
            console.warning(f"out of memory with a batch of {len(rows)} records; retrying with smaller batches")
            self.queue = rows + self.queue
        else:
            for row in rows:
                self._run_batch([row])

    def _run_forward(self, rows: list[Row], on_text: OnText | None = None) -> None:
        """Run the pipeline's forward pass, and tell the policy how it went."""
        # A single record tells nothing about batches, and a single row that generates tells little.
        is_measured = len(rows) > 1 or bool(self.queue and not self._config)
        if is_measured:
            self.policy.memory.start_batch()
        inputs = {name: [row.inputs[name] for row in rows] for name in rows[0].inputs}
        settings = self._generation_settings(rows, on_text) if self._config else {}
        if self._can_share_prefix and len(rows) > 1 and (prefix := self._find_prefix(rows)):
            settings["prefix"] = prefix
        start = time.perf_counter()
        outputs = self.pipeline.forward(inputs, **settings)
        if is_measured:
            lengths = self._own_lengths(rows)
            # Only the time of decoding steps tells whether a batch has a good size: prefill depends on the prompts.
            speed = len(rows) * settings["criteria"][0].speed if self._config else 0.0
            self.policy.observe(lengths, speed or len(rows) * max(lengths) / (time.perf_counter() - start))
        for i, row in enumerate(rows):
            row.request.row_outputs[row.index] = {
                name: value[i : i + 1] if hasattr(value, "shape") else value[i] for name, value in outputs.items()
            }

    def _generation_settings(self, rows: list[Row], on_text: OnText | None) -> dict[str, Any]:
        from llmcli.pipelines.answers import DeltaStreamer
        from llmcli.pipelines.stopping import TokenTimer

        config = rows[0].config
        assert config
        settings = {**self._settings, "generation_config": config, "criteria": [TokenTimer(self.on_token)]}
        limits = [row.max_new_tokens for row in rows]
        if {*limits} != {config.max_new_tokens or config.max_length}:
            settings["max_new_tokens"] = limits
        if any(row.constraint for row in rows):
            settings["constraints"] = [row.constraint for row in rows]
        seeds = [row.request.settings and row.request.settings.seed for row in rows]
        if any(seed is not None for seed in seeds):
            settings["seeds"] = seeds
        if on_text and self._is_single:
            decode = self.pipeline.decoder(rows[0].inputs)
            settings["streamer"] = DeltaStreamer(decode, config.stop_strings or (), on_text)
        return settings

    def _own_lengths(self, rows: list[Row]) -> list[int]:
        """Return the tokens of each row after the prefix, and those that it may generate beyond the job's maximum."""
        shared, limit = self.policy.shared_tokens, self._max_new_tokens
        return [max(1, row.length - shared) + max(0, row.max_new_tokens - limit) for row in rows]

    def _find_prefix(self, rows: list[Row]) -> "tuple[list[int], Cache | None] | None":
        """Return the tokens that all prompts of this batch and earlier ones begin with, and their keys and values."""
        known, _ = self._prefix
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
        request.row_outputs = {}
        self._unfinished.pop(request.key, None)
        for duplicate in request.duplicates:
            duplicate.output, duplicate.failure = request.output, request.failure
