"""The engine of this process: loads models, and takes each record through the steps of its task, in batches."""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmcli import console, registry, store, tasks
from llmcli.engines.readahead import ReadAhead
from llmcli.engines.runner import GeneratingRunner, OnText, Request, Runner, failure
from llmcli.errors import ModelUnavailable, RecordError
from llmcli.job import Failure, Job, Record, Result
from llmcli.loader import quiet_libraries
from llmcli.tasks import Ask, Steps, Way

BATCH_SIZE = 8


class Model:
    """A job's model as its steps see it: the folder of its weights, and a pipeline, loaded when first asked for."""

    def __init__(self, job: Job, loaded: dict[Any, Any]) -> None:
        self._job, self._loaded = job, loaded

    @cached_property
    def folder(self) -> Path:
        """Raises ModelUnavailable."""
        placement = self._job.placement
        spec = registry.resolve(self._job.model)
        return store.pull(spec, offline=placement.offline, allow_pickle=placement.allow_pickle)

    @cached_property
    def kind(self) -> str:
        """Which of the task's ways it goes. Raises ModelUnavailable where it can go none."""
        ways = list(tasks.find(self._job.task).ways)
        return ways[0] if len(ways) == 1 else self._able_kind

    @cached_property
    def pipeline(self) -> Any:
        """Raises ModelUnavailable; UsageError for a device that is not here."""
        key = (self._job.model, self.kind, self._job.placement)
        if key not in self._loaded:
            self._loaded[key] = self._load()
        return self._loaded[key]

    def _load(self) -> Any:
        from llmcli import pipelines

        folder, kind = self.folder, self._able_kind
        with _long_lived_objects(), console.working(f"loading {self._job.model}"):
            try:
                return pipelines.load(kind, folder, self._job.placement)
            except MemoryError as problem:
                raise ModelUnavailable(
                    f"{self._job.model} does not fit in memory", hint="take a smaller model"
                ) from problem

    @cached_property
    def _able_kind(self) -> str:
        with _long_lived_objects():
            return _able_kind(self._job, self.folder)


@dataclass(slots=True)
class Work:
    """A record on its way: its steps, and what they ask for now."""

    record: Record
    prepared: Any = None
    steps: Steps | None = None
    ask: Ask | None = None
    result: Result | None = None

    def fail(self, why: Failure) -> None:
        self.result = Result(self.record, failure=why)

    def go_on(self, outputs: list[Any] | None) -> None:
        """On to the next thing that the steps ask for, or the result."""
        assert self.steps
        try:
            self.ask = self.steps.send(outputs)  # type: ignore[arg-type]  # None begins it
        except StopIteration as end:
            self.result = Result(self.record, end.value.output, end.value.text)
        except RecordError as problem:
            self.fail(failure(problem))


class LocalEngine:
    """Keeps the models that it loaded, for the next call of `run`."""

    def __init__(self) -> None:
        self._loaded: dict[Any, Any] = {}

    def run(self, job: Job, records: Iterable[Record], on_text: OnText | None = None) -> Iterator[Result]:
        """Results in the order of the records. The model is loaded when the first record needs it.

        Raises ModelUnavailable and UsageError; what is wrong with one record is a failure in its Result.
        """
        size = job.batch_size or BATCH_SIZE
        # A seed repeats a sampled run only where the batches do not depend on how fast the input comes.
        wait = job.seed is not None and job.generation.get("do_sample") is not False
        turn: Turn | None = None
        for group in ReadAhead(records, 2 * size).groups(size, wait=wait):
            works = [_begun(job, record) for record in group]
            if any(work.result is None for work in works):
                turn = turn or Turn(self, job)
                turn.run(works, on_text if len(works) == 1 else None)  # nothing may still stand before the pieces
            for work in works:
                assert work.result is not None
                yield work.result

    def load(self, job: Job) -> None:
        """Load the job's model now."""
        Turn(self, job).runner  # noqa: B018

    def model(self, job: Job) -> Model:
        """The job's model, not yet loaded."""
        return Model(job, self._loaded)


class Turn:
    """One job on its model. Raises UsageError where the job's options make no sense, before any model is sought."""

    def __init__(self, engine: LocalEngine, job: Job) -> None:
        self.engine, self.job = engine, job
        self.model = engine.model(job)
        _check(job)

    @cached_property
    def way(self) -> Way:
        return tasks.find(self.job.task).ways[self.model.kind]

    @cached_property
    def runner(self) -> Runner:
        kind = Runner if self.way.defaults is None else GeneratingRunner
        return kind(self.job, self.way, self.model.pipeline, self.job.batch_size or BATCH_SIZE)

    def run(self, works: Sequence[Work], on_text: OnText | None) -> None:
        """Gives every record that has none its result: what all of them ask for next runs together."""
        open_works = [work for work in works if work.result is None]
        for work in open_works:
            work.steps = self.way.steps(self.job, work.prepared, self.model)
            work.go_on(None)
        while open_works := [work for work in open_works if work.result is None]:
            asked = [(work, work.ask, [Request(each) for each in work.ask.inputs]) for work in open_works if work.ask]
            own = [request for _, ask, requests in asked if ask.job is None for request in requests]
            if own:
                self.runner.run(own, _shown(asked[0][1], on_text) if len(own) == 1 else None)
            for _, ask, requests in asked:
                if ask.job is not None:
                    self._other(ask.job, requests)
            for work, ask, requests in asked:
                if why := next((request.failure for request in requests if request.failure), None):
                    work.fail(why)
                else:
                    work.go_on([_stripped(request.output) if ask.strip else request.output for request in requests])

    def _other(self, job: Job, requests: Sequence[Request]) -> None:
        """Another task's answers."""
        records = [Record(request.input) for request in requests]
        for request, result in zip(requests, self.engine.run(job, records), strict=True):
            request.output, request.failure = result.output, result.failure


def _begun(job: Job, record: Record) -> Work:
    """The record as its task reads it; with its result already, where no model is needed for that."""
    task, work = tasks.find(job.task), Work(record)
    if record.failure:
        work.fail(record.failure)
    elif record.has_failed_before:
        work.result = Result(record)
    else:
        try:
            work.prepared = task.prepare(job, record.fields)
        except RecordError as problem:
            work.fail(failure(problem))
        else:
            if work.prepared is None:
                work.result = Result(record, task.empty)
    return work


def _able_kind(job: Job, folder: Path) -> str:
    """The first kind, of those that the task takes, that the model can be."""
    from llmcli import pipelines

    ways = tasks.find(job.task).ways
    reasons = pipelines.judge(folder, job.placement, ways)
    for kind, reason in reasons.items():
        if reason is None:
            return kind
    others = {name: tasks.find(name).ways for name in tasks.names()}
    verdict = pipelines.judge(folder, job.placement, {kind for ways in others.values() for kind in ways})
    able = [name for name, ways in others.items() if any(verdict[kind] is None for kind in ways)]
    raise ModelUnavailable(
        f"{job.model} cannot {job.task}: {' and '.join(map(str, reasons.values()))}",
        hint=f"it can {', '.join(able)}" if able else "llmcli has no task for it",
    )


def _check(job: Job) -> None:
    ways = tasks.find(job.task).ways
    generating = {kind: way.defaults for kind, way in ways.items() if way.defaults is not None}
    if generating:
        from llmcli import generation

        with _long_lived_objects():
            quiet_libraries()
            kind, defaults = next(iter(generating.items()))
            generation.check(job.generation, defaults, counts_prompt=kind == "causal")


def _shown(ask: Ask, on_text: OnText | None) -> OnText | None:
    """Where the answer goes while it comes, after the text that stands before it."""
    if on_text is None or ask.shown is None:
        return None
    if ask.shown:
        on_text(ask.shown)
    return _Stripping(on_text) if ask.strip else on_text


def _stripped(output: Mapping[str, Any]) -> dict[str, Any]:
    texts = {"generated_text": output["generated_text"].strip()}
    if "generated_texts" in output:
        texts["generated_texts"] = [text.strip() for text in output["generated_texts"]]
    return {**output, **texts}


class _Stripping:
    """Passes pieces on without the white space around the whole."""

    def __init__(self, on_text: OnText) -> None:
        self._on_text, self._begun, self._held = on_text, False, ""

    def __call__(self, piece: str) -> None:
        text = self._held + piece
        text = text if self._begun else text.lstrip()
        kept = text.rstrip()
        self._held = text[len(kept) :]
        if kept:
            self._begun = True
            self._on_text(kept)


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
