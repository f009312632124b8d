"""One group of records through a loaded pipeline: each gets its result, whatever befalls the others."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llmcli.errors import LlmcliError, RecordError
from llmcli.job import Failure, Job, Record, Result
from llmcli.tasks import TASKS

OnText = Callable[[str], None]


@dataclass(slots=True)
class Work:
    """A record on its way through a batch."""

    record: Record
    prepared: Any = None
    inputs: dict[str, Any] | None = None
    result: Result | None = None

    def fail(self, kind: str, message: str) -> None:
        self.result = Result(self.record, failure=Failure(kind, message))


def prepared(job: Job, record: Record) -> Work:
    """The record as its task reads it; with its result already, where no model is needed for that."""
    task, work = TASKS[job.task], Work(record)
    if record.failure:
        work.result = Result(record, failure=record.failure)
    elif record.has_failed_before:
        work.result = Result(record)
    else:
        with _failing(work):
            work.prepared = task.prepare(job, record.fields)
            if work.prepared is None:
                work.result = Result(record, task.empty)
    return work


class Runner:
    """One job on one loaded pipeline."""

    def __init__(self, job: Job, pipeline: Any) -> None:
        self.job, self.task, self.pipeline = job, TASKS[job.task], pipeline
        self.truncate: Any = job.truncate

    def run(self, works: Sequence[Work], on_text: OnText | None) -> None:
        """Gives every record that has none its result."""
        for work in works:
            if work.result is None:
                with _failing(work):
                    work.inputs = self.pipeline.preprocess(work.prepared, truncate=self.truncate)
        # Pieces go out at once: nothing may still stand before them.
        self._run([work for work in works if work.result is None], on_text if len(works) == 1 else None)

    def _run(self, works: Sequence[Work], on_text: OnText | None) -> None:
        self._batch(works, {})

    def _batch(self, works: Sequence[Work], settings: Mapping[str, Any], streamer: Any = None) -> None:
        """One forward pass for all, but where it fails one for each."""
        if len(works) < 2:
            for work in works:
                with _failing(work):
                    self._forward([work], settings, {"streamer": streamer} if streamer else {})
            return
        try:
            self._forward(works, settings, {})
        except LlmcliError:
            raise
        except Exception:  # one record must not take the others with it
            failed = True
        else:
            failed = False
        if failed:  # out here, where the exception holds no memory of the failed pass any more
            for work in works:
                self._batch([work], settings)

    def _forward(self, works: Sequence[Work], settings: Mapping[str, Any], streaming: Mapping[str, Any]) -> None:
        from transformers.pipelines.base import pad_collate_fn

        batch = pad_collate_fn(self.pipeline.tokenizer, None)([work.inputs for work in works])
        outputs = self.pipeline.forward(batch, **settings, **streaming)
        for row, work in enumerate(works):
            output = {name: value[row : row + 1] if hasattr(value, "shape") else value[row]
                      for name, value in outputs.items()}  # fmt: skip
            fields = self.pipeline.postprocess(output, **settings)
            work.result = Result(work.record, fields, self.task.text(self.job, work.prepared, fields))


class GeneratingRunner(Runner):
    """A job that generates text: as the merged GenerationConfig says, and within the model's context."""

    def __init__(self, job: Job, pipeline: Any) -> None:
        super().__init__(job, pipeline)
        from transformers import set_seed

        from llmcli import generation

        assert self.task.defaults is not None
        self.config = generation.merge(pipeline.model.generation_config, job.generation, self.task.defaults)
        if self.config.pad_token_id is None:
            self.config.pad_token_id = pipeline.tokenizer.pad_token_id
        self.truncate = self.config.max_new_tokens if job.truncate else None
        if job.seed is not None:
            set_seed(job.seed)

    def _run(self, works: Sequence[Work], on_text: OnText | None) -> None:
        """All in one batch, but those whose answer must stop where the model's context ends, each alone."""
        streamer = self._streamer(works[0], on_text) if works and on_text else None
        together = [work for work in works if self._room(work) is None]
        self._batch(together, {"generation_config": self.config}, streamer)
        for work in works:
            if (room := self._room(work)) is not None:
                config = copy.deepcopy(self.config)
                config.max_new_tokens = room
                self._batch([work], {"generation_config": config}, streamer)

    def _room(self, work: Work) -> int | None:
        """Tokens left for the answer in the model's context, if that is fewer than asked for."""
        context, most = self.pipeline.context, self.config.max_new_tokens
        room = context - work.inputs["input_ids"].shape[1] if context and work.inputs else None
        return room if room is not None and most is not None and room < most else None

    def _streamer(self, work: Work, on_text: OnText) -> Any:
        """None where tokens do not come one by one: beams, or several sequences at once."""
        from llmcli.pipelines.causal import Deltas

        if (self.config.num_beams or 1) > 1 or (self.config.num_return_sequences or 1) > 1:
            return None
        if prefix := self.task.prefix(self.job, work.prepared):
            on_text(prefix)
        return Deltas(self.pipeline.decoder(work.inputs), self.config.stop_strings or (), on_text)


@contextmanager
def _failing(work: Work) -> Iterator[None]:
    """Whatever goes wrong here is this record's failure; but not what is wrong with the job."""
    try:
        yield
    except RecordError as problem:
        work.fail(problem.kind, _sentence(problem))
    except LlmcliError:
        raise
    except Exception as problem:
        work.fail("failed", f"{type(problem).__name__}: {str(problem).strip() or 'no reason given'}")


def _sentence(problem: LlmcliError) -> str:
    return f"{problem.message}: {problem.hint}" if problem.hint else problem.message
