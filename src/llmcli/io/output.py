"""Results -> stdout or a file, as text, JSON Lines or CSV. The one place that writes to stdout."""

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, Literal

from llmcli.errors import LlmcliError, OutputClosedError, UsageError, reason
from llmcli.job import Result

JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
WRAPPED = ("TASKS", "LICENSE")  # columns of a table that give way on a narrow screen


class OutputFormat(Enum):
    """How a result is written."""

    TEXT = "text"
    LINES = "lines"  # exactly one line a record
    NULL = "null"  # ended by NUL
    JSON = "json"
    CSV = "csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """Where and how a run's results are written, and what becomes of failures."""

    format: OutputFormat = OutputFormat.TEXT
    path: Path | None = None
    finish: Callable[[Result], Result] | None = None  # gives a result its text, or drops it
    filters: bool = False  # whether results may be dropped
    resume: str | None = None  # a fingerprint of the input: go on where the file at `path` ends
    retry: bool = False  # run again what failed before: in the input, and in the file that goes on
    stop_on_error: bool = False
    stats: bool = False


class Sink(AbstractContextManager["Sink"]):
    """stdout, or a new file, as UTF-8 whose line ends are `\n`, whatever the locale says; `append` goes on with a file
    that may be there.

    Raises UsageError when `path` exists otherwise, ReaderGone when nobody reads stdout any more, LlmcliError when the
    disk is full. A file that an error leaves empty is not kept.
    """

    def __init__(self, path: Path | None = None, *, append: bool = False) -> None:
        if not path and sys.stdout is None:
            raise LlmcliError("stdout is closed")
        self._stream: BinaryIO = _create(path, "ab" if append else "xb") if path else sys.stdout.buffer
        self._path = path
        self._is_empty = not append

    @property
    def descriptor(self) -> int:
        return self._stream.fileno()

    @property
    def end(self) -> int:
        """Bytes in the file."""
        return self._stream.tell()

    def put(self, text: str) -> int:
        """Write, at once; how many bytes that is."""
        self._is_empty = False
        data = _utf8(text)
        try:
            self._stream.write(data)
            self._stream.flush()
        except OSError as exc:
            if not self._path:  # what is left in the buffer goes nowhere: the last flush would fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(exc, BrokenPipeError):
                raise OutputClosedError("nobody reads stdout any more") from None
            raise LlmcliError(f"cannot write to {self._path or 'stdout'}: {exc.strerror}") from exc
        return len(data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._path:
            return
        with suppress(OSError):  # put has said what there is to say
            self._stream.close()
        if kind and self._is_empty:
            self._path.unlink(missing_ok=True)


class Output(AbstractContextManager["Output"]):
    """Writes results as they come. `names` are the fields that the task adds, for the header of a CSV.

    Raises what Sink raises; UsageError for a CSV row whose columns are not the first one's.
    """

    def __init__(
        self,
        format: OutputFormat,
        *,
        path: Path | None = None,
        names: Sequence[str] = (),
        model: str,
        append: bool = False,
    ) -> None:
        self.format = format
        self.names = names
        self.model = model
        self._sink = Sink(path, append=append)
        self.is_watched = not path and sys.stdout.isatty()
        self._columns = _header(path) if path and append and format is OutputFormat.CSV else []
        self._written = 0  # characters of the next result's text that are out already

    @property
    def streams(self) -> bool:
        """Whether pieces of a text are of use before its end: a person is watching."""
        return self.is_watched and self.format in (OutputFormat.TEXT, OutputFormat.LINES)

    def piece(self, text: str) -> None:
        """The next characters of the text whose Result will follow."""
        self._written += len(text)
        self._sink.put(self._inline(text))

    @property
    def end(self) -> int:
        """Bytes in the file."""
        return self._sink.end

    def write(self, result: Result) -> int:
        """One result, whole; of a text already begun by `piece`, the rest. How many bytes that is, without the header
        of a CSV that stands before the first."""
        had_columns = bool(self._columns)
        line = self.line(result)
        if self._columns and not had_columns:
            self._sink.put(_row(self._columns))
        self._written = 0
        return self._sink.put(line) if line else 0

    def line(self, result: Result) -> str:
        """What `write` writes for that result, line end included."""
        if result.dropped:
            return ""
        if self.format is OutputFormat.JSON:
            return to_json(self._fields(result)) + "\n"
        if self.format is OutputFormat.CSV:
            return self._cells(self._fields(result))
        if result.failure and self.format is OutputFormat.TEXT and not self._written:
            return ""
        return self._inline(result.text[self._written :]) + ("\0" if self.format is OutputFormat.NULL else "\n")

    def __exit__(self, *exception: Any) -> None:
        if self._written and exception[0] is not OutputClosedError:  # a text that was cut short: end its line
            self._sink.put("\n")
        self._sink.__exit__(*exception)

    def _inline(self, text: str) -> str:
        if self.format is OutputFormat.NULL:
            return text.replace("\0", " ")
        return text.replace("\r\n", " ").replace("\n", " ") if self.format is OutputFormat.LINES else text

    def _fields(self, result: Result) -> dict[str, Any]:
        record = result.record
        if record.has_error:
            return dict(record.fields)
        fields = {**record.fields, **result.output}
        if result.failure:
            fields["error"] = result.failure.to_json()
        else:
            fields["model"] = self.model
        if record.file is not None:
            fields.setdefault("file", record.file)
        return fields

    def _cells(self, fields: Mapping[str, Any]) -> str:
        if not self._columns:
            ours = [*self.names, "model", "file", "error"]
            theirs = [name for name in fields if name not in ours]
            self._columns = [*theirs, *(name for name in ours if name != "file" or name in fields)]
        if other := [name for name in fields if name not in self._columns]:
            raise UsageError(f"the first row had no column {other[0]!r}", hint="run each kind of file alone, or --json")
        return _row([_cell(fields.get(column)) for column in self._columns])


def to_json(value: Any) -> str:
    """One line of JSON."""
    return JSON.encode(value)


def is_terminal() -> bool:
    """Whether a person reads what goes to stdout."""
    return bool(sys.stdout) and sys.stdout.isatty()


def save(path: Path, text: str) -> None:
    """A file that may be there already. Raises UsageError where it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as exc:
        raise UsageError(f"{path}: {reason(exc)}") from exc


def print_lines(lines: Iterable[str]) -> None:
    """What commands about models and the environment have to say."""
    sink = Sink()
    for line in lines:
        sink.put(line + "\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns for people, tab-separated values for a pipe."""
    if not is_terminal():
        print_lines("\t".join(row) for row in rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, no_wrap=name not in WRAPPED)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def share(chance: float | None) -> str:
    """A probability in six columns at most: `0.0123`, `4e-06`; `-` where it is not known."""
    if chance is None:
        return "-"
    return f"{chance:.4f}" if chance >= 0.00005 else f"{chance:.0e}" if chance else "0"


def megabytes(size: int | None) -> str:
    """`269 MB` for so many bytes; `-` where they are not known."""
    return f"{size / 1e6:.0f} MB" if size else "-"


def _header(path: Path) -> list[str]:
    """The columns of a CSV file that was begun."""
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])


def _create(path: Path, mode: Literal["ab", "xb"]) -> BinaryIO:
    try:
        return path.open(mode)
    except FileExistsError:
        raise UsageError(f"{path} exists", hint="go on with it: --resume; or name another file") from None
    except OSError as exc:
        raise UsageError(f"{path}: {reason(exc)}") from exc


def _row(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text).writerow(cells)  # a line end of `\n` alone would leave a cell with `\r` unquoted
    return text.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: Any) -> Any:
    return to_json(value) if isinstance(value, dict | list) else value


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, carried through from somebody's JSON
        return text.encode("utf-8", "backslashreplace")
