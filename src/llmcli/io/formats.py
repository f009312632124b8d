"""What one record is: a stream of bytes -> Records, form by form."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, cast

from llmcli.errors import RecordError, UsageError
from llmcli.job import Failure, Record

Stream = io.BufferedIOBase
BOM = "\ufeff"
CHUNK = 1 << 16
DEEPEST = 500  # levels of JSON: Python's own limit, 1,000, counts whoever calls too


class InputFormat(Enum):
    """What one record is."""

    WHOLE = "whole"  # the whole argument, file or stdin
    LINES = "lines"
    NULL = "null"
    JSONL = "jsonl"
    CSV = "csv"


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
        text = utf8(without_line_end(data) if line_end else data)
    except RecordError as exc:
        return _failed(name, number, exc)
    return Record({"text": text if number and number > 1 else text.removeprefix(BOM)}, name, number)


def _jsonl(stream: Stream, name: str | None) -> Iterator[Record]:
    for number, line in enumerate(stream, start=1):
        try:
            text = utf8(without_line_end(line))
            yield Record(_object(text.removeprefix(BOM)), name, number)  # files put together have it on any line
        except RecordError as exc:
            yield _failed(name, number, exc)


def _object(text: str) -> dict[str, Any]:
    if not text.strip():
        raise RecordError("invalid_json", "blank line")
    try:
        value = JSON.decode(text)
    except json.JSONDecodeError as exc:
        there = f": {text[exc.pos]!r}" if exc.pos < len(text) else ""
        message = f"not JSON: {exc.msg.removesuffix(' at')} at character {exc.pos}{there}"
        raise RecordError("invalid_json", message) from None
    except (ValueError, RecursionError) as exc:
        raise RecordError("invalid_json", f"not JSON: {exc}") from None
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
                utf8(cell.encode("utf-8", "surrogateescape"))
        except StopIteration:
            return
        except csv.Error as exc:
            failure = Failure("invalid_csv", f"not CSV: {exc}")
        except RecordError as exc:
            failure = Failure(exc.kind, exc.message)
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


def _failed(name: str | None, number: int | None, exc: RecordError) -> Record:
    fields = {} if number is None else {"line": number}
    return Record(fields, name, number, Failure(exc.kind, exc.message))


def without_line_end(data: bytes) -> bytes:
    """The text without its last line end, as `$(...)` gives it in a shell."""
    return data[:-1].removesuffix(b"\r") if data.endswith(b"\n") else data


def utf8(data: bytes) -> str:
    """Raises RecordError that says where it is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        byte = data[exc.start]
        raise RecordError("invalid_utf8", f"not UTF-8: byte 0x{byte:02x} at offset {exc.start}") from None


READERS: Mapping[InputFormat, Callable[[Stream, str | None], Iterator[Record]]] = {
    InputFormat.WHOLE: _whole,
    InputFormat.LINES: _lines,
    InputFormat.NULL: _null,
    InputFormat.JSONL: _jsonl,
    InputFormat.CSV: _csv,
}
