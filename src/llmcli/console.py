"""stderr: errors, notices, progress. Nothing here ever writes to stdout."""

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Literal

from llmcli import config

Relay = Callable[[Literal["note", "warning", "working"], str], None]

quiet = False
verbose = False
REFRESH = 5  # times a second
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_parts: list[Callable[[], str]] = []  # what the live line is made of
_live: Any = None  # rich's Live, while the line is on the screen
_relay: ContextVar[Relay | None] = ContextVar("relay", default=None)


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


def is_watched() -> bool:
    """Whether a person is there who wants to see what goes on."""
    return is_terminal() and not quiet and not _relay.get()


def notice(message: str, label: Literal["note", "warning"] = "note") -> None:
    """Print a line that is good to know; -q hides it."""
    if relay := _relay.get():
        relay(label, message)
    elif not quiet:
        _say(label, message)


def warning(message: str) -> None:
    """Print a line about something that may be wrong; -q hides it."""
    notice(message, "warning")


def error(message: str, hint: str | None = None, cause: BaseException | None = None) -> None:
    """Print what happened and what to do about it; under -v, the traceback too."""
    _say("error", message)
    if hint:
        _say("hint", hint)
    if verbose and cause:
        traceback.print_exception(cause, file=sys.stderr)


def _say(label: str, message: str) -> None:
    process = f"process {config.rank()}: " if config.rank() else ""
    say(f"{label}: {process}" + message.replace("\n", " "))


def say(line: str) -> None:
    """The line as it is, above the live one."""
    # A full disk or a closed terminal behind stderr must not hide the exit code.
    with suppress(OSError):
        if _live:
            _live.console.out(line, highlight=False)
        elif sys.stderr:
            print(line, file=sys.stderr, flush=True)


def working(message: str) -> AbstractContextManager[None]:
    """A message while something takes its time."""
    return showing(lambda: message)


@contextmanager
def showing(part: Callable[[], str]) -> Iterator[None]:
    """One live line on a terminal, gone at the end. `part` is asked for its text at every refresh; what is shown within
    stands after it."""
    global _live
    if relay := _relay.get():
        relay("working", part())
        yield
        relay("working", "")
        return
    if not is_watched():
        yield
        return
    _parts.append(part)
    is_outermost = not _live
    if is_outermost:
        _live = _live_line()
        with suppress(OSError):
            _live.start(refresh=True)
    try:
        yield
    finally:
        _parts.remove(part)
        if is_outermost:
            with suppress(OSError):
                _live.stop()
            _live = None


def _live_line() -> Any:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def line() -> Text:
        spinner = SPINNER[int(time.monotonic() * REFRESH) % len(SPINNER)]
        said = ", ".join(filter(None, [part() for part in _parts]))
        return Text(f"{spinner} {said}", no_wrap=True, overflow="ellipsis")

    screen = Console(stderr=True)
    return Live(console=screen, get_renderable=line, refresh_per_second=REFRESH, transient=True, redirect_stdout=False)


@contextmanager
def relayed(relay: Relay) -> Iterator[None]:
    """What this thread has to say goes to another process's stderr: notices, and what is being worked on, which ends
    with an empty text."""
    before = _relay.set(relay)
    try:
        yield
    finally:
        _relay.reset(before)


@contextmanager
def without_live_line() -> Iterator[None]:
    """The terminal is free for others' bars."""
    with suppress(OSError):
        if _live:
            _live.stop()
    try:
        yield
    finally:
        with suppress(OSError):
            if _live:
                _live.start(refresh=True)


@contextmanager
def progress(message: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on a terminal, one line elsewhere; yields a function told how many are done."""
    if not is_watched():
        notice(message)
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(message, total=total)
        yield lambda done: bar.update(task, completed=done)
