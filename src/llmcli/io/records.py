"""Arguments, files and stdin -> Records. The one place that reads input."""

import io
import itertools
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from llmcli import config, console
from llmcli.errors import RecordError, UsageError, reason
from llmcli.io.formats import BOM, READERS, InputFormat, Stream, utf8, without_line_end
from llmcli.job import Record


def sources(texts: Sequence[str], files: Sequence[str]) -> list[tuple[str | None, Stream]]:
    """What to read, in order, as (name of the file, stream): arguments, then files, or stdin where
    neither is given.

    Raises UsageError for a file that cannot be read, before anything runs, and where there is
    no input at all and stdin is a terminal.
    """
    if not texts and not files:
        if not config.rank() and (sys.stdin is None or sys.stdin.isatty()):
            raise UsageError("no input", hint="give a TEXT, -f FILE, or pipe something in; -f - reads the terminal")
        return [(None, _stdin())]
    warn_if_likely_mistake(texts)
    arguments: list[tuple[str | None, Stream]] = [
        (None, io.BytesIO(text.encode("utf-8", "surrogateescape"))) for text in texts
    ]
    return arguments + [(name, _open(name)) for name in files]


def warn_if_likely_mistake(texts: Sequence[str]) -> None:
    """Say what may have been meant by arguments that are no texts, or parts of one."""
    if config.rank():
        return
    for text in texts:
        with suppress(OSError, ValueError):  # too long to be a name
            if Path(text).is_file():
                console.notice(f"{text!r} is a text here: -f {text} reads the file")
    if len(texts) > 2 and console.is_watched() and all(text.isascii() and text.split() == [text] for text in texts):
        console.notice(f"these are {len(texts)} texts of a word each: quotes make one of them")


def read(streams: Iterable[tuple[str | None, Stream]], form: InputFormat) -> Iterator[Record]:
    """Every record of the streams, in order. One that cannot be parsed comes as a Record with a `failure`."""
    streams = list(streams)
    size = (
        0 if form is InputFormat.NULL else _size(stream for _, stream in streams)
    )  # NUL-ended texts are read in chunks
    done = 0
    for name, stream in streams:
        try:
            with stream:
                for record in READERS[form](stream, name):
                    yield replace(record, input_fraction=min(1, (done + stream.tell()) / size)) if size else record
                done += stream.tell() if size else 0
        except OSError as exc:
            raise UsageError(f"{name or 'stdin'}: {reason(exc)}") from exc


def prompts(texts: Sequence[str], files: Sequence[str], form: InputFormat) -> Iterator[Record]:
    """The records of generate and chat, where TEXT and files together are one prompt: files first.

    Raises what `sources` raises; RecordError for a part of the prompt that is not UTF-8.
    """
    if not (texts and files):
        return read(sources(texts, files), form)
    if form is not InputFormat.WHOLE:
        raise UsageError(
            f"TEXT and -f together make one prompt: they exclude --{form.value}",
            hint='to put a text around each record: --prompt "... {text}"',
        )
    parts = [_part(name, stream) for name, stream in sources([], files) + sources(texts, [])]
    return iter([Record({"text": "\n\n".join(parts)}, file=files[0] if len(files) == 1 else None)])


def questions(
    question: str | None,
    context: str | None,
    files: Sequence[str],
    form: InputFormat,
    roles: Mapping[str, str],
    *,
    retry: bool = False,
) -> tuple[Iterator[Record], list[dict[str, Any]] | None]:
    """The records of qa, and the documents that all of them share: the files, without a record form. QUESTION and -c
    fill what a record lacks, but not one that comes with an error, unless it is to `retry`; of a form that has no
    fields, a record is the context or, with -c, the question.

    Raises what `sources` raises; UsageError where question or context can come from nowhere.
    """
    given = {roles["question"]: question, roles["context"]: context}
    given = {name: argument(text) for name, text in given.items() if text is not None}
    if form in (InputFormat.JSONL, InputFormat.CSV):
        found = read(sources([], files), form)
        return (
            record
            if record.failure or (record.has_error and not retry)
            else replace(record, fields={**given, **record.fields})
            for record in found
        ), None
    if len(given) == 2 and (files or form is not InputFormat.WHOLE):
        raise UsageError("QUESTION and -c leave nothing to read", hint="leave out -c, or the files")
    if len(given) == 2:
        return iter([Record(given)]), None
    if not given:
        raise UsageError("no question", hint='like `llmcli qa "Who wrote it?" -f FILE`')
    found = read(sources([], files), form)
    if form is InputFormat.WHOLE and files and question is not None:
        documents = []
        for record in found:
            if record.failure:
                failed = Record(given, record.file, failure=record.failure)
                return iter([failed]), None
            documents.append({"text": record.fields["text"], "file": record.file})
        return iter([Record(given)]), documents
    role = roles["context" if question is not None else "question"]
    return (
        record if record.failure else replace(record, fields={**given, role: record.fields["text"]}) for record in found
    ), None


def peek_first(records: Iterator[Record]) -> tuple[Iterator[Record], Record | None]:
    """The records, and the first of them, if there is one."""
    first = next(records, None)
    return (itertools.chain([first], records), first) if first else (records, None)


def argument(text: str) -> str:
    """A text of the command line as it is. Raises UsageError where it is not UTF-8."""
    try:
        return utf8(text.encode("utf-8", "surrogateescape"))
    except RecordError as exc:
        raise UsageError(exc.message) from None


def _part(name: str | None, stream: Stream) -> str:
    with stream:
        try:
            return utf8(without_line_end(stream.read())).removeprefix(BOM)
        except RecordError as exc:
            raise RecordError(exc.kind, f"{name}: {exc.message}" if name else exc.message) from None


def _open(name: str) -> Stream:
    if name == "-":
        return _stdin()
    path = Path(name)
    if path.is_dir():
        raise UsageError(f"{name} is a folder", hint=f"name the files in it: -f {path / 'FILE'}")
    try:
        return path.open("rb")
    except OSError as exc:
        raise UsageError(f"{name}: {reason(exc)}") from exc


def _stdin() -> Stream:
    # A buffer of our own on the descriptor: a thread that waits in sys.stdin would block the interpreter's exit.
    if config.rank():  # what is there is the first process's
        return io.BytesIO()
    if sys.stdin is None:
        raise UsageError("stdin is closed")
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except (OSError, ValueError):  # replaced by an object that is no file
        return cast(Stream, sys.stdin.buffer)


def _size(streams: Iterable[Stream]) -> int:
    """Bytes of regular files; 0 where one is something else."""
    try:
        found = [os.fstat(stream.fileno()) for stream in streams]
    except OSError:  # a text that is no file
        return 0
    return sum(each.st_size for each in found) if all(stat.S_ISREG(each.st_mode) for each in found) else 0
