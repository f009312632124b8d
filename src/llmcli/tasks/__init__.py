"""Tasks: what is asked of a model for each record, and what is made of its answers. Not how models run.

A task is a module of this package with a TASK in it; the module's name is the task's.
"""

import importlib
import pkgutil
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmcli.job import Job

Output = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ModelCall:
    """What a record's steps want to be run next: inputs for the model's pipeline or, where a `job` of
    another task is named, fields of records for that. One output comes back for each.

    `shown` is text that stands before the answer; where it is not None, a terminal may see the answer as it comes.
    With `strip`, generated texts lose the white space around them.
    """

    inputs: Sequence[Any]
    job: Job | None = None
    shown: str | None = None
    strip: bool = False


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What the steps end with: the fields of the result, and what text mode prints."""

    output: Output
    text: str


TaskGenerator = Generator[ModelCall, list[Any], TaskResult]


def passthrough(job: Job, prepared: Any, model: Any) -> TaskGenerator:
    """Steps of a task whose result is what the pipeline makes of the record."""
    (output,) = yield ModelCall([prepared])
    return TaskResult(output, "")


def no_parameters(job: Job, model: Any) -> Output:
    return {}


@dataclass(frozen=True, slots=True)
class Strategy:
    """How a task is done by one kind of head.

    `steps(job, prepared, model)` is a generator: it yields what is to be run, gets the outputs, and returns the
    Answer. It may raise RecordError; UsageError where the job makes no sense for this model.
    `settings(job, model)` are the pipeline's parameters, or where it generates, GenerationConfig values that stand
    over the model's own and under the user's. `defaults` stand under both; None: this way does not generate.
    """

    steps: Callable[[Job, Any, Any], TaskGenerator]
    defaults: Output | None = None
    settings: Callable[[Job, Any], Output] = no_parameters


@dataclass(frozen=True, slots=True)
class Task:
    """`prepare(job, fields)` reads a record's fields, or returns None where there is nothing to do
    (RecordError: a field is missing or of the wrong type); `empty` is the output then. `outputs` are the fields
    that the task adds, its main one first. `ways` are found by a pipeline's kind, the best first."""

    prepare: Callable[[Job, Mapping[str, Any]], Any]
    outputs: tuple[str, ...]
    empty: Output
    strategies: Mapping[str, Strategy]


def find(name: str) -> Task:
    """The task of that name."""
    task: Task = importlib.import_module(f"{__name__}.{name}").TASK
    return task


def names() -> list[str]:
    """All tasks there are."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in modules if hasattr(importlib.import_module(f"{__name__}.{name}"), "TASK")]
