"""What an engine is; and what those have in common that take each record through the steps of its task: many records on
their strategy at a time, their results in input order."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmcli import console, tasks
from llmcli.engines.readahead import ReadAhead
from llmcli.engines.request import OnText, Request, Runner, failure
from llmcli.errors import RecordError
from llmcli.job import Failure, Job, Record, Result
from llmcli.lazy import lazy
from llmcli.tasks import ModelCall, Strategy, TaskGenerator

OnResult = Callable[[Result], None]
WINDOW = 512  # records under strategy at most: a batch is chosen among their rows


@dataclass(slots=True, eq=False)
class Work:
    """A record on its strategy: its steps, and the requests for what they ask now."""

    record: Record
    prepared: Any = None
    steps: TaskGenerator | None = None
    ask: ModelCall | None = None
    requests: list[Request] = field(default_factory=list)
    result: Result | None = None
    on_result: OnResult | None = None

    def finish(self, result: Result) -> None:
        self.result = result
        if self.on_result:
            self.on_result(result)

    def fail(self, why: Failure) -> None:
        self.finish(Result(self.record, failure=why))

    def go_on(self, outputs: list[Any] | None) -> None:
        """On to the next thing that the steps ask for, or the result."""
        assert self.steps
        try:
            self.ask = self.steps.send(outputs)  # type: ignore[arg-type]  # None begins it
            self.requests = [Request(each) for each in self.ask.inputs]
        except StopIteration as end:
            self.finish(Result(self.record, end.value.output, end.value.text))
        except RecordError as exc:
            self.fail(failure(exc))

    @property
    def has_outputs(self) -> bool:
        """Whether all that was asked for is there."""
        for request in self.requests:  # noqa: SIM110  # hundreds are asked after each batch: all() takes thrice as long
            if not request.is_over:
                return False
        return True

    def with_outputs(self) -> None:
        """On, with what was asked for."""
        if why := next((request.failure for request in self.requests if request.failure), None):
            self.fail(why)
        else:
            assert self.ask
            outputs = [request.output for request in self.requests]
            self.go_on([_stripped(output) for output in outputs] if self.ask.strip else outputs)


class Engine(Protocol):
    """The contract that this package's own page tells."""

    def run(
        self, job: Job, records: Iterable[Record], on_text: OnText | None = None, on_result: OnResult | None = None
    ) -> Iterator[Result]: ...

    def load(self, job: Job) -> None: ...


class TaskEngine(ABC):
    """Where models are, and how they run. What only one job may do at a time it does while it holds `exclusive`."""

    exclusive: AbstractContextManager[Any] = nullcontext()

    @abstractmethod
    def check(self, job: Job) -> None:
        """Raises UsageError where the job's options make no sense, before any model is sought."""

    @abstractmethod
    def model(self, job: Job) -> Any:
        """The job's model as its steps see it, not yet loaded. Its `kind` is the task's strategy that it goes."""

    @abstractmethod
    def runner(self, job: Job, strategy: Strategy, model: Any) -> Runner:
        """Raises ModelUnavailable and UsageError."""

    @abstractmethod
    def other(self) -> "TaskEngine":
        """For what steps ask of another task."""

    def load(self, job: Job) -> None:
        """Have the job's model ready."""
        Turn(self, job).runner  # noqa: B018

    def run(
        self, job: Job, records: Iterable[Record], on_text: OnText | None = None, on_result: OnResult | None = None
    ) -> Generator[Result, None, None]:
        """Results in the order of the records. The model is loaded when the first record needs it.

        Raises ModelUnavailable and UsageError; what is wrong with one record is a failure in its Result.
        """
        # A seed repeats a sampled run only where the batches do not depend on how fast the input comes.
        waits = job.seed is not None and job.generation.get("do_sample") is not False
        turn: Turn | None = None
        works: deque[Work] = deque()
        with ReadAhead(records, WINDOW) as ahead:
            while works or not ahead.ended:
                room = WINDOW - len(works)
                if not (waits and works):
                    new = ahead.take(room, least=room if waits else not works)
                    begun = [_begun(job, record, on_result) for record in new]
                    works += begun
                    if any(work.result is None for work in begun):
                        turn = turn or Turn(self, job)
                        with self.exclusive:
                            turn.add(begun)
                if turn and works and works[0].result is None:
                    with self.exclusive:
                        turn.step(on_text if len(works) == 1 else None)  # nothing may still stand before the pieces
                while works and (result := works[0].result):
                    works.popleft()
                    yield result


class Turn:
    """One job on its model. Raises UsageError where the job's options make no sense, before any model is sought."""

    def __init__(self, engine: TaskEngine, job: Job) -> None:
        engine.check(job)
        self.engine, self.job = engine, job
        self.model = engine.model(job)
        self.works: list[Work] = []

    @lazy
    def strategy(self) -> Strategy:
        return tasks.find(self.job.task).strategies[self.model.kind]

    @lazy
    def runner(self) -> Runner:
        return self.engine.runner(self.job, self.strategy, self.model)

    def add(self, works: Sequence[Work]) -> None:
        """Begin the steps of the records that have no result."""
        for work in works:
            if work.result is None:
                work.steps = self.strategy.run(self.job, work.prepared, self.model)
                work.go_on(None)
                self._asked(work)

    def step(self, on_text: OnText | None) -> None:
        """One batch, and on with the records whose outputs are there."""
        if self.runner.waiting:
            ask, left = self.works[0].ask, len(self.runner.waiting)
            asked = sum(len(work.requests) for work in self.works)
            has_parts = asked > len(self.works)
            with console.working(f"{asked - left} of {asked} parts") if has_parts else nullcontext():
                self.runner.step(_shown(ask, on_text) if ask and left == 1 else None)
        works, self.works = self.works, []
        for work in works:
            if work.has_outputs:
                work.with_outputs()
                self._asked(work)
            else:
                self.works.append(work)

    def _asked(self, work: Work) -> None:
        """What the work's steps ask for waits for a batch, or is done now where it is another task's."""
        while work.result is None and work.ask and work.ask.job:
            self._other(work.ask.job, work.requests)
            work.with_outputs()
        if work.result is None:
            self.runner.add(work.requests)
            self.works.append(work)

    def _other(self, job: Job, requests: Sequence[Request]) -> None:
        """Another task's answers."""
        records = [Record(request.input) for request in requests]
        for request, result in zip(requests, self.engine.other().run(job, records), strict=True):
            request.output, request.failure = result.output, result.failure


def _begun(job: Job, record: Record, on_result: OnResult | None) -> Work:
    """The record as its task reads it; with its result already, where no model is needed for that."""
    task, work = tasks.find(job.task), Work(record, on_result=on_result)
    if record.failure:
        work.fail(record.failure)
    elif record.has_error:
        work.finish(Result(record))
    else:
        try:
            work.prepared = task.prepare(job, record.fields)
        except RecordError as exc:
            work.fail(failure(exc))
        else:
            if work.prepared is None:
                work.finish(Result(record, task.empty))
    return work


def _shown(ask: ModelCall, on_text: OnText | None) -> OnText | None:
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
