"""The three things that travel the whole way of a call: Job, Record, Result."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

JsonObject = Mapping[str, Any]  # the fields of a record or a result, by name


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Where and how the model is loaded."""

    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"  # or int8, int4: the weights
    max_memory: int | None = None  # bytes of main memory the weights may take
    offload_folder: str | None = None
    offline: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done to each record. Plain data: it survives a trip through JSON.

    `generation` holds only the GenerationConfig fields that the user gave, under their own names;
    `parameters` what the task itself understands (prompt, system, fields, full_text).
    """

    task: str
    model: str
    generation: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    load_options: LoadOptions = LoadOptions()
    batch_size: int | None = None  # None: the engine chooses
    seed: int | None = None
    truncate: bool = False
    endpoint: str | None = None  # URL of a server that runs it in the place of this process
    concurrency: int = 16  # requests under way there
    keep_alive: float | None = None  # seconds that a worker keeps the model; 0: it runs in this process

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Job":
        """The job that `dataclasses.asdict` made this of."""
        return cls(**{**fields, "load_options": LoadOptions(**fields["load_options"])})


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a record has no result: a short machine-readable `type`, and a sentence."""

    type: str
    message: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Record:
    """One unit of input: its fields as they came, and where they came from."""

    fields: Mapping[str, Any]
    file: str | None = None
    line: int | None = None
    failure: Failure | None = None
    input_fraction: float | None = field(default=None, compare=False)  # how much of all input has been read with it

    @property
    def where(self) -> str:
        """`file:line: `, as grep says it; `line 3: ` where there is no file; nothing where there is neither."""
        if self.file is None:
            return f"line {self.line}: " if self.line else ""
        return f"{self.file}:{self.line}: " if self.line else f"{self.file}: "

    @property
    def has_error(self) -> bool:
        """Whether it comes with the error of an earlier run."""
        return bool(self.fields.get("error"))

    def drop_error(self) -> "Record":
        """As it was before it failed."""
        if not self.has_error:
            return self
        return replace(self, fields={name: value for name, value in self.fields.items() if name != "error"})


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a record: `output` are the fields that the task adds, `text` is the answer as
    text mode prints it. A failed record has a `failure` instead; one that came with an error of an earlier run,
    neither."""

    record: Record
    output: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    failure: Failure | None = None
