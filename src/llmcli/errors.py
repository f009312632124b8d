"""Exceptions, and the exit status that each one causes."""

from enum import IntEnum

NO_ANSWER = "model did not finish its thoughts, so there is no answer: increase --max-new-tokens"


class ExitStatus(IntEnum):
    """How a call ended. Scripts depend on these numbers."""

    OK = 0
    FAILED = 1  # the single input failed, or --on-error stop
    USAGE = 2  # invalid command line, missing input file
    PARTIAL = 3  # some of many records failed
    UNAVAILABLE = 4  # model unknown, unreachable, gated, damaged or too large
    INTERRUPTED = 130
    TERMINATED = 143

    @classmethod
    def from_counts(cls, failed: int, total: int) -> "ExitStatus":
        """Return the status of a run in which `failed` of `total` records failed."""
        return cls.OK if not failed else cls.FAILED if total == 1 else cls.PARTIAL


class LlmcliError(Exception):
    """An error that the user can act on: what happened and what to do, in one line each."""

    status = ExitStatus.FAILED

    def __init__(self, message: str, hint: str | None = None, status: ExitStatus | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.status = self.status if status is None else status


class UsageError(LlmcliError):
    """The command line, the configuration or an input path is invalid."""

    status = ExitStatus.USAGE


class ModelUnavailableError(LlmcliError):
    """The model cannot be loaded, or cannot run here."""

    status = ExitStatus.UNAVAILABLE


class ModelTooLargeError(ModelUnavailableError):
    """The model does not fit in the memory that is available."""


class DeviceError(LlmcliError):
    """The device has failed. Nothing can run on it in this process any more."""


class RecordError(LlmcliError):
    """One record cannot be run; the others can. `kind` becomes the field `error.type` of the output."""

    def __init__(self, kind: str, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.kind = kind


class OutputClosedError(LlmcliError):
    """The reader of stdout is gone, e.g. `head`. This is not a failure."""

    status = ExitStatus.OK


class TerminatedError(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, it is not an Exception, so that nothing swallows it."""


def first_line(exc: Exception) -> str:
    """Return the first line of the message of an exception, or its type if it has no message."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]


def reason(exc: OSError) -> str:
    """Return the message of the system for the end of a sentence, e.g. `no such file or directory`."""
    return (exc.strerror or str(exc)).lower()
