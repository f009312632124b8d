"""The engine of this process: loads the model, runs records in batches."""

import copy
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llmcli import console, registry, store
from llmcli.engines.readahead import ReadAhead
from llmcli.errors import LlmcliError, ModelUnavailable, RecordError
from llmcli.job import Failure, Job, Placement, Record, Result
from llmcli.loader import quiet_libraries
from llmcli.tasks import TASKS

BATCH_SIZE = 8
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


class LocalEngine:
    """Keeps the last model it loaded, for the next call of `run`."""

    def __init__(self) -> None:
        self._key: Any = None
        self._pipeline: Any = None

    def run(self, job: Job, records: Iterable[Record], on_text: OnText | None = None) -> Iterator[Result]:
        """Results in the order of the records. The model is loaded when the first record needs it.

        Raises ModelUnavailable and UsageError; what is wrong with one record is a failure in its Result.
        """
        size = job.batch_size or BATCH_SIZE
        runner: Runner | None = None
        # A seed repeats a sampled run only where the batches do not depend on how fast the input comes.
        wait = job.seed is not None and job.generation.get("do_sample") is not False
        for group in ReadAhead(records, 2 * size).groups(size, wait=wait):
            works = [_prepare(job, record) for record in group]
            if any(work.result is None for work in works):
                runner = runner or Runner(job, self.load(job))
                runner.run(works, on_text)
            for work in works:
                assert work.result is not None
                yield work.result

    def load(self, job: Job) -> Any:
        """The pipeline of the job: the last call's, if it is the same, else loaded now."""
        from llmcli import generation

        task = TASKS[job.task]
        key = (job.model, task.pipeline, job.placement)
        if self._pipeline is not None and key != self._key:  # the old model's memory first
            self._key = self._pipeline = None
            gc.unfreeze()
            gc.collect()
        with _long_lived_objects():
            quiet_libraries()
            generation.check(job.generation, task.defaults)
            if key != self._key:
                self._key, self._pipeline = key, _load(*key)
        return self._pipeline


class Runner:
    """One job on one loaded pipeline."""

    def __init__(self, job: Job, pipeline: Any) -> None:
        from transformers import set_seed

        from llmcli import generation

        self.job, self.task, self.pipeline = job, TASKS[job.task], pipeline
        self.config = generation.merge(pipeline.model.generation_config, job.generation, self.task.defaults)
        if self.config.pad_token_id is None:
            self.config.pad_token_id = pipeline.tokenizer.pad_token_id
        if job.seed is not None:
            set_seed(job.seed)

    def run(self, works: Sequence[Work], on_text: OnText | None) -> None:
        """Gives every record that has none its result: all in one batch, but those whose answer must
        stop where the model's context ends, each alone."""
        truncate = self.config.max_new_tokens if self.job.truncate else None
        for work in works:
            if work.result is None:
                with _failing(work):
                    work.inputs = self.pipeline.preprocess(work.prepared, truncate=truncate)
        todo = [work for work in works if work.result is None]
        # Pieces go out at once: nothing may still stand before them.
        stream = on_text if len(works) == 1 else None
        together = [work for work in todo if self._room(work) is None]
        if together:
            self._batch(together, self.config, stream)
        for work in todo:
            if (room := self._room(work)) is not None:
                config = copy.deepcopy(self.config)
                config.max_new_tokens = room
                self._batch([work], config, stream)

    def _room(self, work: Work) -> int | None:
        """Tokens left for the answer in the model's context, if that is fewer than asked for."""
        context, most = self.pipeline.context, self.config.max_new_tokens
        room = context - work.inputs["input_ids"].shape[1] if context and work.inputs else None
        return room if room is not None and most is not None and room < most else None

    def _batch(self, works: Sequence[Work], config: Any, on_text: OnText | None) -> None:
        if len(works) == 1:
            with _failing(works[0]):
                self._forward(works, config, on_text)
            return
        try:
            self._forward(works, config, None)
        except LlmcliError:
            raise
        except Exception:  # one record must not take the others with it
            failed = True
        else:
            failed = False
        if failed:  # out here, where the exception holds no memory of the failed pass any more
            for work in works:
                self._batch([work], config, None)

    def _forward(self, works: Sequence[Work], config: Any, on_text: OnText | None) -> None:
        from transformers.pipelines.base import pad_collate_fn

        streamer = self._streamer(works[0], config, on_text) if on_text else None
        batch = pad_collate_fn(self.pipeline.tokenizer, None)([work.inputs for work in works])
        outputs = self.pipeline.forward(batch, generation_config=config, streamer=streamer)
        for row, work in enumerate(works):
            output = {name: value[row : row + 1] if hasattr(value, "shape") else value[row]
                      for name, value in outputs.items()}  # fmt: skip
            fields = self.pipeline.postprocess(output, generation_config=config)
            work.result = Result(work.record, fields, self.task.text(self.job, work.prepared, fields))

    def _streamer(self, work: Work, config: Any, on_text: OnText) -> Any:
        """None where tokens do not come one by one: beams, or several sequences at once."""
        from llmcli.pipelines.causal import Deltas

        if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
            return None
        if prefix := self.task.prefix(self.job, work.prepared):
            on_text(prefix)
        return Deltas(self.pipeline.decoder(work.inputs), config.stop_strings or (), on_text)


@contextmanager
def _long_lived_objects() -> Iterator[None]:
    """Spare the garbage collector a million objects that stay: imports and weights. It takes a quarter of a cold
    call to walk them again and again, while they are made and at exit."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


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


def _prepare(job: Job, record: Record) -> Work:
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


def _sentence(problem: LlmcliError) -> str:
    return f"{problem.message}: {problem.hint}" if problem.hint else problem.message


def _load(name: str, kind: str, placement: Placement) -> Any:
    from llmcli import pipelines

    spec = registry.resolve(name)
    folder = store.pull(spec, offline=placement.offline, allow_pickle=placement.allow_pickle)
    try:
        with console.working(f"loading {name}"):
            return pipelines.load(kind, folder, placement)
    except MemoryError as problem:
        raise ModelUnavailable(f"{name} does not fit in memory", hint="take a smaller model") from problem
