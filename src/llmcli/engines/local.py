"""The engine of this process: loads the model, runs records in batches."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from llmcli import console, registry, store
from llmcli.engines.readahead import ReadAhead
from llmcli.engines.runner import GeneratingRunner, OnText, Runner, prepared
from llmcli.errors import ModelUnavailable
from llmcli.job import Job, Placement, Record, Result
from llmcli.loader import quiet_libraries
from llmcli.tasks import TASKS

BATCH_SIZE = 8


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
            works = [prepared(job, record) for record in group]
            if any(work.result is None for work in works):
                runner = runner or self._runner(job)
                runner.run(works, on_text)
            for work in works:
                assert work.result is not None
                yield work.result

    def _runner(self, job: Job) -> Runner:
        kind = Runner if TASKS[job.task].defaults is None else GeneratingRunner
        return kind(job, self.load(job))

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
            if task.defaults is not None:
                generation.check(job.generation, task.defaults)
            if key != self._key:
                self._key, self._pipeline = key, _load(*key)
        return self._pipeline


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


def _load(name: str, kind: str, placement: Placement) -> Any:
    from llmcli import pipelines

    spec = registry.resolve(name)
    folder = store.pull(spec, offline=placement.offline, allow_pickle=placement.allow_pickle)
    try:
        with console.working(f"loading {name}"):
            return pipelines.load(kind, folder, placement)
    except MemoryError as problem:
        raise ModelUnavailable(f"{name} does not fit in memory", hint="take a smaller model") from problem
