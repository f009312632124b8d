"""Record formats: parse a stream of bytes into Records."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from enum import Enum

from llmcli.errors import RecordError, UsageError
from llmcli.job import Failure, JsonObject, Record

Stream = io.BufferedIOBase
BOM = "\ufeff"
CHUNK_BYTES = 1 << 16
MAX_JSON_DEPTH = 500  # Python's own limit, 1,000, counts the frames of callers too


class InputFormat(Enum):
    """What one record is."""

    WHOLE = "whole"  # the whole argument, file or stdin
    LINES = "lines"
    NULL = "null"
    JSONL = "jsonl"
    CSV = "csv"

    @property
    def has_fields(self) -> bool:
        return self in (InputFormat.JSONL, InputFormat.CSV)


def _strip_line_end(data: bytes) -> bytes:
    return data[:-1].removesuffix(b"\r") if data.endswith(b"\n") else data


def decode_utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        message = f"not UTF-8: byte 0x{data[exc.start]:02x} at offset {exc.start}"
        raise RecordError("invalid_utf8", message) from None


def _read_whole(stream: Stream, name: str | None) -> Iterator[Record]:
    yield _text_record(_strip_line_end(stream.read()), name)


def _read_lines(stream: Stream, name: str | None) -> Iterator[Record]:
    for number, line in enumerate(stream, start=1):
        yield _text_record(_strip_line_end(line), name, number)


def _read_null(stream: Stream, name: str | None) -> Iterator[Record]:
    rest, number = b"", 0
    while chunk := stream.read1(CHUNK_BYTES):
        *complete, rest = (rest + chunk).split(b"\0")
        for data in complete:
            number += 1
            yield _text_record(data, name, number)
    if rest:
        yield _text_record(rest, name, number + 1)


def _text_record(data: bytes, name: str | None, number: int | None = None) -> Record:
    try:
        text = decode_utf8(data)
    except RecordError as exc:
        fields = {} if number is None else {"line": number}
        return Record(fields, name, number, Failure(exc.kind, exc.message))
    return Record({"text": text if number and number > 1 else text.removeprefix(BOM)}, name, number)


def _read_jsonl(stream: Stream, name: str | None) -> Iterator[Record]:
    for number, line in enumerate(stream, start=1):
        try:
            text = decode_utf8(_strip_line_end(line))
            # Concatenated files can have a byte order mark on any line.
            yield Record(_parse_object(text.removeprefix(BOM)), name, number)
        except RecordError as exc:
            yield Record({"line": number}, name, number, Failure(exc.kind, exc.message))


def _parse_object(text: str) -> JsonObject:
    if not text.strip():
        raise RecordError("invalid_json", "blank line")
    try:
        value = JSON.decode(text)
    except json.JSONDecodeError as exc:
        character = f": {text[exc.pos]!r}" if exc.pos < len(text) else ""
        message = f"not JSON: {exc.msg.removesuffix(' at')} at character {exc.pos}{character}"
        raise RecordError("invalid_json", message) from None
    except (ValueError, RecursionError) as exc:
        raise RecordError("invalid_json", f"not JSON: {exc}") from None
    if not isinstance(value, dict):
        names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
        raise RecordError("invalid_json", f"expected a JSON object, got {names.get(type(value), 'a number')}")
    if _is_too_deep(value):
        raise RecordError("invalid_json", f"nested more than {MAX_JSON_DEPTH} levels deep")
    return value


def _is_too_deep(value: dict[str, object]) -> bool:
    """Return whether writing the value as JSON could exceed the recursion limit."""
    level: list[dict[str, object] | list[object]] = [value]
    for _ in range(MAX_JSON_DEPTH):
        containers = [outer.values() if isinstance(outer, dict) else outer for outer in level]
        level = [inner for container in containers for inner in container if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a valid number")
    return value


JSON = json.JSONDecoder(parse_constant=_parse_float, parse_float=_parse_float)


def _read_csv(stream: Stream, name: str | None) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the maximum on every platform
    # Undecodable bytes become surrogates, so that they are reported with their row.
    lines = (line.decode("utf-8", "surrogateescape") for line in stream)
    rows = csv.reader((line if number else line.removeprefix(BOM) for number, line in enumerate(lines)), strict=True)
    header: list[str] = []
    while True:
        row, failure = [], None
        try:
            row = next(rows)
            for cell in row:
                decode_utf8(cell.encode("utf-8", "surrogateescape"))
        except StopIteration:
            return
        except csv.Error as exc:
            failure = Failure("invalid_csv", f"not CSV: {exc}")
        except RecordError as exc:
            failure = Failure(exc.kind, exc.message)
        if not header and failure:
            raise UsageError(f"{name or 'stdin'}: invalid header: {failure.message}")
        if not header:
            header = row
        elif row or failure:
            if not failure and len(row) != len(header):
                extra = f"; extra fields: {', '.join(row[len(header) :])}" if len(row) > len(header) else ""
                failure = Failure("invalid_csv", f"expected {len(header)} fields, got {len(row)}{extra}")
            fields = dict.fromkeys(header, "") | dict(zip(header, row, strict=False))
            yield Record(fields, name, rows.line_num, failure)


READERS: Mapping[InputFormat, Callable[[Stream, str | None], Iterator[Record]]] = {
    InputFormat.WHOLE: _read_whole, InputFormat.LINES: _read_lines, InputFormat.NULL: _read_null,
    InputFormat.JSONL: _read_jsonl, InputFormat.CSV: _read_csv,
}  # fmt: skip
