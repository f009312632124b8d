"""Inputs through a loaded pipeline, in batches: each gets its output, whatever befalls the others."""

import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmcli import console
from llmcli.engines.batching import UNIT, UNIT_ELSEWHERE, BatchSize, alike, neighbours
from llmcli.engines.memory import MemoryEstimator, reader
from llmcli.engines.request import OnText, Request, capture_errors, is_out_of_memory
from llmcli.errors import LlmcliError, UsageError
from llmcli.job import Job
from llmcli.prefix import common
from llmcli.tasks import LocalModel, Strategy

LEAST_SHARED = 16  # tokens that all prompts begin with, for which it pays to keep their keys and values


@dataclass(slots=True, eq=False)
class Row:
    """A row of a batch: number `index` of its request. Rows of the same `room` can run together."""

    request: Request
    index: int
    inputs: dict[str, Any]
    length: int
    room: int | None


class BatchRunner:
    """One job on one loaded pipeline: `add` requests, then `step` until none is `waiting`."""

    def __init__(self, job: Job, strategy: Strategy, model: LocalModel) -> None:
        self.pipeline = pipeline = model.pipeline
        self.size = BatchSize(job.batch_size, pipeline.device.type)
        # Where all tokens are read at once, a batch is so many tokens, and `size` counts rows of this length.
        by_rows = job.batch_size or strategy.defaults is not None
        self.unit = None if by_rows else UNIT.get(pipeline.device.type, UNIT_ELSEWHERE)
        self.memory = MemoryEstimator(reader(pipeline.device.type))
        self.answer = 0  # tokens that an answer may have
        self.truncate: Any = job.truncate
        self.parameters = dict(strategy.parameters(job, model))
        self.repeats = False  # whether equal inputs may have different outputs
        self.on_token: Callable[[], None] | None = None  # called after each token that a batch generates
        self.waiting: list[Row] = []
        self._leaders: dict[str, Request] = {}
        self._takes_rows = inspect.isgeneratorfunction(pipeline.preprocess)

    def add(self, requests: Sequence[Request]) -> None:
        """Their rows wait for a batch. Those that cannot be read have their failure at once."""
        before, _ = self._settings
        for request in requests:
            if not self.repeats and (leader := self._leaders.get(request.key)):
                leader.followers.append(request)
                continue
            with capture_errors(request):
                made = self.pipeline.preprocess(request.input, **before)
                rows = [*made] if self._takes_rows else [made]
                request.rows = len(rows)
                self._leaders[request.key] = request
                self.waiting += [
                    Row(request, i, row, len(row["input_ids"]), self._room(row)) for i, row in enumerate(rows)
                ]

    def step(self, on_text: OnText | None = None) -> None:
        """One batch: the row that has waited longest, and those nearest to it in length. `on_text` gets the text of a
        single row as it comes."""
        together = [row for row in self.waiting if row.room == self.waiting[0].room]
        chosen = self._chosen(together)
        taken = set(map(id, chosen))
        self.waiting = [row for row in self.waiting if id(row) not in taken]
        self._batch(chosen, on_text if len(chosen) == 1 else None)
        for request in {id(row.request): row.request for row in chosen}.values():
            if request.failure or len(request.done) == request.rows:
                self._finish(request)

    def _chosen(self, rows: Sequence[Row]) -> list[Row]:
        """The first, and as many like it as there is memory for."""
        lengths, size = [row.length for row in rows], self.size.now
        while True:
            chosen = [rows[i] for i in (alike(lengths, size * self.unit) if self.unit else neighbours(lengths, size))]
            if len(chosen) == 1 or self.memory.fits(self._tokens(chosen)):
                return chosen
            size = self._size(chosen) // 2

    def _size(self, rows: Sequence[Row]) -> int:
        """Of a batch, as `size` counts it."""
        return self._tokens(rows) // self.unit if self.unit else len(rows)

    def _tokens(self, rows: Sequence[Row]) -> int:
        """As a batch, with padding and answers."""
        return len(rows) * (max(row.length for row in rows) + self.answer)

    @cached_property
    def _settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What preprocess and postprocess are told."""
        before, _, after = self.pipeline._sanitize_parameters(**self.parameters)
        return {**before, "truncate": self.truncate}, after

    def _finish(self, request: Request) -> None:
        """The output of all rows together."""
        _, after = self._settings
        if not request.failure:
            with capture_errors(request):
                rows = [request.done[i] for i in range(request.rows)]
                request.output = self.pipeline.postprocess(rows if self._takes_rows else rows[0], **after)
        request.done = {}
        self._leaders.pop(request.key, None)
        for follower in request.followers:
            follower.output, follower.failure = request.output, request.failure

    def _room(self, row: Mapping[str, Any]) -> int | None:
        return None

    def _batch(self, rows: Sequence[Row], on_text: OnText | None = None) -> None:
        """One forward pass for all; in halves where memory does not suffice, one for each where it fails otherwise."""
        if len(rows) == 1:
            with capture_errors(rows[0].request):
                speed = self._forward(rows, on_text)
                if self.unit:  # a single long row may be all that fits
                    self._learn(rows, speed)
            return
        out_of_memory = False
        try:
            self._learn(rows, self._forward(rows))
            return
        except LlmcliError:
            raise
        except Exception as exc:  # one record must not take the others with it
            out_of_memory = is_out_of_memory(exc)
        # Out here the exception holds no memory of the failed pass any more.
        if out_of_memory:
            self.size.halve()
            now = f"{self.size.now * self.unit} tokens" if self.unit else self.size.now
            console.notice(f"memory ran out with {len(rows)} records a batch: going on with {now}")
            middle = len(rows) // 2
            self._batch(rows[:middle])
            self._batch(rows[middle:])
        else:
            for row in rows:
                self._batch([row])

    def _learn(self, rows: Sequence[Row], speed: float) -> None:
        self.size.learn(self._size(rows), speed)
        self.memory.learn(self._tokens(rows))

    def _forward(self, rows: Sequence[Row], on_text: OnText | None = None) -> float:
        """Run them; how fast it went, in tokens a second, padding included."""
        start = time.perf_counter()
        self._take(rows, self.pipeline.forward(self._collated(rows)))
        return len(rows) * max(row.length for row in rows) / (time.perf_counter() - start)

    def _collated(self, rows: Sequence[Row]) -> dict[str, list[Any]]:
        return {name: [row.inputs[name] for row in rows] for name in rows[0].inputs}

    def _take(self, rows: Sequence[Row], outputs: Mapping[str, Any]) -> None:
        for i, row in enumerate(rows):
            row.request.done[row.index] = {
                name: value[i : i + 1] if hasattr(value, "shape") else value[i] for name, value in outputs.items()
            }


class GeneratingRunner(BatchRunner):
    """A job that generates text: as the merged GenerationConfig says, and within the model's context."""

    def __init__(self, job: Job, strategy: Strategy, model: LocalModel) -> None:
        super().__init__(job, strategy, model)
        from transformers import set_seed

        from llmcli.models import generation

        assert strategy.defaults is not None
        pipeline = self.pipeline
        if unknown := [name for name in self.parameters if not hasattr(pipeline.model.generation_config, name)]:
            raise UsageError(f"prompts.toml: [{job.task}]: unknown generation option {unknown[0]!r}")
        self.config = generation.merge(
            pipeline.model.generation_config,
            job.generation,
            strategy.defaults,
            self.parameters,
            counts_prompt=not pipeline.model.config.is_encoder_decoder,
        )
        if self.config.pad_token_id is None:
            self.config.pad_token_id = pipeline.tokenizer.pad_token_id
        self.parameters = {"generation_config": self.config}
        self.truncate = (self.config.max_new_tokens or 0) if job.truncate else None
        self.repeats = bool(self.config.do_sample)
        self.answer = self.config.max_new_tokens or self.config.max_length or 0
        self._is_single = (self.config.num_beams or 1) == 1 and (self.config.num_return_sequences or 1) == 1
        self._shared: Any = None  # ids that prompts begin with, and their keys and values
        self._shares = self._is_single and hasattr(pipeline, "prefill")
        if job.seed is not None:
            set_seed(job.seed)

    def _forward(self, rows: Sequence[Row], on_text: OnText | None = None) -> float:
        """Run them; how fast new tokens came. What the prompts took says nothing of the batch's size."""
        from llmcli.pipelines.answers import TokenTimer

        config, clock, settings = self.config, TokenTimer(self.on_token), dict[str, Any]()
        if rows[0].room is not None:  # the answer must stop where the model's context ends
            config = copy.deepcopy(config)
            config.max_new_tokens, config.max_length = rows[0].room, None
        if on_text and self._is_single:
            from llmcli.pipelines.answers import DeltaStreamer

            decode = self.pipeline.decoder(rows[0].inputs)
            settings["streamer"] = DeltaStreamer(decode, self.config.stop_strings or (), on_text)
        if len(rows) > 1 and self._shares and (shared := self._prefix(rows)):
            settings["prefix"] = shared
        inputs = self._collated(rows)
        self._take(rows, self.pipeline.forward(inputs, generation_config=config, criteria=[clock], **settings))
        return len(rows) * clock.speed

    def _prefix(self, rows: Sequence[Row]) -> Any:
        """What these prompts all begin with, if it is long enough: found in the first batch, and shortened by a later
        one that has only a part of it."""
        ids = [row.inputs["input_ids"].tolist() for row in rows]
        known = [self._shared[0]] if self._shared else []
        shared = common([*known, *(some[:-1] for some in ids)])
        if len(shared) < LEAST_SHARED:
            self._shares = False
            return None
        if not known or len(shared) < len(known[0]):
            self._shared = (shared, self.pipeline.prefill(shared))
            self._shares = self._shared[1] is not None
        return self._shared if self._shares else None

    def _room(self, row: Mapping[str, Any]) -> int | None:
        """Tokens left for the answer in the model's context, if that is fewer than asked for."""
        room: int | None = self.pipeline.remaining_context(row)
        most = self.config.max_new_tokens or self.config.max_length
        return room if room is not None and most is not None and room < most else None
