"""The loop of the engines that run tasks: admit records, run a batch, advance tasks, emit results in input order."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Protocol

from llmcli import console, tasks
from llmcli.engines.read_ahead import ReadAhead
from llmcli.engines.record_settings import read_settings
from llmcli.engines.requests import OnText, Request, RequestSettings, Runner, strip_stream
from llmcli.errors import RecordError, UsageError
from llmcli.job import Failure, Job, Record, Result
from llmcli.models import generation
from llmcli.tasks import ModelCall, Strategy, TaskGenerator, TaskModel, TaskResult
from llmcli.tasks.fields import reads_error
from llmcli.text.constraints import parse_json, to_compact_json

MIN_WINDOW = 512  # unfinished records among whose rows a batch is chosen
MAX_CHARACTERS = 2**25  # of the records in flight, and of those that wait: large files are not all in memory
CHARACTERS_PER_RECORD = 2**10  # beside those of its fields

OnResult = Callable[[Result], None]


class Engine(Protocol):
    """Turns a job and records into results."""

    def run(
        self, job: Job, records: Iterable[Record], on_text: OnText | None = None, on_result: OnResult | None = None
    ) -> Iterator[Result]:
        """Yield the results in the order of the records. Raises ModelUnavailableError and UsageError.

        `on_text` receives the text of a record that is alone in flight, while it is generated. `on_result` receives
        every Result as soon as it is known, which may be before its turn.
        """

    def load(self, job: Job) -> None:
        """Load the job's model before there is a record."""


class EngineModel(TaskModel, Protocol):
    kind: str  # selects the task's strategy


class TaskEngine(ABC):
    """Runs each record through its task. Subclasses say where the model is and how it runs."""

    exclusive: AbstractContextManager[object] = nullcontext()  # held while the job uses the device

    @abstractmethod
    def find_model(self, job: Job) -> EngineModel:
        """Check the job's options, and return its model, which is not loaded yet."""

    @abstractmethod
    def make_runner(self, job: Job, strategy: Strategy, model: Any) -> Runner:
        """Load the model and return its runner."""

    def local(self) -> "TaskEngine":
        """Return the engine that runs nested jobs, which tasks ask for."""
        return self

    def load(self, job: Job) -> None:
        JobRun(self, job, None, None).load()

    def run(
        self, job: Job, records: Iterable[Record], on_text: OnText | None = None, on_result: OnResult | None = None
    ) -> Generator[Result, None, None]:
        """Yield the results in the order of the records. The model is loaded when the first record needs it."""
        # A seed repeats a sampled run only if the batches do not depend on how fast the input arrives.
        is_seeded = job.seed is not None and bool(job.settings_field or job.generation.get("do_sample") is not False)
        is_seeded |= job.load_options.tensor_parallel  # All processes run the same batches.
        run = JobRun(self, job, on_text, on_result)
        with ReadAhead(map(PendingRecord, records), MIN_WINDOW, attrgetter("size"), MAX_CHARACTERS) as source:
            while run.in_flight or not source.has_ended:
                has_begun = bool(run.in_flight)
                source.ahead = window = run.window
                vacant, minimum = window - run.unfinished, 0 if has_begun else 1
                if is_seeded:
                    minimum = vacant = vacant if 2 * vacant >= window else 0
                run.admit(source.take(vacant, minimum=minimum, max_size=MAX_CHARACTERS - run.size))
                yield from run.pop_finished()
                if has_begun:  # else, more have arrived while the model was loaded
                    run.step()
                    yield from run.pop_finished()


@dataclass(slots=True, eq=False)
class PendingRecord:
    """A record in flight: its task as a generator, the model call that the task waits for, and finally the result."""

    record: Record
    settings: RequestSettings | None = None  # other than those of the job
    generator: TaskGenerator | None = None  # the task on its way
    call: ModelCall | None = None
    requests: list[Request] = field(default_factory=list)
    unfinished: int = 0  # of the requests
    result: Result | None = None
    size: int = field(init=False)  # in characters

    def __post_init__(self) -> None:
        fields = self.record.fields
        self.size = CHARACTERS_PER_RECORD + getattr(fields, "size", 0)
        for value in fields.values() if isinstance(fields, dict) else ():  # else, reading them would convert them
            self.size += len(value if isinstance(value, str) else str(value))

    def resume(self, outputs: list[Any] | None) -> None:
        """Run the task up to its next model call or its result. `outputs` are those of the last call."""
        assert self.generator
        try:
            try:
                self.call = self.generator.send(outputs)  # type: ignore[arg-type]  # None starts a generator
            except StopIteration as stop:
                self.result = self._make_result(stop.value)
                return
            settings = self.settings
            if settings and not self.call.is_final:
                settings = replace(settings, constraint=None)
            copies = [settings and settings.for_copy(number) for number in range(self.call.copies)]
            self.requests = [Request(item, own, self.call.logprobs) for item in self.call.inputs for own in copies]
            self.unfinished = len(self.requests)
        except RecordError as exc:
            self.fail(exc)

    def _make_result(self, result: TaskResult) -> Result:
        """Return the result of the task; if a schema applies to its answers, their values too, which are its text."""
        output, text, constraint = result.output, result.text, self.settings and self.settings.constraint
        if constraint and not (self.call and self.call.is_final):
            message = f"text is too long for an answer in one call, which {next(iter(constraint))} requires"
            raise RecordError("context_length_exceeded", message, hint="shorten it or pass --truncate")
        if constraint and "schema" in constraint:
            name = next(iter(output))  # of the answer
            try:
                values = [parse_json(answer) for answer in output.get(f"{name}s", [output[name]]) if answer is not None]
            except ValueError as exc:
                raise RecordError("invalid_answer", f"answer is not JSON: {exc}") from None
            output, text = {**output, "data": next(iter(values), None)}, "\n".join(map(to_compact_json, values))
        return Result(self.record, output, text)

    def fail(self, exc: RecordError) -> None:
        """Set the failure as the result. Raises UsageError for a column that no row has."""
        if self.record.is_row and exc.kind == "missing_field":
            raise UsageError(f"{exc.message} in all records", exc.hint)
        self.result = Result(self.record, failure=Failure.from_error(exc))

    def deliver(self) -> None:
        """Resume the task with the outputs of its call; the first failure of a request is the record's."""
        assert self.call
        if failure := next((request.failure for request in self.requests if request.failure), None):
            self.result = Result(self.record, failure=failure)
            return
        outputs = [request.output for request in self.requests]
        if self.call.strip:
            for i, output in enumerate(outputs):
                texts = {"generated_text": output["generated_text"].strip()}
                if several := output.get("generated_texts"):
                    texts["generated_texts"] = [text.strip() for text in several]
                outputs[i] = {**output, **texts}
        self.resume(outputs)


class JobRun:
    """One run of a job: `admit` records, `step` through batches, and `pop_finished` results in input order."""

    def __init__(self, engine: TaskEngine, job: Job, on_text: OnText | None, on_result: OnResult | None) -> None:
        self.in_flight: deque[PendingRecord] = deque()  # in input order
        self.size = self.unfinished = 0  # of the records in flight: characters, and how many have no result
        self._engine, self._job, self._task = engine, job, tasks.load_task(job.task)
        self._on_text, self._on_result = on_text, on_result
        self._reads_error = reads_error(job.parameters)  # a field of the input, then
        self._settings = RequestSettings(constraint=job.constraint) if job.constraint else None
        self._model: EngineModel | None = None
        self._runner: Runner | None = None
        self._unstarted: deque[tuple[PendingRecord, Any]] = deque()  # with what their tasks read from them
        self._waiting: dict[Request, PendingRecord] = {}  # for outputs of these requests
        self._shared: dict[Request, PendingRecord] = {}  # which another job will run
        self._parts = 0  # requests of records that have several

    @property
    def window(self) -> int:
        """How many unfinished records should be in flight."""
        return max(MIN_WINDOW, self._runner.window if self._runner else 0)

    def admit(self, admitted: Sequence[PendingRecord]) -> None:
        """Take records in, and start the tasks of those that need the model, as far as there is room."""
        self.in_flight += admitted
        self.unfinished += len(admitted)
        self.size += sum(pending.size for pending in admitted)
        prepared = [(pending, self._prepare(pending)) for pending in admitted]
        self._unstarted += [(pending, inputs) for pending, inputs in prepared if not pending.result]
        if self._unstarted:
            with self._engine.exclusive:
                self._start_tasks()

    def _start_tasks(self) -> None:
        """Start tasks in input order while the queue is short: each may have many requests."""
        while self._unstarted and len(self._shared) < MIN_WINDOW:
            if self._waiting and len(self.load().queue) >= self.window:
                break
            pending, inputs = self._unstarted.popleft()
            job, strategy = self._job, self._task.strategies[self.find_model().kind]
            if own := pending.settings:
                given = generation.override(job.generation, own.generation)
                job = replace(job, generation=given, constraint=own.constraint)
            pending.generator = strategy.run(job, inputs, self._model)
            pending.resume(None)
            self._dispatch(pending)
        while self._shared:
            group, self._shared = [*dict.fromkeys(self._shared.values())], {}
            self._run_nested(group)
            for pending in group:
                self._dispatch(pending)

    def step(self) -> None:
        """Run one step of the model, and resume the tasks whose outputs are complete."""
        if not self._waiting:
            return
        with self._engine.exclusive:
            for request in self._run_model(self.load()):
                pending = self._waiting.pop(request)
                pending.unfinished -= 1
                if not pending.unfinished:
                    self._parts -= len(pending.requests) if len(pending.requests) > 1 else 0
                    pending.deliver()
                    self._dispatch(pending)
            self._start_tasks()

    def pop_finished(self) -> Iterator[Result]:
        """Yield the results that no unfinished record precedes."""
        while self.in_flight and (result := self.in_flight[0].result):
            self.size -= self.in_flight.popleft().size
            yield result

    def find_model(self) -> EngineModel:
        if self._model is None:
            self._model = self._engine.find_model(self._job)
            fields = {"schema-field": self._job.schema_field, "settings-field": self._job.settings_field}
            options = [*(self._job.constraint or {}), *(name for name, field in fields.items() if field)]
            if options and self._model.kind not in ("causal", "embedding"):
                message = f"--{options[0]} cannot be used with {self._job.model}, which is not a causal language model"
                raise UsageError(message, hint="choose another model: -m NAME")
        return self._model

    def load(self) -> Runner:
        """Return the runner of the job's model, which is loaded at the first call."""
        if self._runner is None:
            model = self.find_model()
            self._runner = self._engine.make_runner(self._job, self._task.strategies[model.kind], model)
        return self._runner

    def _prepare(self, pending: PendingRecord) -> Any:
        """Return what the task reads from the record, or set the result if it is known without the model."""
        record = pending.record
        try:
            if record.failure or (record.has_error and not self._reads_error):
                pending.result = Result(record, failure=record.failure)
            elif (inputs := self._task.prepare(self._job, record.fields)) is not None:
                is_own = self._job.schema_field or self._job.settings_field
                pending.settings = read_settings(self._job, record) if is_own else self._settings
                return inputs
            else:
                pending.result = Result(record, self._task.empty)
        except RecordError as exc:
            pending.fail(exc)
        self._report(pending)
        return None

    def _dispatch(self, pending: PendingRecord) -> None:
        """Queue the requests of a task's call, run them now if they are another job's, or report the result."""
        while pending.result is None and (call := pending.call) and (call.job or not pending.requests):
            if call.is_shared and pending.requests:
                self._shared.update(dict.fromkeys(pending.requests, pending))
                return
            self._run_nested([pending])
        if pending.result is None:
            self._waiting.update(dict.fromkeys(pending.requests, pending))
            self._parts += len(pending.requests) if len(pending.requests) > 1 else 0
            self.load().add(pending.requests)
        else:
            self._report(pending)

    def _run_nested(self, group: Sequence[PendingRecord]) -> None:
        """Run the calls of records that ask for equal jobs, and resume their tasks."""
        requests = [request for pending in group for request in pending.requests]
        records, call = [Record(request.input) for request in requests], group[0].call
        nested = self._engine.local().run(call.job, records) if call and call.job else ()
        for request, result in zip(requests, nested, strict=True):
            request.output, request.failure = result.output, result.failure
        for pending in group:
            pending.deliver()

    def _run_model(self, runner: Runner) -> Sequence[Request]:
        """Return the requests that have finished; if a record has several, wait for one."""
        first = next(iter(self._waiting.values()))
        on_text, call, own = None, first.call, first.settings
        # Pieces may be shown only if nothing precedes them: no other record, and no other request.
        is_json = own and own.constraint and "schema" in own.constraint  # A result has it in another notation.
        is_alone = len(self.in_flight) == len(runner.queue) == 1
        if self._on_text and is_alone and call and call.shown is not None and not is_json:
            if call.shown:
                self._on_text(call.shown)
            on_text = strip_stream(self._on_text) if call.strip else self._on_text
            first.call = replace(call, shown=None)  # a server may take several steps
        if not self._parts:
            return runner.step(on_text)
        finished: Sequence[Request] = ()
        with console.working(f"{self._parts - len(self._waiting)} of {self._parts} parts"):
            while not finished:
                finished = runner.step(on_text)
        return finished

    def _report(self, pending: PendingRecord) -> None:
        self.unfinished -= 1
        if self._on_result and pending.result:
            self._on_result(pending.result)
