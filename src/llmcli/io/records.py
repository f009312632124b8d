"""Open arguments, files and stdin, and read them into Records. No other module reads input."""

import io
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

from llmcli import config, console
from llmcli.errors import RecordError, UsageError, reason
from llmcli.io.formats import READERS, InputFormat, Stream, decode_utf8, printable
from llmcli.job import JsonObject, Record

Inputs = Sequence[tuple[str | None, Stream]]  # name of the file, if it is one, and its stream


def open_inputs(texts: Sequence[str], files: Sequence[str]) -> Inputs:
    """Open the texts, then the files ("-" is stdin); or stdin if there are neither."""
    if not texts and not files:
        if not config.rank() and (sys.stdin is None or sys.stdin.isatty()):
            raise UsageError("no input", hint="pass TEXT, use -f FILE, or pipe data to stdin; -f - reads the terminal")
        return [(None, _open_stdin())]
    warn_if_likely_mistake(texts)
    arguments = [(None, io.BytesIO(text.encode("utf-8", "surrogateescape"))) for text in texts]
    return [*arguments, *((name, _open_file(name)) for name in files)]


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


def read_records(inputs: Inputs, format: InputFormat) -> Iterator[Record]:
    """Yield every record of the inputs, and close them. A record that cannot be parsed has a `failure`."""
    # NUL-terminated strings are read in chunks, so the position says nothing about the record.
    total = 0 if format is InputFormat.NULL else _total_bytes(stream for _, stream in inputs)
    done = 0
    for name, stream in inputs:
        try:
            with stream:
                for record in READERS[format](stream, name and printable(name)):
                    yield replace(record, input_fraction=min(1, (done + stream.tell()) / total)) if total else record
                done += stream.tell() if total else 0
        except OSError as exc:
            raise UsageError(f"{name or 'stdin'}: {reason(exc)}") from exc
        except RecordError as exc:  # The whole file cannot be read.
            raise UsageError(f"{name or 'stdin'}: {exc.message}", exc.hint) from None


def read_prompts(texts: Sequence[str], files: Sequence[str], format: InputFormat) -> Iterator[Record]:
    """Read the records of generate and chat: texts and files together are one prompt, files first."""
    if not (texts and files):
        return read_records(open_inputs(texts, files), format)
    if format is not InputFormat.WHOLE:
        hint = 'to add text to each record: --prompt "... {text}"'
        raise UsageError(f"TEXT with -f cannot be combined with --{format.value}", hint)
    parts = []
    for record in read_records([*open_inputs([], files), *open_inputs(texts, [])], format):
        if record.failure:
            raise RecordError(record.failure.type, f"{record.where}{record.failure.message}")
        parts.append(record.fields["text"])
    return iter([Record({"text": "\n\n".join(parts)}, file=files[0] if len(files) == 1 else None)])


def read_documents(files: Sequence[str], fields: JsonObject) -> tuple[list[Record], list[dict[str, str | None]]]:
    """Return a record with the fields, and the text and the file of each document that it asks about.

    The record has the failure of the first document that cannot be read.
    """
    documents: list[dict[str, str | None]] = []
    for document in read_records(open_inputs([], files), InputFormat.WHOLE):
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


def decode_argument(text: str) -> str:
    """Return a text of the command line; raise UsageError if it is not UTF-8."""
    try:
        return decode_utf8(text.encode("utf-8", "surrogateescape"))
    except RecordError as exc:
        raise UsageError(exc.message) from None


def _open_file(name: str) -> Stream:
    if name == "-":
        return _open_stdin()
    path = Path(name)
    if path.is_dir():
        raise UsageError(f"{name!r} is a directory", hint=f"pass files, e.g. -f {path / 'FILE'}")
    try:
        return path.open("rb")
    except OSError as exc:
        raise UsageError(f"{name}: {reason(exc)}") from exc


def _open_stdin() -> Stream:
    # A new buffer on the descriptor: a thread that waits in sys.stdin would block the exit of the interpreter.
    if config.rank():  # Only the first process reads stdin.
        return io.BytesIO()
    if sys.stdin is None:
        raise UsageError("stdin is closed")
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except (OSError, ValueError):  # sys.stdin was replaced by an object without a descriptor.
        return cast(Stream, sys.stdin.buffer)


def _total_bytes(streams: Iterable[Stream]) -> int:
    """Return the size of regular files; 0 if a stream is something else."""
    try:
        stats = [os.fstat(stream.fileno()) for stream in streams]
    except OSError:  # The stream of an argument has no descriptor.
        return 0
    return sum(status.st_size for status in stats) if all(stat.S_ISREG(status.st_mode) for status in stats) else 0
