"""What can go wrong, and the exit status that each brings."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """How a call ended; scripts depend on these numbers."""

    OK = 0
    FAILED = 1  # the single input failed, or --on-error stop
    USAGE = 2  # wrong command line, missing input file
    PARTIAL = 3  # some of many records failed
    UNAVAILABLE = 4  # model unknown, unreachable, gated, damaged, too big
    INTERRUPTED = 130
    TERMINATED = 143

    @classmethod
    def of(cls, failed: int, total: int) -> "ExitStatus":
        """Of a run of which so many of the records failed."""
        if not failed:
            return cls.OK
        return cls.FAILED if total == 1 else cls.PARTIAL


class LlmcliError(Exception):
    """An error a person can act on: one line of what happened, one of what to do."""

    status = ExitStatus.FAILED

    def __init__(self, message: str, hint: str | None = None, status: ExitStatus | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.status = self.status if status is None else status


class UsageError(LlmcliError):
    """The command line, the configuration or an input path is wrong."""

    status = ExitStatus.USAGE


class ModelUnavailableError(LlmcliError):
    """The model cannot be had, or cannot be run here."""

    status = ExitStatus.UNAVAILABLE


class ModelTooLargeError(ModelUnavailableError):
    """The model does not fit in the memory there is now."""


class RecordError(LlmcliError):
    """One record cannot be run; the others can. `kind` is the `type` in the JSON output."""

    def __init__(self, kind: str, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.kind = kind


class OutputClosedError(LlmcliError):
    """Whoever read our standard output has stopped, as `head` does. Not a failure."""

    status = ExitStatus.OK


def reason(exc: OSError) -> str:
    """`no such file or directory`: what the system says, for the end of a sentence."""
    return (exc.strerror or str(exc)).lower()


class TerminatedError(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, not an Exception: nothing may swallow it."""
