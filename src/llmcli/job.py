"""The three things that travel the whole way of a call: Job, Record, Result."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

JsonObject = Mapping[str, Any]  # the fields of a record or a result, by name


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Where and how a model is loaded.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1", "mps" or "xpu".
        dtype: "auto", "float32", "bfloat16" or "float16".
        quantize: "none", "int8" or "int4", for the weights.
        max_memory: Maximum bytes of main memory for the weights.
        offload_folder: Directory for weights that do not fit in memory.
        offline: Whether pulling the model is refused.
        allow_pickle: Whether pickled weights, which can run code, are loaded.
        trust_remote_code: Whether Python code of the model is run.
    """

    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    max_memory: int | None = None
    offload_folder: str | None = None
    offline: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """What to do to each record. Plain data, which survives a trip through JSON.

    Attributes:
        task: Name of a module of `llmcli.tasks`.
        model: Registry alias, directory, .gguf file or Hub ID.
        generation: GenerationConfig fields that the user gave, under their own names.
        parameters: What the task understands: prompt, system, fields, full_text, ...
        load_options: Where and how the model is loaded.
        batch_size: Rows per batch. None: the engine chooses.
        seed: Random seed for sampling.
        truncate: Whether inputs that are too long are cut.
        endpoint: URL of a server that runs the model instead of this machine.
        concurrency: Maximum number of requests to the server at a time.
        keep_alive: Seconds for which a worker keeps the model loaded. 0: run in this process. None: use a worker that
            is already running.
    """

    task: str
    model: str
    generation: JsonObject = field(default_factory=dict)
    parameters: JsonObject = field(default_factory=dict)
    load_options: LoadOptions = LoadOptions()
    batch_size: int | None = None
    seed: int | None = None
    truncate: bool = False
    endpoint: str | None = None
    concurrency: int = 16
    keep_alive: float | None = None

    @classmethod
    def from_json(cls, fields: JsonObject) -> "Job":
        """Return the job from what `dataclasses.asdict` made of it."""
        return cls(**{**fields, "load_options": LoadOptions(**fields["load_options"])})


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a record has no result: a machine-readable type and a sentence."""

    type: str
    message: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Record:
    """One unit of input.

    Attributes:
        fields: The fields as they came.
        file: The file that it came from, if it was given with -f.
        line: Number of its line, row or string in the file, from 1.
        failure: Why it cannot be read, if it cannot.
        input_fraction: Fraction of all input that has been read with it, if the size of the input is known.
    """

    fields: JsonObject
    file: str | None = None
    line: int | None = None
    failure: Failure | None = None
    input_fraction: float | None = field(default=None, compare=False)

    @property
    def where(self) -> str:
        """The place as grep prints it, `file:line: `; `line 3: ` without a file; empty without either."""
        if self.file is None:
            return f"line {self.line}: " if self.line else ""
        return f"{self.file}:{self.line}: " if self.line else f"{self.file}: "

    @property
    def has_error(self) -> bool:
        """Whether the record carries the error of an earlier run."""
        return bool(self.fields.get("error"))

    def drop_error(self) -> "Record":
        """Return the record without the error of an earlier run."""
        if not self.has_error:
            return self
        return replace(self, fields={name: value for name, value in self.fields.items() if name != "error"})


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a record.

    Attributes:
        record: The record.
        output: Fields that the task adds.
        text: The answer as text mode prints it.
        failure: Why there is no answer. A record that came with an error has neither answer nor failure.
    """

    record: Record
    output: JsonObject = field(default_factory=dict)
    text: str = ""
    failure: Failure | None = None
