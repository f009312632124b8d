"""The three things that travel the whole way of a call: Job, Record, Result."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llmcli.errors import RecordError

JsonObject = Mapping[str, Any]  # the fields of a record or a result, by name


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Where and how a model is loaded."""

    device: str = "auto"  # or cpu, cuda, cuda:1, mps, xpu
    dtype: str = "auto"  # or float32, bfloat16, float16
    quantize: str = "none"  # or int8, int4
    one_stream: bool = False  # texts run one by one: choose what is fastest for a single row
    tensor_parallel: bool = False  # each process of torchrun has a part of each layer
    max_memory: int | None = None  # bytes of main memory for the weights
    offload_folder: str | None = None  # for weights that do not fit in memory
    adapter: str | None = None  # directory that the engine found, to merge into the weights
    offline: bool = False
    allow_pickle: bool = False  # load pickled weights, which can run code
    trust_remote_code: bool = False  # run Python code of the model


@dataclass(frozen=True, slots=True)
class Job:
    """What to do to each record. Plain data, which survives a trip through JSON."""

    task: str  # name of a module of `llmcli.tasks`
    model: str  # registry alias, directory, .gguf file or Hub ID
    generation: JsonObject = field(default_factory=dict)  # GenerationConfig fields that the user gave
    parameters: JsonObject = field(default_factory=dict)  # of the task: prompt, system, fields, full_text, ...
    adapter: str | None = None  # directory or Hub ID, instead of the one that the alias names
    load_options: LoadOptions = LoadOptions()
    batch_size: int | None = None  # rows per batch; None: the engine chooses
    seed: int | None = None
    truncate: bool = False  # cut inputs that are too long
    constraint: JsonObject | None = None  # of answers: a schema, regex, choice or grammar
    schema_field: str | None = None  # of records with a schema of their own
    settings_field: str | None = None  # of records with generation settings of their own
    logprobs: int | None = None  # number of alternatives to each token; None: no log-probabilities
    think: bool | None = None  # before an answer; None: as the task and the chat template say
    template_options: JsonObject = field(default_factory=dict)  # variables of the chat template
    endpoint: tuple[str, ...] = ()  # URLs of servers that run the model instead of this machine
    concurrency: int = 16  # maximum number of requests to each server at a time
    keep_alive: float | None = None  # seconds in a worker; 0: no worker; None: a worker that is already running
    shard: tuple[int, int] | None = None  # (I, N): only the records whose number modulo N is I; None: all

    @classmethod
    def from_json(cls, fields: JsonObject) -> "Job":
        """Return the job from what `dataclasses.asdict` made of it."""
        tuples = {name: tuple(fields[name]) for name in ("endpoint", "shard") if fields.get(name) is not None}
        return cls(**{**fields, **tuples, "load_options": LoadOptions(**fields["load_options"])})


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a record has no result: a machine-readable type and a sentence."""

    type: str
    message: str

    @classmethod
    def from_error(cls, exc: RecordError) -> "Failure":
        """Return the failure of a record, with the hint in the same sentence."""
        return cls(exc.kind, f"{exc.message}: {exc.hint}" if exc.hint else exc.message)

    def to_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Record:
    """One unit of input."""

    fields: JsonObject
    file: str | None = None  # if it was given with -f
    line: int | None = None  # number of its line, row or string in the file, from 1
    failure: Failure | None = None  # why it cannot be read
    input_fraction: float | None = field(default=None, compare=False)  # of all input, read with it; None: unknown
    is_row: bool = False  # of a table, whose rows have the same fields; objects can be JSON

    @property
    def where(self) -> str:
        """The place as grep prints it, `file:line: `; `line 3: ` without a file; empty without either."""
        if self.file is None:
            return f"line {self.line}: " if self.line else ""
        return f"{self.file}:{self.line}: " if self.line else f"{self.file}: "

    @property
    def has_error(self) -> bool:
        """Whether the record carries the error of an earlier run, and not a field `error` of the user's own."""
        error = self.fields.get("error")
        if self.is_row and isinstance(error, str) and error.startswith("{"):
            with suppress(ValueError, RecursionError):
                error = json.loads(error)
        if not isinstance(error, dict) or error.keys() != {"type", "message"}:
            return False
        return all(isinstance(value, str) for value in error.values())

    def drop_error(self) -> "Record":
        """Return the record without the error of an earlier run."""
        if not self.has_error:
            return self
        return replace(self, fields={name: value for name, value in self.fields.items() if name != "error"})


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a record. A record that came with an error has neither an answer nor a failure."""

    record: Record
    output: JsonObject = field(default_factory=dict)  # fields that the task adds
    text: str = ""  # the answer as text mode prints it
    failure: Failure | None = None  # why there is no answer

    @property
    def is_carried_over(self) -> bool:
        """Whether the record came with the error of an earlier run, and was not run."""
        return not self.output and not self.failure and self.record.has_error
