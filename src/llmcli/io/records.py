"""Open arguments, files and stdin, and read them into Records. No other module reads input."""

import io
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

from llmcli import config, console
from llmcli.errors import RecordError, UsageError, reason
from llmcli.io.compression import find_codec
from llmcli.io.decoding import Dialect, Stream, open_text, printable
from llmcli.io.formats import READERS, InputFormat, read_csv
from llmcli.job import Failure, JsonObject, Record


class Input(NamedTuple):
    """A text, a file or stdin, which is opened when its turn comes: a process may open few files at a time."""

    name: str | None  # of a file
    open: Callable[[], Stream]
    size: int | None = None  # bytes of a regular file
    is_argument: bool = False


def open_inputs(texts: Sequence[str], files: Sequence[str]) -> list[Input]:
    """Return the texts, then the files ("-" is stdin); or stdin if there are neither. Files are checked here."""
    if not texts and not files:
        if not config.rank() and (sys.stdin is None or sys.stdin.isatty()):
            raise UsageError("no input", hint="pass TEXT, use -f FILE, or pipe data to stdin; -f - reads the terminal")
        return [_stdin(None)]
    warn_if_likely_mistake(texts)
    arguments = [Input(None, partial(io.BytesIO, text.encode()), is_argument=True) for text in texts]
    return [*arguments, *map(_check_file, files)]


def warn_if_likely_mistake(texts: Sequence[str]) -> None:
    """Print a note if the texts are names of files, or look like the words of one text."""
    if config.rank():
        return
    for text in texts:
        with suppress(OSError, ValueError):  # The text is too long to be a name.
            if Path(text).is_file():
                console.notice(f"{text!r} is treated as text; to read the file, use -f {text}")
    if len(texts) > 2 and console.is_watched() and all(text.isascii() and text.split() == [text] for text in texts):
        console.notice(f"got {len(texts)} one-word texts; quote the words to pass a single text")


def read_records(inputs: Sequence[Input], format: InputFormat, dialect: Dialect | None = None) -> Iterator[Record]:
    """Yield every record of the inputs. A record that cannot be parsed has a `failure`."""
    dialect = dialect or Dialect()
    read = partial(read_csv, dialect=dialect) if format is InputFormat.CSV else READERS[format]
    # NUL-terminated strings are read in chunks, so the position says nothing about the record.
    sizes = [input.size for input in inputs if input.size is not None and format is not InputFormat.NULL]
    total = sum(sizes) if len(sizes) == len(inputs) else 0
    done, is_empty = 0, format is InputFormat.WHOLE and not all(input.is_argument for input in inputs)
    for name, open_stream, _, is_argument in inputs:
        record, shown = None, name and printable(name)
        try:
            with open_stream() as source:
                stream = source if is_argument else open_text(source, dialect.encoding, shown)
                for record in read(stream, shown):
                    if is_empty and not is_argument:
                        is_empty = not (record.failure or record.fields["text"].strip())
                    if total:
                        share = min(1, (done + source.tell()) / total)  # What is decoded was read ahead.
                        record = replace(record, input_fraction=share if share < 1 or stream is source else None)
                    yield record
                done += source.tell() if total else 0
        except OSError as exc:
            raise UsageError(f"{name or 'stdin'}: {reason(exc)}") from exc
        except RecordError as exc:  # The file cannot be read, or not to its end.
            if not record:
                raise UsageError(f"{name or 'stdin'}: {exc.message}", exc.hint) from None
            yield Record({}, shown, failure=Failure(exc.kind, exc.message))
    if is_empty:
        console.warning("input is empty")


def read_prompts(texts: Sequence[str], files: Sequence[str], format: InputFormat, dialect: Dialect) -> Iterator[Record]:
    """Read the records of generate and chat: texts and files together are one prompt, files first."""
    if not (texts and files):
        return read_records(open_inputs(texts, files), format, dialect)
    if format is not InputFormat.WHOLE:
        hint = 'to add text to each record: --prompt "... {text}"'
        raise UsageError(f"TEXT with -f cannot be combined with --{format.value}", hint)
    parts = []
    for record in read_records([*open_inputs([], files), *open_inputs(texts, [])], format, dialect):
        if record.failure:
            raise RecordError(record.failure.type, f"{record.where}{record.failure.message}")
        parts.append(record.fields["text"])
    return iter([Record({"text": "\n\n".join(parts)}, file=files[0] if len(files) == 1 else None)])


def read_documents(records: Iterable[Record], fields: JsonObject) -> tuple[list[Record], list[dict[str, str | None]]]:
    """Return a record with the fields, and the text and the file of each document that it asks about.

    The record has the failure of the first document that cannot be read.
    """
    documents: list[dict[str, str | None]] = []
    for document in records:
        if document.failure:
            return [Record(fields, document.file, failure=document.failure)], []
        documents.append({"text": document.fields["text"], "file": document.file})
    return [Record(fields)], documents


def add_fields(records: Iterable[Record], fields: JsonObject, *, retry: bool) -> Iterator[Record]:
    """Add the fields that a record lacks, except to records with an error that are not retried."""
    for record in records:
        is_passed_on = record.failure or (record.has_error and not retry)
        yield record if is_passed_on else replace(record, fields={**fields, **record.fields})


def rename_text(records: Iterable[Record], name: str, fields: JsonObject) -> Iterator[Record]:
    """Put the text of each record into the field `name`, beside `fields`."""
    for record in records:
        yield record if record.failure else replace(record, fields={**fields, name: record.fields["text"]})


def _check_file(name: str) -> Input:
    if name == "-":
        return _stdin(name)
    path = Path(name)
    if path.is_dir():
        raise UsageError(f"{name!r} is a directory", hint=f"pass files, e.g. -f {path / 'FILE'}")
    try:
        if (size := _regular_size(path.stat())) is not None:  # A FIFO can be opened only once.
            with path.open("rb") as file:
                find_codec(file.peek(1))
    except OSError as exc:
        raise UsageError(f"{name}: {reason(exc)}") from exc
    return Input(name, lambda: path.open("rb"), size)


def _stdin(name: str | None) -> Input:
    if config.rank():  # Only the first process reads stdin.
        return Input(name, io.BytesIO)
    if sys.stdin is None:
        raise UsageError("stdin is closed")
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError):  # sys.stdin was replaced by an object without a descriptor.
        return Input(name, lambda: cast(Stream, sys.stdin.buffer))
    # A new buffer on the descriptor: a thread that waits in sys.stdin would block the exit of the interpreter.
    return Input(name, lambda: open(descriptor, "rb", closefd=False), _regular_size(os.fstat(descriptor)))


def _regular_size(status: os.stat_result) -> int | None:
    return status.st_size if stat.S_ISREG(status.st_mode) else None
