"""Write errors, notes and progress to stderr. Nothing here writes to stdout."""

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal, TextIO, cast

from llmcli import config
from llmcli.text.terminal import SanitizedStream, sanitize

if TYPE_CHECKING:
    from rich.live import Live

Relay = Callable[[Literal["note", "warning", "working", "thought"], str], None]

quiet = False
verbose = False
REFRESH = 5  # times per second
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_statuses: list[Callable[[], str]] = []  # parts of the live line, the outermost first
_live: "Live | None" = None  # while the line is on the screen
_terminal: TextIO | None = None  # while sys.stderr is sanitized
_has_thought = False  # at the end of the screen
_relay: ContextVar[Relay | None] = ContextVar("relay", default=None)


def set_quiet(value: bool) -> None:
    global quiet
    quiet = value


def set_verbose(value: bool) -> None:
    global verbose
    verbose = value


def is_terminal() -> bool:
    """Return whether stderr is a terminal."""
    return bool(sys.stderr) and sys.stderr.isatty()


@contextmanager
def sanitized() -> Iterator[None]:
    """Sanitize what anything writes to sys.stderr, if it is a terminal."""
    global _terminal
    if not is_terminal():
        yield
        return
    _terminal = sys.stderr
    sys.stderr = cast(TextIO, SanitizedStream(_terminal))
    try:
        yield
    finally:
        sys.stderr, _terminal = _terminal, None


def terminal() -> TextIO:
    """Return stderr for escape sequences of our own."""
    return _terminal or sys.stderr


def is_watched() -> bool:
    """Return whether a person wants to see progress."""
    return is_terminal() and not quiet and not _relay.get()


def notice(message: str, label: Literal["note", "warning"] = "note") -> None:
    """Print something that is useful to know; -q hides it."""
    if relay := _relay.get():
        relay(label, message)
    elif not quiet:
        _print_labeled(label, message)


def warning(message: str) -> None:
    """Print something that may be wrong; -q hides it."""
    notice(message, "warning")


def error(message: str, hint: str | None = None, cause: BaseException | None = None) -> None:
    """Print what happened and what to do; with -v, the traceback too."""
    _print_labeled("error", message)
    if hint:
        _print_labeled("hint", hint)
    if verbose and cause:
        traceback.print_exception(cause, file=sys.stderr)


def _print_labeled(label: str, message: str) -> None:
    process = f"process {config.rank()}: " if config.rank() else ""
    print_line(f"{label}: {process}" + message.replace("\n", " "))


def print_line(line: str) -> None:
    """Print a line to stderr, above the live line."""
    with suppress(OSError):  # A full disk or a closed terminal must not hide the exit status.
        if _has_thought:
            show_thought("")
        if _live:
            _live.console.out(sanitize(line), highlight=False)
        elif sys.stderr:
            print(line, file=sys.stderr, flush=True)


def show_thought(text: str) -> None:
    """Show the next part of what a model thinks, dimmed, if a person watches. Without text, end the line."""
    global _has_thought
    if relay := _relay.get():
        relay("thought", text)
    elif _has_thought or (text and is_watched()):
        _has_thought = bool(text)
        with suppress(OSError):
            print(f"\x1b[2m{sanitize(text)}\x1b[0m" if text else "\n", end="", file=terminal(), flush=True)


def working(message: str) -> AbstractContextManager[None]:
    return live_status(lambda: message)


@contextmanager
def live_status(status: Callable[[], str]) -> Iterator[None]:
    """Show `status()` on a line that disappears at the end. An inner status follows the outer one on the line."""
    global _live
    if relay := _relay.get():
        relay("working", status())
        yield
        relay("working", "")
        return
    if not is_watched():
        yield
        return
    _statuses.append(status)
    is_outermost = not _live
    with suppress(OSError):
        if is_outermost:
            _live = _live_line()
            _start(_live)
    try:
        yield
    finally:
        _statuses.remove(status)
        with suppress(OSError):
            if is_outermost and _live:
                live, _live = _live, None
                live.stop()


def _live_line() -> "Live":
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def line() -> Text:
        spinner = SPINNER[int(time.monotonic() * REFRESH) % len(SPINNER)]
        text = ", ".join(filter(None, [status() for status in _statuses]))
        return Text(f"{spinner} {sanitize(text)}", no_wrap=True, overflow="ellipsis")

    screen = Console(file=terminal())
    return Live(console=screen, get_renderable=line, refresh_per_second=REFRESH, transient=True, redirect_stdout=False)


def _start(live: "Live") -> None:
    live.start(refresh=True)
    if _terminal:  # rich has put a stream in place of sys.stderr that obeys escape sequences, until the line stops.
        sys.stderr = cast(TextIO, SanitizedStream(sys.stderr))


@contextmanager
def relayed(relay: Relay) -> Iterator[None]:
    """Send the notes and statuses of this thread to another process; an empty status ends the last one."""
    token = _relay.set(relay)
    try:
        yield
    finally:
        _relay.reset(token)


@contextmanager
def without_live_line() -> Iterator[None]:
    """Hide the live line, so that a library can show its own progress."""
    with suppress(OSError):
        if _live:
            _live.stop()
    SanitizedStream.shows_progress = True
    try:
        yield
    finally:
        SanitizedStream.shows_progress = False
        with suppress(OSError):
            if _live:
                _start(_live)


@contextmanager
def progress(message: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar for bytes on a terminal, and a note elsewhere; yield a function that sets the bytes done."""
    if not is_watched():
        notice(message)
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(file=terminal()), transient=True, redirect_stderr=False) as bar:
        task = bar.add_task(sanitize(message), total=total)
        yield lambda done: bar.update(task, completed=done)
