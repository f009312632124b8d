"""Runs requests through a loaded pipeline in batches. What happens to one request does not affect the others."""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmcli import console
from llmcli.engines.batching import BatchPolicy
from llmcli.engines.requests import OnText, Request, capture_errors, is_out_of_memory
from llmcli.errors import LlmcliError
from llmcli.job import JsonObject

if TYPE_CHECKING:
    from transformers import Pipeline


@dataclass(slots=True, eq=False)
class Row:
    """A row of a batch: row `index` of its request. `max_new_tokens` is its own limit, if it generates."""

    request: Request
    index: int
    inputs: dict[str, Any]
    length: int
    max_new_tokens: int = 0


class BatchRunner:
    """Runs requests on a pipeline: `add` them, then `step` until the queue is empty.

    `on_token`, if set, is called after each token that a batch generates; it may raise. Where equal inputs have equal
    outputs (`is_repeatable`), duplicates run once.
    """

    def __init__(
        self,
        pipeline: "Pipeline",
        policy: BatchPolicy,
        parameters: JsonObject,
        *,
        truncate: object = None,
        is_repeatable: bool = True,
    ) -> None:
        self.pipeline, self.policy = pipeline, policy
        self.on_token: Callable[[], None] | None = None
        self.queue: list[Row] = []
        before, _, self._postprocess_parameters = pipeline._sanitize_parameters(**parameters)
        self._preprocess_parameters = {**before, "truncate": truncate}
        self._takes_rows = inspect.isgeneratorfunction(pipeline.preprocess)
        self._is_repeatable = is_repeatable
        self._unfinished: dict[str, Request] = {}  # by key, to find duplicates

    def add(self, requests: Sequence[Request]) -> None:
        """Queue the rows of requests. A request that cannot be preprocessed fails at once."""
        for request in requests:
            if self._is_repeatable and (original := self._unfinished.get(request.key)):
                original.duplicates.append(request)
                continue
            with capture_errors(request):
                made = self.pipeline.preprocess(request.input, **self._preprocess_parameters)
                rows = [*made] if self._takes_rows else [made]
                request.row_count = len(rows)
                self._unfinished[request.key] = request
                self.queue += [self._make_row(request, i, inputs) for i, inputs in enumerate(rows)]

    def step(self, on_text: OnText | None = None) -> None:
        """Run one batch: the row that has waited longest, and similar ones. `on_text` receives the text of one row."""
        candidates = self._find_candidates()
        batch = [candidates[i] for i in self.policy.choose([row.length for row in candidates])]
        chosen = set(map(id, batch))
        self.queue = [row for row in self.queue if id(row) not in chosen]
        self._run_batch(batch, on_text if len(batch) == 1 else None)
        for request in {id(row.request): row.request for row in batch}.values():
            if request.failure or len(request.row_outputs) == request.row_count:
                self._finish(request)

    def _run_batch(self, rows: list[Row], on_text: OnText | None = None) -> None:
        """Run a batch. Out of memory, queue it again for smaller batches; after another error, run each row alone."""
        if len(rows) == 1:
            with capture_errors(rows[0].request):
                self._run_forward(rows, on_text)
            return
        try:
            self._run_forward(rows)
            return
        except LlmcliError:
            raise
        except Exception as exc:  # one record must not fail the others
            is_oom = is_out_of_memory(exc)
        # Out here, the exception no longer holds the memory of the failed batch.
        if is_oom:
            self.policy.observe_out_of_memory([row.length for row in rows])
            console.warning(f"out of memory with a batch of {len(rows)} records; retrying with smaller batches")
            self.queue = rows + self.queue
        else:
            for row in rows:
                self._run_batch([row])

    def _run_forward(self, rows: Sequence[Row], on_text: OnText | None = None) -> None:
        """Run the pipeline's forward pass, and tell the policy how it went."""
        self.policy.start_batch()
        start = time.perf_counter()
        outputs, speed = self._forward(rows, on_text)
        lengths = [row.length for row in rows]
        self.policy.observe(lengths, speed or len(rows) * max(lengths) / (time.perf_counter() - start))
        for i, row in enumerate(rows):
            row.request.row_outputs[row.index] = {
                name: value[i : i + 1] if hasattr(value, "shape") else value[i] for name, value in outputs.items()
            }

    def _finish(self, request: Request) -> None:
        """Make the output of a request from those of its rows."""
        if not request.failure:
            with capture_errors(request):
                rows = [request.row_outputs[i] for i in range(request.row_count)]
                made = rows if self._takes_rows else rows[0]
                request.output = self.pipeline.postprocess(made, **self._postprocess_parameters)
        request.row_outputs = {}
        self._unfinished.pop(request.key, None)
        for duplicate in request.duplicates:
            duplicate.output, duplicate.failure = request.output, request.failure

    def _make_row(self, request: Request, index: int, inputs: dict[str, Any]) -> Row:
        return Row(request, index, inputs, len(inputs["input_ids"]))

    def _find_candidates(self) -> list[Row]:
        """Return the rows that may share a batch with the first one."""
        return self.queue

    def _forward(self, rows: Sequence[Row], on_text: OnText | None) -> tuple[Mapping[str, Any], float]:
        """Return the outputs of a batch and its speed, in tokens per second of each row; 0 if that is not known."""
        return self.pipeline.forward(collate(rows)), 0.0


def collate(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return the inputs of rows as one list per field."""
    return {name: [row.inputs[name] for row in rows] for name in rows[0].inputs}
