"""Requests: inputs that a task wants the model to run, and what became of them."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from llmcli.errors import LlmcliError, RecordError
from llmcli.job import Failure, JsonObject
from llmcli.models.devices import device_error, is_out_of_memory
from llmcli.text.constraints import to_grammar

if TYPE_CHECKING:
    from transformers import GenerationConfig

OnText = Callable[[str], None]


@dataclass
class RequestSettings:
    """What a request asks for in place of what its job does."""

    generation: JsonObject = field(default_factory=dict)  # GenerationConfig values over those of the job
    seed: int | None = None
    constraint: JsonObject | None = None  # of the answer

    @cached_property
    def key(self) -> str:
        return repr((self.generation, self.seed, self.constraint))

    def for_copy(self, number: int) -> "RequestSettings":
        """Return the settings of one of several equal requests, each of which has a seed of its own."""
        return self if self.seed is None or not number else replace(self, seed=(self.seed + number) % 2**32)

    @cached_property
    def grammar(self) -> str | None:
        """The constraint as llguidance's grammar: made once for all requests of a job that has one constraint."""
        return to_grammar(self.constraint) if self.constraint else None


@dataclass(slots=True, eq=False)
class Request:
    """One input for the model, then its output or its failure."""

    input: Any
    settings: RequestSettings | None = None
    logprobs: int | None = None  # alternatives to each token, in place of those of the job
    output: Any = None
    failure: Failure | None = None
    row_count: int = 0  # rows of batches that it takes: a long context takes several
    row_outputs: dict[int, dict[str, Any]] = field(default_factory=dict)  # of the rows that have run, by index
    duplicates: list["Request"] = field(default_factory=list)  # with an equal input: they get this one's output

    @property
    def key(self) -> str:
        key = self.input if isinstance(self.input, str) else repr(self.input)
        return f"{self.settings.key}{self.logprobs}{key}" if self.settings else key


@dataclass(slots=True, eq=False)
class Row:
    """A row of a batch: row `index` of its request. If it generates, `max_new_tokens` and `config` are its own."""

    request: Request
    index: int
    inputs: dict[str, Any]
    length: int
    max_new_tokens: int
    config: "GenerationConfig | None"
    constraint: str | None  # as a grammar
    seed: int | None
    logprobs: int | None
    group: tuple[int | None, ...]  # rows of one group may share a batch

    @property
    def total(self) -> int:
        """Tokens of the row with its answer."""
        return self.length + self.max_new_tokens


class Runner(Protocol):
    """Runs requests. `add` them, then `step` until the queue is empty."""

    @property
    def queue(self) -> Collection[object]:
        """What waits or runs."""

    @property
    def window(self) -> int:
        """How much the queue should have."""

    def add(self, requests: Sequence[Request]) -> None: ...

    def step(self, on_text: OnText | None = None) -> list[Request]:
        """Run a part of the queue, and return the requests that have finished since the last call.

        `on_text` receives the text of a single request while it is generated.
        """


@contextmanager
def capture_errors(request: Request) -> Iterator[None]:
    """Record an exception as the failure of a request, unless it concerns the whole job."""
    try:
        yield
    except RecordError as exc:
        request.failure = Failure.from_error(exc)
    except LlmcliError:
        raise
    except Exception as exc:
        if error := device_error(exc):
            raise error from exc
        if is_out_of_memory(exc):
            request.failure = Failure("out_of_memory", "out of memory")
        else:
            reason = str(exc).strip() or "no reason given"
            request.failure = Failure("internal_error", f"{type(exc).__name__}: {reason}")


def strip_stream(on_text: OnText) -> OnText:
    """Return a function that passes pieces of text on, without the white space around the whole."""
    whole, end = "", 0

    def pass_on(piece: str) -> None:
        nonlocal whole, end
        whole = (whole + piece) if whole else piece.lstrip()
        if shown := whole[end:].rstrip():
            end += len(shown)
            on_text(shown)

    return pass_on
