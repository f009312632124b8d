"""A job on its way: the records in flight, and the model calls that their tasks make."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmcli import console, tasks
from llmcli.engines.requests import OnText, Request, Runner, failure_from
from llmcli.engines.streaming import open_stream, strip_output
from llmcli.errors import RecordError
from llmcli.job import Failure, Job, Record, Result
from llmcli.tasks import ModelCall, TaskGenerator

if TYPE_CHECKING:
    from llmcli.engines.engine import EngineModel, TaskEngine

OnResult = Callable[[Result], None]


@dataclass(slots=True, eq=False)
class PendingRecord:
    """A record in flight: its task, the model call that the task waits for, and finally the result."""

    record: Record
    task: TaskGenerator | None = None
    call: ModelCall | None = None
    requests: list[Request] = field(default_factory=list)
    result: Result | None = None

    def resume(self, outputs: list[Any] | None) -> None:
        """Run the task up to its next model call or its result. `outputs` are those of the last call."""
        assert self.task
        try:
            self.call = self.task.send(outputs)  # type: ignore[arg-type]  # None starts a generator
            self.requests = [Request(item) for item in self.call.inputs]
        except StopIteration as stop:
            self.result = Result(self.record, stop.value.output, stop.value.text)
        except RecordError as exc:
            self.fail(failure_from(exc))

    def fail(self, failure: Failure) -> None:
        self.result = Result(self.record, failure=failure)

    @property
    def has_outputs(self) -> bool:
        """Whether all requests of the call are finished."""
        for request in self.requests:  # noqa: SIM110  # asked for hundreds of records after each batch: all() is slower
            if not request.is_finished:
                return False
        return True

    def deliver(self) -> None:
        """Resume the task with the outputs of its call; the first failure of a request is the record's."""
        assert self.call
        if failure := next((request.failure for request in self.requests if request.failure), None):
            self.fail(failure)
        else:
            outputs = [request.output for request in self.requests]
            self.resume([strip_output(output) for output in outputs] if self.call.strip else outputs)


class JobRun:
    """One run of a job: `admit` records, `step` through batches, and `pop_finished` results in input order.

    Raises UsageError if the job's options make no sense, and ModelUnavailableError; a failed record is a Result.
    """

    def __init__(
        self, engine: "TaskEngine", job: Job, on_text: OnText | None = None, on_result: OnResult | None = None
    ) -> None:
        self.in_flight: deque[PendingRecord] = deque()  # in input order
        self._engine, self._job, self._task = engine, job, tasks.load_task(job.task)
        self._on_text, self._on_result = on_text, on_result
        self._model: EngineModel | None = None
        self._runner: Runner | None = None
        self._waiting: list[PendingRecord] = []  # for outputs of their model calls

    def admit(self, records: Sequence[Record]) -> None:
        """Take records in, and start the tasks of those that need the model."""
        prepared = [self._prepare(record) for record in records]
        unfinished = [item for item in prepared if item is not None]
        if unfinished:
            with self._engine.exclusive:
                strategy = self._task.strategies[self.find_model().kind]
                for pending, inputs in unfinished:
                    pending.task = strategy.run(self._job, inputs, self._model)
                    pending.resume(None)
                    self._dispatch(pending)

    def step(self) -> None:
        """Run one batch, and resume the tasks whose outputs are complete."""
        if not self._waiting:
            return
        with self._engine.exclusive:
            if self._runner and self._runner.queue:
                self._run_batch(self._runner)
            waiting, self._waiting = self._waiting, []
            for pending in waiting:
                if pending.has_outputs:
                    pending.deliver()
                    self._dispatch(pending)
                else:
                    self._waiting.append(pending)

    def pop_finished(self) -> Iterator[Result]:
        """Yield the results that no unfinished record precedes."""
        while self.in_flight and (result := self.in_flight[0].result):
            self.in_flight.popleft()
            yield result

    def find_model(self) -> "EngineModel":
        """Return the job's model, which is found before it is loaded."""
        if self._model is None:
            self._engine.check(self._job)
            self._model = self._engine.find_model(self._job)
        return self._model

    def load(self) -> Runner:
        """Return the runner of the job's model, which is loaded at the first call."""
        if self._runner is None:
            model = self.find_model()
            self._runner = self._engine.make_runner(self._job, self._task.strategies[model.kind], model)
        return self._runner

    def _prepare(self, record: Record) -> tuple[PendingRecord, Any] | None:
        """Read a record as its task does. Return None if its result is known without the model."""
        pending = PendingRecord(record)
        self.in_flight.append(pending)
        inputs = None
        if record.failure:
            pending.fail(record.failure)
        elif record.has_error:
            pending.result = Result(record)
        else:
            try:
                inputs = self._task.prepare(self._job, record.fields)
            except RecordError as exc:
                pending.fail(failure_from(exc))
            else:
                if inputs is not None:
                    return pending, inputs
                pending.result = Result(record, self._task.empty)
        self._report(pending)
        return None

    def _dispatch(self, pending: PendingRecord) -> None:
        """Queue the requests of a task's call, run them now if they are another job's, or report the result."""
        while pending.result is None and pending.call and pending.call.job:
            self._run_nested(pending.call.job, pending.requests)
            pending.deliver()
        if pending.result is None:
            self.load().add(pending.requests)
            self._waiting.append(pending)
        else:
            self._report(pending)

    def _run_nested(self, job: Job, requests: Sequence[Request]) -> None:
        records = [Record(request.input) for request in requests]
        for request, result in zip(requests, self._engine.local().run(job, records), strict=True):
            request.output, request.failure = result.output, result.failure

    def _run_batch(self, runner: Runner) -> None:
        requests = [request for pending in self._waiting for request in pending.requests]
        has_parts = len(requests) > len(self._waiting)
        finished = sum(request.is_finished for request in requests) if has_parts else 0
        on_text = None
        # Pieces may be shown only if nothing precedes them: no other record, and no other request.
        if self._on_text and len(self.in_flight) == 1 and len(runner.queue) == 1 and self._waiting[0].call:
            on_text = open_stream(self._waiting[0].call, self._on_text)
        with console.working(f"{finished} of {len(requests)} parts") if has_parts else nullcontext():
            runner.step(on_text)

    def _report(self, pending: PendingRecord) -> None:
        if self._on_result:
            assert pending.result
            self._on_result(pending.result)
