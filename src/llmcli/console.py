"""stderr: errors, notices, progress. Nothing here ever writes to stdout."""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

quiet = False
verbose = False


def be_quiet(value: bool) -> None:
    """Set by -q: errors only."""
    global quiet
    quiet = value


def be_verbose(value: bool) -> None:
    """Set by -v: tracebacks, and the libraries' own warnings."""
    global verbose
    verbose = value


def is_terminal() -> bool:
    return bool(sys.stderr) and sys.stderr.isatty()


def notice(message: str) -> None:
    """One line that a person may want to know."""
    if not quiet:
        _say(message)


def error(message: str, hint: str | None = None, cause: BaseException | None = None) -> None:
    """One or two lines: what happened, and what to do about it; under -v the traceback too."""
    _say(message)
    if hint:
        _say(hint)
    if verbose and cause:
        traceback.print_exception(cause, file=sys.stderr)


def _say(message: str) -> None:
    # A full disk or a closed terminal behind stderr must not hide the exit code.
    with suppress(OSError):
        print("llmcli: " + message.replace("\n", " "), file=sys.stderr, flush=True)


@contextmanager
def working(message: str) -> Iterator[None]:
    """A spinner while something takes its time, when a person is watching."""
    if quiet or not is_terminal():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message, spinner="dots"):
        yield


@contextmanager
def progress(message: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on a terminal, one line elsewhere; yields a function told how many are done."""
    if quiet or not is_terminal():
        notice(message)
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(message, total=total)
        yield lambda done: bar.update(task, completed=done)
