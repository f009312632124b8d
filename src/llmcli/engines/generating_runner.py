"""Runs requests of jobs that generate text: limits of each row, a shared prefix, and text while it is generated."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmcli.engines.batch_runner import BatchRunner, Row, collate
from llmcli.engines.batching import BatchPolicy
from llmcli.engines.requests import OnText, Request

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig, Pipeline

MIN_PREFIX_TOKENS = 16  # a shorter prefix costs more to copy than to compute again


class GeneratingRunner(BatchRunner):
    """A BatchRunner for pipelines that generate, by a merged GenerationConfig and within the model's context."""

    def __init__(
        self, pipeline: "Pipeline", policy: BatchPolicy, config: "GenerationConfig", *, truncate: bool
    ) -> None:
        super().__init__(
            pipeline,
            policy,
            {"generation_config": config},
            truncate=(config.max_new_tokens or 0) if truncate else None,
            is_repeatable=not config.do_sample,
        )
        self._config = config
        self._max_new_tokens: int = config.max_new_tokens or config.max_length or 0
        self._is_single = (config.num_beams or 1) == 1 and (config.num_return_sequences or 1) == 1
        self._prefix = SharedPrefix(pipeline) if self._is_single and pipeline.can_share_prefix else None

    def _make_row(self, request: Request, index: int, inputs: dict[str, Any]) -> Row:
        row = super()._make_row(request, index, inputs)
        remaining: int | None = self.pipeline.remaining_context(inputs)
        row.max_new_tokens = self._max_new_tokens if remaining is None else min(remaining, self._max_new_tokens)
        return row

    def _find_candidates(self) -> list[Row]:
        if self.pipeline.can_mix_limits:
            return self.queue
        return [row for row in self.queue if row.max_new_tokens == self.queue[0].max_new_tokens]

    def _forward(self, rows: Sequence[Row], on_text: OnText | None) -> tuple[Mapping[str, Any], float]:
        from llmcli.pipelines.answers import DeltaStreamer, TokenTimer

        timer = TokenTimer(self.on_token)
        settings: dict[str, Any] = {"generation_config": self._config, "criteria": [timer]}
        limits = [row.max_new_tokens for row in rows]
        if min(limits) < self._max_new_tokens:
            settings["max_new_tokens"] = limits
        if on_text and self._is_single:
            decode = self.pipeline.decoder(rows[0].inputs)
            settings["streamer"] = DeltaStreamer(decode, self._config.stop_strings or (), on_text)
        if self._prefix and len(rows) > 1 and (prefix := self._prefix.find(rows)):
            settings["prefix"] = prefix
        # Only the time of decoding steps tells whether a batch has a good size: prefill depends on the prompts.
        return self.pipeline.forward(collate(rows), **settings), len(rows) * timer.speed


class SharedPrefix:
    """Keys and values of the tokens that all prompts of a job begin with, computed once."""

    def __init__(self, pipeline: "Pipeline") -> None:
        self._pipeline = pipeline
        self._ids: list[int] | None = None
        self._cache: Cache | None = None
        self._is_usable = True

    def find(self, rows: Sequence[Row]) -> "tuple[list[int], Cache] | None":
        """Return the tokens that these prompts begin with, and their keys and values; None if they are too few.

        The first batch determines the prefix; a later batch with only a part of it makes it shorter.
        """
        if not self._is_usable:
            return None
        known = [] if self._ids is None else [self._ids]
        # The last token of a prompt has to be computed: its logits give the first new token.
        prompts = [row.inputs["input_ids"].tolist()[:-1] for row in rows]
        prefix = list(os.path.commonprefix([*known, *prompts]))  # noqa: RUF071  # of lists, not of paths
        if len(prefix) < MIN_PREFIX_TOKENS:
            self._is_usable = False
            return None
        if prefix != self._ids:
            self._ids, self._cache = prefix, self._pipeline.prefill(prefix)
            self._is_usable = self._cache is not None
        return (prefix, self._cache) if self._is_usable else None
