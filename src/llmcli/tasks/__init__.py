"""Tasks: what a model is asked for each record, and what becomes of its outputs. Engines decide how models run.

A task is a module of this package that defines TASK, or a plugin. The name of the module is the name of the task.
"""

import importlib
import pkgutil
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmcli.job import Job, JsonObject
from llmcli.tasks import plugins

if TYPE_CHECKING:
    from transformers import Pipeline, PreTrainedConfig, PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]  # a conversation: role and content
Prompt = str | Messages


class TaskModel(Protocol):
    """What a task may ask of a model, whether the model runs here or behind a server.

    Attributes:
        is_chat: Whether prompts are messages, for the model's chat template.
        context_length: Maximum tokens of an input, or of prompt and answer together. None: unlimited or unknown.
    """

    @property
    def is_chat(self) -> bool: ...
    @property
    def context_length(self) -> int | None: ...
    def count_tokens(self, text: str) -> int: ...
    def count_prompt_tokens(self, prompt: Prompt) -> int: ...


class LocalModel(TaskModel, Protocol):
    """A model that runs here. Its fingerprint changes when the weights or their precision change."""

    @property
    def folder(self) -> Path: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase": ...
    @property
    def config(self) -> "PreTrainedConfig": ...
    @property
    def pipeline(self) -> "Pipeline": ...


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One or more inputs that a task wants the model to run.

    Attributes:
        inputs: Inputs for the pipeline of the task's strategy; one output comes back for each. If `job` is given,
            each is the fields of a record for that job.
        job: Another job whose task runs the inputs.
        shown: Text that precedes the answer. If it is not None, a terminal may show the answer while it is generated.
        strip: Whether generated texts lose the white space around them.
        is_final: Whether the output is the record's answer, to which a schema or another constraint applies.
        copies: Number of outputs for each input, one after the other. A seed of the record differs among them.
        logprobs: Number of alternatives to each token in log-probabilities. None: as the job says.
        is_shared: Whether the other job runs once for all records that wait for it.
    """

    inputs: Sequence[object]
    job: Job | None = None
    shown: str | None = None
    strip: bool = False
    is_final: bool = True
    copies: int = 1
    logprobs: int | None = None
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The result of a task for one record: the fields that the task adds, and the text that text mode prints."""

    output: JsonObject
    text: str


TaskGenerator = Generator[ModelCall, list[Any], TaskResult]


def passthrough(job: Job, prepared: Any, model: TaskModel) -> TaskGenerator:
    """Run a task whose result is the output of the pipeline."""
    (output,) = yield ModelCall([prepared])
    return TaskResult(output, "")


def select_parameters(*names: str) -> Callable[[Job, TaskModel], JsonObject]:
    """Return a function for `Strategy.parameters` that returns those of the job's parameters that are not None."""
    return lambda job, _: {name: value for name in names if (value := job.parameters.get(name)) is not None}


@dataclass(frozen=True, slots=True)
class Strategy:
    """How one kind of model head does a task.

    Attributes:
        run: `run(job, prepared, model)` is a generator. It yields a ModelCall, is sent the outputs, and returns a
            TaskResult. It raises RecordError if the record cannot be run, and UsageError if the job cannot be.
        defaults: GenerationConfig values under the model's own configuration. None: the strategy does not generate.
        parameters: `parameters(job, model)` returns the pipeline's parameters or, if the strategy generates,
            GenerationConfig values over the model's own configuration and under the user's options.
        can_think: Whether a chat model thinks as its template says. If not, it does not by default, and must answer.
    """

    run: Callable[[Job, Any, Any], TaskGenerator]  # each strategy declares its own prepared input and kind of model
    defaults: JsonObject | None = None
    parameters: Callable[[Job, Any], JsonObject] = lambda job, model: {}
    can_think: bool = True


@dataclass(frozen=True, slots=True)
class Task:
    """A task: how it reads a record, and how each kind of model does it.

    Attributes:
        prepare: `prepare(job, fields)` reads the fields of a record. It returns None if there is nothing to do: the
            model is skipped and the result is `empty`. It raises RecordError for a missing or invalid field.
        outputs: Names of the fields that the task adds, the main one first.
        empty: The output of a record that needs no model.
        strategies: Strategies by kind of pipeline, the preferred one first.
    """

    prepare: Callable[[Job, JsonObject], Any]
    outputs: tuple[str, ...]
    empty: JsonObject
    strategies: Mapping[str, Strategy]


def load_task(name: str) -> Task:
    """Return a task by its name."""
    try:
        task: Task = importlib.import_module(f"{__name__}.{name}").TASK
    except ModuleNotFoundError as exc:
        if exc.name != f"{__name__}.{name}":
            raise  # A library is missing.
        task = plugins.load_plugin("tasks", name, Task)
    return task


def task_names() -> list[str]:
    """Return the names of all tasks that are built in."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in modules if hasattr(importlib.import_module(f"{__name__}.{name}"), "TASK")]
