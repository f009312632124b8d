"""The engine contract, and the loop of the engines that run tasks: many records in flight, results in input order."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from llmcli.engines.job_run import JobRun, OnResult
from llmcli.engines.read_ahead import ReadAhead
from llmcli.engines.requests import OnText, Runner
from llmcli.job import Job, Record, Result
from llmcli.tasks import Strategy, TaskModel

MAX_IN_FLIGHT = 512  # records among whose rows a batch is chosen


class Engine(Protocol):
    """Turns a job and records into results."""

    def run(
        self, job: Job, records: Iterable[Record], on_text: OnText | None = None, on_result: OnResult | None = None
    ) -> Iterator[Result]:
        """Yield the results in the order of the records, which are read ahead.

        Args:
            job: What to do with each record.
            records: The input; it may be slow.
            on_text: Receives the text of a record that is alone in flight, while it is generated.
            on_result: Receives every Result as soon as it is known, which may be before its turn.

        Raises:
            ModelUnavailableError: The model cannot be found, loaded or reached.
            UsageError: The job's options make no sense for its model.
        """

    def load(self, job: Job) -> None:
        """Load the job's model before there is a record."""


class EngineModel(TaskModel, Protocol):
    """A job's model. `kind` selects the task's strategy."""

    kind: str


class TaskEngine(ABC):
    """Runs each record through its task. Subclasses say where the model is and how it runs.

    Attributes:
        exclusive: Held while the job uses the device.
    """

    exclusive: AbstractContextManager[object] = nullcontext()

    @abstractmethod
    def check(self, job: Job) -> None:
        """Raise UsageError if the job's options make no sense, before any model is looked for."""

    @abstractmethod
    def find_model(self, job: Job) -> EngineModel:
        """Return the job's model, which is not loaded yet. Raise ModelUnavailableError."""

    @abstractmethod
    def make_runner(self, job: Job, strategy: Strategy, model: Any) -> Runner:
        """Load the model and return its runner. Raise ModelUnavailableError or UsageError."""

    @abstractmethod
    def local(self) -> "TaskEngine":
        """Return the engine that runs nested jobs, which tasks ask for."""

    def load(self, job: Job) -> None:
        """Load the job's model."""
        JobRun(self, job).load()

    def run(
        self, job: Job, records: Iterable[Record], on_text: OnText | None = None, on_result: OnResult | None = None
    ) -> Generator[Result, None, None]:
        """Yield the results in the order of the records. The model is loaded when the first record needs it."""
        # A seed repeats a sampled run only if the batches do not depend on how fast the input arrives.
        is_seeded = job.seed is not None and job.generation.get("do_sample") is not False
        run = JobRun(self, job, on_text, on_result)
        with ReadAhead(records, MAX_IN_FLIGHT) as source:
            while run.in_flight or not source.has_ended:
                vacant = MAX_IN_FLIGHT - len(run.in_flight)
                if not run.in_flight:
                    run.admit(source.take(vacant, minimum=vacant if is_seeded else 1))
                elif not is_seeded:
                    run.admit(source.take(vacant, minimum=0))
                yield from run.pop_finished()
                run.step()
                yield from run.pop_finished()
