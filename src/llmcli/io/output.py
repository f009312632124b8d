"""Write results to stdout or a file, as text, JSON Lines or CSV. No other module writes to stdout."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO, cast

from llmcli import config, console
from llmcli.errors import NO_ANSWER, LlmcliError, OutputClosedError, UsageError, reason
from llmcli.io.compression import MemberWriter, find_compressor
from llmcli.io.decoding import BOM, Dialect
from llmcli.io.formats import format_row, read_columns
from llmcli.io.openai_batch import make_response
from llmcli.job import Result
from llmcli.text.terminal import Sanitizer, sanitize

if TYPE_CHECKING:
    from llmcli.io.parquet import TableSource

JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
EXISTS_HINT = "use --resume to continue, or choose another path"
WRAPPED_COLUMNS = ("TASKS", "LICENSE")  # columns of a table that may wrap on a narrow screen


class OutputFormat(Enum):
    """How a result is written."""

    TEXT = "text"
    LINES = "lines"  # exactly one line per record
    NULL = "null"  # terminated by NUL
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"
    OPENAI_BATCH = "openai-batch"  # a response per line


HAVE_FIELDS = (OutputFormat.JSON, OutputFormat.CSV, OutputFormat.PARQUET)  # and more of a result than its text


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """Where and how the results of a run are written, and how failures are handled."""

    format: OutputFormat = OutputFormat.TEXT
    path: Path | None = None  # None: stdout
    finish: Callable[[Result], Sequence[Result]] | None = None  # returns what is written of a result
    is_filter: bool = False  # `finish` may drop results
    fingerprint: str | None = None  # of the input, if the state of the run is kept beside the file at `path`
    resume: bool = False  # continue the file at `path`
    retry: bool = False  # run records again that failed earlier, in the input and in the file at `path`
    stop_on_error: bool = False
    stats: bool = False  # print statistics at the end
    extra_records: int = 0  # records that the command has read itself and passes on in another record
    is_styled: bool = False  # texts have colors of our own, and nothing else that controls a terminal
    has_files: bool = False  # results have the field `file`
    has_records: bool = False  # the input has many records, as lines or rows do
    dialect: Dialect = field(default_factory=Dialect)  # of the input
    rename: Mapping[str, str] = field(default_factory=dict)  # new names of result fields
    select: Sequence[str] | None = None  # result fields to write; None: all
    table: "TableSource | None" = None  # the input, if the output is Parquet: its columns are written too

    def name_fields(self, outputs: Sequence[str]) -> dict[str, str | None]:
        """Return the name of each result field in the output, in order, or None if the field is not written.

        Args:
            outputs: Fields that the task adds.
        """
        known = list(dict.fromkeys([*outputs, "model", "file", "error"]))
        for name in [*self.rename, *(self.select or ())]:
            if name not in known:
                message = f"unknown result field {name!r}{config.did_you_mean(name, known)}"
                raise UsageError(message, hint=f"result fields: {', '.join(known)}")
        is_input = self.retry and not self.resume  # the errors of an earlier output, which are no longer true
        if is_input and "error" in self.rename:
            raise UsageError("--rename error=NEW cannot be used with --retry-errors")
        kept = {*(known if self.select is None else self.select), *["error"] * is_input}
        # A failed record without an error would look as if it had not run. CSV has the same columns in all rows.
        kept = kept | {"error"} if self.format is OutputFormat.JSON else kept - {"file"} if not self.has_files else kept
        names = {name: self.rename.get(name, name) if name in kept else None for name in known}
        written = [name for name in names.values() if name]
        if len(set(written)) < len(written):
            raise UsageError(f"--rename gives several result fields the name {max(written, key=written.count)!r}")
        return names


class Sink(AbstractContextManager["Sink"]):
    """stdout or a file, written as UTF-8; on a terminal sanitized. A new file that an error leaves empty is deleted."""

    def __init__(self, path: Path | None = None, *, append: bool = False, is_styled: bool = False) -> None:
        if not path and sys.stdout is None:
            raise LlmcliError("stdout is closed")
        self._path = path
        self._is_empty = not append
        compress = find_compressor(path) if path else None
        self._sanitizer = Sanitizer() if not path and sys.stdout.isatty() and not is_styled else None
        try:
            self.file: BinaryIO = path.open("ab" if append else "xb") if path else sys.stdout.buffer
        except FileExistsError:
            raise UsageError(f"'{path}' already exists", hint="choose another path") from None
        except OSError as exc:
            raise UsageError(f"{path}: {reason(exc)}") from exc
        if compress:
            self.file = cast(BinaryIO, MemberWriter(self.file, compress))

    def write(self, text: str, end: str = "") -> int:
        """Write the rest of a text and its end at once, and return the number of bytes."""
        rest = self._sanitizer.feed(text) + self._sanitizer.flush() if self._sanitizer else text
        return self._write_text(rest + end)

    def stream(self, text: str) -> None:
        """Write a part of a text at once."""
        self._write_text(self._sanitizer.feed(text) if self._sanitizer else text)

    def _write_text(self, text: str) -> int:
        console.show_thought("")
        return self.write_bytes(text.encode("utf-8", "backslashreplace"))  # JSON can hold lone surrogates.

    def write_bytes(self, data: bytes) -> int:
        """Write data at once, and return its number of bytes."""
        self._is_empty = False
        try:
            self.file.write(data)
            self.file.flush()
        except OSError as exc:
            if not self._path:  # The buffer still holds the data: without this, the flush at exit would fail again.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(exc, BrokenPipeError):
                raise OutputClosedError("stdout was closed by the reader") from None
            raise LlmcliError(f"cannot write to {self._path or 'stdout'}: {exc.strerror}") from exc
        return len(data)

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if not self._path:
            return
        try:
            self.file.close()
        except OSError as exc:
            if isinstance(self.file, MemberWriter) and not kind:  # Otherwise write_bytes has reported it.
                raise LlmcliError(f"cannot write to {self._path}: {exc.strerror}") from exc
        if kind and self._is_empty:
            self._path.unlink(missing_ok=True)


class Output(AbstractContextManager["Output"]):
    """Write results as they arrive. `names` is what `OutputSpec.name_fields` returns."""

    def __init__(
        self, format: OutputFormat, model: str, *, path: Path | None = None,
        names: Mapping[str, str | None] = MappingProxyType({}), append: bool = False, is_styled: bool = False,
        dialect: Dialect | None = None,
    ) -> None:  # fmt: skip
        self.format, self.model, self._names = format, model, names
        self._overwritten: set[str] = set()  # fields of records, in a warning that was printed
        self._sink = Sink(path, append=append, is_styled=is_styled)
        self.file = self._sink.file
        self.is_watched = not path and sys.stdout.isatty()
        self._columns: list[str] = []
        self._dialect = dialect or Dialect()
        self._continued = path if append else None
        self._streamed = 0  # characters of the next result that `stream` has written

    @property
    def streams(self) -> bool:
        """Whether to write parts of a text before its end: a person is watching."""
        return self.is_watched and self.format in (OutputFormat.TEXT, OutputFormat.LINES)

    def stream(self, text: str) -> None:
        """Write the next characters of a text whose Result will follow."""
        self._streamed += len(text)
        self._sink.stream(self._on_one_line(text))

    def write(self, result: Result) -> int:
        """Write a result, or what `stream` has left of it; return the number of bytes without a CSV header."""
        if result.output.get("generated_text") == "" and result.output.get("finish_reason") == "length":
            console.warning(f"{result.record.where}{NO_ANSWER}")
        if self.format is OutputFormat.JSON:
            return self._sink.write(to_json(self._fields(result)) + "\n")
        if self.format is OutputFormat.PARQUET:  # `TableWriter` adds the fields of the record.
            data = to_json(self._added_fields(result)).encode("utf-8", "replace")
            return self._sink.write_bytes(data + b"\n")
        if self.format is OutputFormat.OPENAI_BATCH:
            return self._sink.write(to_json(make_response(result, self.model)) + "\n")
        if self.format is OutputFormat.CSV:
            return self._sink.write(self._format_cells(result.record.fields, self._fields(result)))
        if result.failure and self.format is OutputFormat.TEXT and not self._streamed:
            return 0
        end = "\0" if self.format is OutputFormat.NULL else "\n"
        rest = self._on_one_line(result.text[self._streamed :])
        self._streamed = 0
        return self._sink.write(rest, end)

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if not kind and not self._columns and self.format is OutputFormat.CSV and self._dialect.header:
            self._begin_table(self._dialect.header)
        elif not kind:
            self._sink.write_bytes(b"")  # An empty file is not a compressed one.
        if self._streamed and kind is not OutputClosedError:  # The text was interrupted: end its line.
            self._sink.write("\n")
        self._sink.__exit__(kind, *details)

    def _on_one_line(self, text: str) -> str:
        if self.format is OutputFormat.NULL:
            return text.replace("\0", " ")
        return text.replace("\r\n", " ").replace("\n", " ") if self.format is OutputFormat.LINES else text

    def _fields(self, result: Result) -> dict[str, object]:
        own = result.record.fields
        return dict(own) if result.is_carried_over else {**own, **self._added_fields(result)}

    def _added_fields(self, result: Result) -> dict[str, object]:
        own, fields = result.record.fields, dict[str, object]()
        if result.is_carried_over:
            error = own["error"]
            return {"error": json.loads(error) if isinstance(error, str) else error}
        added = dict(result.output)
        if result.failure:
            added["error"] = result.failure.to_json()
        else:
            added["model"] = self.model
        if result.record.file is not None:
            added.setdefault("file", result.record.file)
        overwritten = {}
        for result_name, value in added.items():
            name = self._names.get(result_name, result_name)
            if name is None or (name == result_name == "file" and name in own):
                continue
            if name in own and name not in self._overwritten and own[name] not in (None, "", value):
                overwritten[name] = result_name
            fields[name] = value
        if overwritten:
            self._overwritten |= overwritten.keys()
            hint = f"to keep both: --rename {next(iter(overwritten.values()))}=NEW"
            console.warning(f"results replace these fields of the records: {', '.join(overwritten)}; {hint}")
        return fields

    def _format_cells(self, own: Iterable[str], fields: Mapping[str, object]) -> str:
        if not self._columns:
            self._begin_table(own)
        if unknown := [name for name in fields if name not in self._columns]:
            hint = "run files with other columns alone, or use --json"
            raise UsageError(f"the first row has no column {unknown[0]!r}", hint)
        cells = [fields.get(column) for column in self._columns]
        texts = [to_json(cell) if isinstance(cell, dict | list | bool) else cell for cell in cells]
        return format_row(texts, self._dialect)

    def _begin_table(self, own: Iterable[str]) -> None:
        """Write the header, or read that of the output which is continued. `own` are the columns of the input."""
        if self._continued and self._continued.stat().st_size:
            self._columns = read_columns(self._continued, self._dialect)
            return
        self._columns = list(dict.fromkeys([*own, *filter(None, self._names.values())]))
        self._sink.write(BOM * self._dialect.has_bom + format_row(self._columns, self._dialect))


def to_json(value: object) -> str:
    """Return the value as one line of JSON."""
    return JSON.encode(value)


def is_terminal() -> bool:
    """Return whether stdout is a terminal."""
    return bool(sys.stdout) and sys.stdout.isatty()


def write_file(path: Path, text: str) -> None:
    """Write a text file; replace it if it exists."""
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as exc:
        raise UsageError(f"{path}: {reason(exc)}") from exc


def print_lines(lines: Iterable[str], *, is_styled: bool = False) -> None:
    """Write lines to stdout. Styled ones have colors of our own, and nothing else that controls a terminal."""
    sink = Sink(is_styled=is_styled)
    for line in lines:
        sink.write(f"{line}\n")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns on a terminal; tab-separated values without the header elsewhere."""
    if not is_terminal():
        print_lines("\t".join(row) for row in rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, no_wrap=name not in WRAPPED_COLUMNS)
    for row in rows:
        table.add_row(*map(sanitize, row))
    Console(markup=False, emoji=False).print(table)
