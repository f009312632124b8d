"""What steps ask to be run, and what becomes of it."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmcli.errors import LlmcliError, RecordError
from llmcli.job import Failure

OnText = Callable[[str], None]


@dataclass(slots=True, eq=False)
class Request:
    """One input on its way. It may take several rows of a batch, as a long context does; equal ones `follow` it."""

    input: Any
    output: Any = None
    failure: Failure | None = None
    rows: int = 0
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    followers: list["Request"] = field(default_factory=list)

    @property
    def key(self) -> str:
        """The same for equal inputs."""
        return self.input if isinstance(self.input, str) else repr(self.input)

    @property
    def is_over(self) -> bool:
        return self.output is not None or self.failure is not None


class Runner(Protocol):
    """Runs requests: `add` them, then `step` until none is `waiting`. Each gets its output or its failure."""

    @property
    def waiting(self) -> Collection[Any]: ...

    def add(self, requests: Sequence[Request]) -> None: ...

    def step(self, on_text: OnText | None = None) -> None:
        """Some of them. `on_text` gets the text of a single one as it comes."""


class capture_errors:  # reads as what it does
    """Whatever goes wrong in here is this request's failure; but not what is wrong with the job."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> bool:
        if isinstance(exc, RecordError):
            self._request.failure = failure(exc)
        elif exc is None or isinstance(exc, LlmcliError) or not isinstance(exc, Exception):
            return False
        elif is_out_of_memory(exc):
            self._request.failure = Failure("out_of_memory", "the model has not memory enough for it")
        else:
            why = str(exc).strip() or "no reason given"
            self._request.failure = Failure("internal_error", f"{type(exc).__name__}: {why}")
        return True


def failure(exc: RecordError) -> Failure:
    """In one sentence."""
    return Failure(exc.kind, f"{exc.message}: {exc.hint}" if exc.hint else exc.message)


def is_out_of_memory(exc: Exception) -> bool:
    """torch's OutOfMemoryError of a GPU, Python's own, and what torch says on a CPU."""
    said = str(exc)
    return (
        isinstance(exc, MemoryError)
        or type(exc).__name__ == "OutOfMemoryError"
        or "not enough memory" in said
        or "can't allocate memory" in said
    )
