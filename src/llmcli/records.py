"""Arguments, files and stdin -> Records. The one place that reads input."""

import csv
import io
import itertools
import json
import math
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, cast

from llmcli import console, ranks
from llmcli.errors import RecordError, UsageError, reason
from llmcli.job import Failure, Record

Stream = io.BufferedIOBase
BOM = "\ufeff"
CHUNK = 1 << 16
DEEPEST = 500  # levels of JSON: Python's own limit, 1,000, counts whoever calls too


class Form(Enum):
    """What one record is."""

    WHOLE = "whole"  # the whole argument, file or stdin
    LINES = "lines"
    NULL = "null"
    JSONL = "jsonl"
    CSV = "csv"


def sources(texts: Sequence[str], files: Sequence[str]) -> list[tuple[str | None, Stream]]:
    """What to read, in order, as (name of the file, stream): arguments, then files, or stdin where
    neither is given.

    Raises UsageError for a file that cannot be read, before anything runs, and where there is
    no input at all and stdin is a terminal.
    """
    if not texts and not files:
        if not ranks.own() and (sys.stdin is None or sys.stdin.isatty()):
            raise UsageError("no input", hint="give a TEXT, -f FILE, or pipe something in; -f - reads the terminal")
        return [(None, _stdin())]
    _look_again(texts)
    arguments: list[tuple[str | None, Stream]] = [
        (None, io.BytesIO(text.encode("utf-8", "surrogateescape"))) for text in texts
    ]
    return arguments + [(name, _open(name)) for name in files]


def _look_again(texts: Sequence[str]) -> None:
    """Say what may have been meant by arguments that are no texts, or parts of one."""
    if ranks.own():
        return
    for text in texts:
        with suppress(OSError, ValueError):  # too long to be a name
            if Path(text).is_file():
                console.notice(f"{text!r} is a text here: -f {text} reads the file")
    if len(texts) > 2 and console.is_watched() and all(text.isascii() and text.split() == [text] for text in texts):
        console.notice(f"these are {len(texts)} texts of a word each: quotes make one of them")


def read(streams: Iterable[tuple[str | None, Stream]], form: Form) -> Iterator[Record]:
    """Every record of the streams, in order. One that cannot be parsed comes as a Record with a `failure`."""
    readers = {Form.WHOLE: _whole, Form.LINES: _lines, Form.NULL: _null, Form.JSONL: _jsonl, Form.CSV: _csv}
    streams = list(streams)
    size = 0 if form is Form.NULL else _size(stream for _, stream in streams)  # NUL-ended texts are read in chunks
    done = 0
    for name, stream in streams:
        try:
            with stream:
                for record in readers[form](stream, name):
                    yield replace(record, share=min(1, (done + stream.tell()) / size)) if size else record
                done += stream.tell() if size else 0
        except OSError as problem:
            raise UsageError(f"{name or 'stdin'}: {reason(problem)}") from problem


def prompts(texts: Sequence[str], files: Sequence[str], form: Form) -> Iterator[Record]:
    """The records of generate and chat, where TEXT and files together are one prompt: files first.

    Raises what `sources` raises; RecordError for a part of the prompt that is not UTF-8.
    """
    if not (texts and files):
        return read(sources(texts, files), form)
    if form is not Form.WHOLE:
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
    form: Form,
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
    if form in (Form.JSONL, Form.CSV):
        found = read(sources([], files), form)
        return (
            record
            if record.failure or (record.has_failed_before and not retry)
            else replace(record, fields={**given, **record.fields})
            for record in found
        ), None
    if len(given) == 2 and (files or form is not Form.WHOLE):
        raise UsageError("QUESTION and -c leave nothing to read", hint="leave out -c, or the files")
    if len(given) == 2:
        return iter([Record(given)]), None
    if not given:
        raise UsageError("no question", hint='like `llmcli qa "Who wrote it?" -f FILE`')
    found = read(sources([], files), form)
    if form is Form.WHOLE and files and question is not None:
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


def peeked(records: Iterator[Record]) -> tuple[Iterator[Record], Record | None]:
    """The records, and the first of them, if there is one."""
    first = next(records, None)
    return (itertools.chain([first], records), first) if first else (records, None)


def argument(text: str) -> str:
    """A text of the command line as it is. Raises UsageError where it is not UTF-8."""
    try:
        return _utf8(text.encode("utf-8", "surrogateescape"))
    except RecordError as problem:
        raise UsageError(problem.message) from None


def _part(name: str | None, stream: Stream) -> str:
    with stream:
        try:
            return _utf8(_without_line_end(stream.read())).removeprefix(BOM)
        except RecordError as problem:
            raise RecordError(problem.kind, f"{name}: {problem.message}" if name else problem.message) from None


def _open(name: str) -> Stream:
    if name == "-":
        return _stdin()
    path = Path(name)
    if path.is_dir():
        raise UsageError(f"{name} is a folder", hint=f"name the files in it: -f {path / 'FILE'}")
    try:
        return path.open("rb")
    except OSError as problem:
        raise UsageError(f"{name}: {reason(problem)}") from problem


def _stdin() -> Stream:
    # A buffer of our own on the descriptor: a thread that waits in sys.stdin would block the interpreter's exit.
    if ranks.own():  # what is there is the first process's
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


def _whole(stream: Stream, name: str | None) -> Iterator[Record]:
    yield _record(stream.read(), name)


def _lines(stream: Stream, name: str | None) -> Iterator[Record]:
    for number, line in enumerate(stream, start=1):
        yield _record(line, name, number)


def _null(stream: Stream, name: str | None) -> Iterator[Record]:
    rest, number = b"", 0
    while chunk := stream.read1(CHUNK):
        *whole, rest = (rest + chunk).split(b"\0")
        for data in whole:
            number += 1
            yield _record(data, name, number, line_end=False)
    if rest:
        yield _record(rest, name, number + 1, line_end=False)


def _record(data: bytes, name: str | None, number: int | None = None, *, line_end: bool = True) -> Record:
    try:
        text = _utf8(_without_line_end(data) if line_end else data)
    except RecordError as problem:
        return _failed(name, number, problem)
    return Record({"text": text if number and number > 1 else text.removeprefix(BOM)}, name, number)


def _jsonl(stream: Stream, name: str | None) -> Iterator[Record]:
    for number, line in enumerate(stream, start=1):
        try:
            text = _utf8(_without_line_end(line))
            yield Record(_object(text.removeprefix(BOM)), name, number)  # files put together have it on any line
        except RecordError as problem:
            yield _failed(name, number, problem)


def _object(text: str) -> dict[str, Any]:
    if not text.strip():
        raise RecordError("invalid_json", "blank line")
    try:
        value = JSON.decode(text)
    except json.JSONDecodeError as problem:
        there = f": {text[problem.pos]!r}" if problem.pos < len(text) else ""
        message = f"not JSON: {problem.msg.removesuffix(' at')} at character {problem.pos}{there}"
        raise RecordError("invalid_json", message) from None
    except (ValueError, RecursionError) as problem:
        raise RecordError("invalid_json", f"not JSON: {problem}") from None
    if not isinstance(value, dict):
        names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
        raise RecordError("invalid_json", f"not a JSON object but {names.get(type(value), 'a number')}")
    if _is_deep(value):
        raise RecordError("invalid_json", f"nested more than {DEEPEST} levels deep")
    return value


def _is_deep(value: Any) -> bool:
    """Whether it may be too deep to be written again."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def _no_number(name: str) -> None:
    raise ValueError(f"{name[:20]} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else cast(float, _no_number(digits))


JSON = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite)


def _csv(stream: Stream, name: str | None) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the most that every platform takes
    # Undecodable bytes travel as surrogates, so that they are reported with their row.
    lines = (line.decode("utf-8", "surrogateescape") for line in stream)
    rows = csv.reader((line if number else line.removeprefix(BOM) for number, line in enumerate(lines)), strict=True)
    header: list[str] = []
    while True:
        row, failure = [], None
        try:
            row = next(rows)
            for cell in row:
                _utf8(cell.encode("utf-8", "surrogateescape"))
        except StopIteration:
            return
        except csv.Error as problem:
            failure = Failure("invalid_csv", f"not CSV: {problem}")
        except RecordError as problem:
            failure = Failure(problem.kind, problem.message)
        if not header and failure:
            raise UsageError(f"{name or 'stdin'}: the header is {failure.message}")
        if not header:
            header = row
        elif row or failure:
            if not failure and len(row) != len(header):
                beyond = f"; beyond it: {', '.join(row[len(header) :])}" if len(row) > len(header) else ""
                failure = Failure("invalid_csv", f"{len(row)} fields where the header has {len(header)}{beyond}")
            fields = dict.fromkeys(header, "") | dict(zip(header, row, strict=False))
            yield Record(fields, name, rows.line_num, failure)


def _failed(name: str | None, number: int | None, problem: RecordError) -> Record:
    fields = {} if number is None else {"line": number}
    return Record(fields, name, number, Failure(problem.kind, problem.message))


def _without_line_end(data: bytes) -> bytes:
    """The text without its last line end, as `$(...)` gives it in a shell."""
    return data[:-1].removesuffix(b"\r") if data.endswith(b"\n") else data


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        byte = data[problem.start]
        raise RecordError("invalid_utf8", f"not UTF-8: byte 0x{byte:02x} at offset {problem.start}") from None
