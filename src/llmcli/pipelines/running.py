"""Batches that generate step by step: rows leave them when they end, and others may join."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llmcli.pipelines.stopping import TokenTimer

if TYPE_CHECKING:
    from transformers import DynamicCache, GenerationConfig, Pipeline
    from transformers.generation.streamers import BaseStreamer

    from llmcli.pipelines.base import Inputs

FREE_FRACTION = 0.25  # of a batch, of which fewer rows do not repay to read others, or to copy the rest
Prefix = tuple[list[int], "DynamicCache"]  # tokens that all rows begin with, and their keys and values


class GeneratingRow(NamedTuple):
    """What `preprocess` gave for a row, and what applies to this row alone."""

    inputs: "Inputs"
    max_new_tokens: int
    constraint: str | None = None  # as a grammar
    seed: int | None = None


@dataclass
class BatchSettings:
    """What applies to all rows of a batch. Only `max_rows` may change while it runs."""

    config: "GenerationConfig"
    logprobs: int | None = None  # how many alternatives to each token; None: no log-probabilities
    streamer: "BaseStreamer | None" = None  # gets the tokens of a row that is alone
    on_token: Callable[[], None] | None = None  # called after each token; may raise
    max_rows: int = 1  # that will be in the batch at any time
    max_length: int = 0  # tokens of the longest row that may be added later, answer included
    is_fixed: bool = False  # whether the moments at which rows leave must not depend on time

    def has_room(self, rows: int) -> bool:
        """Return whether others may join that many rows."""
        return rows <= (1 - FREE_FRACTION) * self.max_rows


class RunningBatch(ABC):
    """Rows that generate together, numbered from 0 in the order in which they were added.

    After an exception, its unfinished rows are lost, and the batch cannot be used.
    """

    can_add = False  # whether rows may join
    speed = 0.0  # tokens per second of each row in the last step; 0 if unknown

    @abstractmethod
    def add(self, rows: Sequence[GeneratingRow], prefix: Prefix | None = None) -> None:
        """Let rows join. `prefix` is what all of these begin with."""

    @abstractmethod
    def step(self) -> "dict[int, Inputs]":
        """Go on until rows have ended, and return their outputs, which `postprocess` takes, by number.

        None may have ended: it also returns from time to time, so that others can join.
        """


class WholeBatch(RunningBatch):
    """Rows of which none leaves before all have ended: one forward pass of the pipeline."""

    def __init__(self, pipeline: "Pipeline", settings: BatchSettings) -> None:
        self._pipeline, self._settings = pipeline, settings

    def add(self, rows: Sequence[GeneratingRow], prefix: Prefix | None = None) -> None:
        timer = TokenTimer(self._settings.on_token)
        options: dict[str, Any] = {"generation_config": self._settings.config, "criteria": [timer]}
        options |= {"logprobs": self._settings.logprobs} if self._settings.logprobs is not None else {}
        options |= {"streamer": self._settings.streamer} if self._settings.streamer else {}
        options |= {"prefix": prefix} if prefix else {}
        columns = {name: [getattr(row, name) for row in rows] for name in ("max_new_tokens", "constraint", "seed")}
        if {*columns["max_new_tokens"]} != {self._settings.config.max_new_tokens or self._settings.config.max_length}:
            options["max_new_tokens"] = columns["max_new_tokens"]
        if any(columns["constraint"]):
            options["constraints"] = columns["constraint"]
        if any(seed is not None for seed in columns["seed"]):
            options["seeds"] = columns["seed"]
        self._inputs = {name: [row.inputs[name] for row in rows] for name in rows[0].inputs}
        self._options, self._timer, self._count = options, timer, len(rows)

    def step(self) -> "dict[int, Inputs]":
        outputs = self._pipeline.forward(self._inputs, **self._options)
        self.speed = self._timer.speed
        return split_outputs(outputs, range(self._count))


def split_outputs(outputs: "Inputs", rows: Iterable[int]) -> "dict[int, Inputs]":
    """Return the outputs of some rows of a batch by number, arrays with a batch size of 1."""
    return {
        i: {name: value[i : i + 1] if hasattr(value, "shape") else value[i] for name, value in outputs.items()}
        for i in rows
    }
