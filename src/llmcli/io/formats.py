"""Record formats: parse a stream of UTF-8 into Records, and format rows of CSV."""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from itertools import chain
from pathlib import Path

from llmcli.errors import RecordError
from llmcli.io.compression import CHUNK_BYTES
from llmcli.io.decoding import BOM, Dialect, Stream, check_signature, decode_utf8, open_text, printable, read_lines
from llmcli.job import Failure, JsonObject, Record

MAX_JSON_DEPTH = 500  # Python's own limit, 1,000, counts the frames of callers too
TOO_DEEP = f"nested more than {MAX_JSON_DEPTH} levels deep"
SURROGATE = re.compile("[\ud800-\udfff]")
DELIMITERS = ",;\t|"  # usual ones of CSV
DELIMITER_LINE = re.compile(r'"?sep=([^\r\n\0"])"?[\r\n]*', re.IGNORECASE)  # begins CSV for spreadsheet programs


class InputFormat(Enum):
    """What one record is."""

    WHOLE = "whole"  # the whole argument, file or stdin
    LINES = "lines"
    NULL = "null"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"  # read by `TableSource`
    OPENAI_BATCH = "openai-batch"  # a request per line

    @property
    def has_fields(self) -> bool:
        return self in (InputFormat.JSONL, InputFormat.CSV, InputFormat.PARQUET)


def _strip_line_end(data: bytes) -> bytes:
    return data[:-1].removesuffix(b"\r") if data.endswith(b"\n") else data


def _failed(fields: JsonObject, name: str | None, number: int | None, exc: RecordError) -> Record:
    return Record(fields, name, number, Failure.from_error(exc))


def _read_whole(stream: Stream, name: str | None) -> Iterator[Record]:
    try:
        data = stream.read()
        check_signature(data)
        yield _text_record(_strip_line_end(data), name)
    except RecordError as exc:
        yield _failed({}, name, None, exc)


def _read_lines(stream: Stream, name: str | None) -> Iterator[Record]:
    for number, line in enumerate(read_lines(stream), start=1):
        yield _text_record(_strip_line_end(line), name, number)


def _read_null(stream: Stream, name: str | None) -> Iterator[Record]:
    parts, number = [b""], 0  # of the next string, which can be longer than a chunk
    while chunk := stream.read1(CHUNK_BYTES):
        if len(parts) == 1 and not number:
            check_signature(chunk.replace(b"\0", b" "))  # NULs are no sign of UTF-16 here.
        part, *others = chunk.split(b"\0")
        parts.append(part)
        for part in others:
            number += 1
            yield _text_record(b"".join(parts), name, number)
            parts = [part]
    if rest := b"".join(parts):
        yield _text_record(rest, name, number + 1)


def _text_record(data: bytes, name: str | None, number: int | None = None) -> Record:
    try:
        text = decode_utf8(data)
    except RecordError as exc:
        return _failed({} if number is None else {"line": number}, name, number, exc)
    return Record({"text": text if number and number > 1 else text.removeprefix(BOM)}, name, number)


def _read_jsonl(stream: Stream, name: str | None) -> Iterator[Record]:
    blank: list[int] = []  # numbers of blank lines; those at the end of a file are no records
    for number, line in enumerate(read_lines(stream), start=1):
        try:
            # Concatenated files can have a byte order mark on any line.
            text = decode_utf8(_strip_line_end(line)).removeprefix(BOM)
            if not text.strip():
                blank.append(number)
                continue
            record = Record(_parse_object(text), name, number)
        except RecordError as exc:
            valid = _parse_valid_fields(line) if exc.kind == "invalid_utf8" else {}
            record = _failed({"line": number, **valid}, name, number, exc)
        for place in blank:
            yield _failed({"line": place}, name, place, RecordError("invalid_json", "blank line"))
        blank.clear()
        yield record


def _parse_valid_fields(line: bytes) -> JsonObject:
    """Return the fields of a JSON object that are UTF-8."""
    with suppress(RecordError):
        fields = _parse_object(line.decode("utf-8", "surrogateescape").removeprefix(BOM))
        return dict(field for field in fields.items() if not SURROGATE.search(json.dumps(field, ensure_ascii=False)))
    return {}


def _parse_object(text: str) -> JsonObject:
    try:
        value = JSON.decode(text)
    except json.JSONDecodeError as exc:
        character = f": {text[exc.pos]!r}" if exc.pos < len(text) else ""
        message = f"not JSON: {exc.msg.removesuffix(' at')} at character {exc.pos}{character}"
        raise RecordError("invalid_json", message) from None
    except ValueError as exc:  # The end of the message of a long integer is advice for programmers.
        raise RecordError("invalid_json", f"not JSON: {str(exc).partition(';')[0]}") from None
    except RecursionError:
        raise RecordError("invalid_json", f"not JSON: {TOO_DEEP}") from None
    if not isinstance(value, dict):
        names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
        raise RecordError("invalid_json", f"expected a JSON object, got {names.get(type(value), 'a number')}")
    if text.count("{") + text.count("[") > MAX_JSON_DEPTH and _is_too_deep(value):  # Counting is faster.
        raise RecordError("invalid_json", TOO_DEEP)
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


def _build_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise RecordError("invalid_json", f"duplicate key {name[:100]!r}")
    return fields


JSON = json.JSONDecoder(parse_constant=_parse_float, parse_float=_parse_float, object_pairs_hook=_build_object)


def read_csv(stream: Stream, name: str | None, dialect: Dialect) -> Iterator[Record]:
    """Yield the rows of a file as Records. Raises RecordError if its first row is not a header."""
    csv.field_size_limit(2**31 - 1)  # the maximum on every platform
    lines = read_lines(stream)
    first = next(lines, b"")
    has_bom, first = first.startswith(BOM.encode()), first.removeprefix(BOM.encode())
    if not first.endswith(b"\n"):  # It is the whole file, whose lines may end with CR.
        lines = iter(first.splitlines(keepends=True))
        first = next(lines, b"")
    delimiter, skipped = dialect.delimiter, 0
    if match := DELIMITER_LINE.fullmatch(decode_utf8(first)):
        if match[1] != (delimiter or match[1]):
            raise RecordError("invalid_csv", f"line 1 sets the delimiter {match[1]!r}, --delimiter sets {delimiter!r}")
        delimiter, skipped, first = match[1], 1, next(lines, b"")
    while first and not first.strip(b"\r\n"):
        skipped, first = skipped + 1, next(lines, b"")
    # Undecodable bytes become surrogates, so that they are reported with their row.
    texts = (line.decode("utf-8", "surrogateescape") for line in chain([first], lines))
    rows = csv.reader(texts, delimiter=delimiter or ",", strict=True)
    header = _read_header(rows, first, delimiter)
    if not dialect.header:
        dialect.header, dialect.found_delimiter = header, delimiter or ","
        dialect.has_bom = has_bom or dialect.encoding != "utf-8"
    while True:
        fields: dict[str, str | None] = dict.fromkeys(header, "")
        row: list[str] = []
        failure, start = None, rows.line_num + skipped + 1
        try:
            row = next(rows)
            fields |= zip(header, row, strict=False)
            "".join(row).encode()
        except StopIteration:
            return
        except csv.Error as exc:
            place = f" in the row that begins on line {start}" if start < rows.line_num + skipped else ""
            failure = Failure("invalid_csv", f"{_describe_error(exc)}{place}")
        except UnicodeEncodeError:
            for column, cell in zip(header, row, strict=False):
                try:
                    decode_utf8(cell.encode("utf-8", "surrogateescape"))
                except RecordError as exc:
                    fields[column] = None
                    failure = failure or Failure(exc.kind, f"column {column!r}: {exc.message}: {exc.hint}")
        if not failure and row and len(row) != len(header):
            extra = f"; extra fields: {printable(', '.join(row[len(header) :]))}" if len(row) > len(header) else ""
            failure = Failure("invalid_csv", f"expected {len(header)} fields, got {len(row)}{extra}")
        if row or failure:
            yield Record(fields, name, rows.line_num + skipped, failure, is_row=True)


def _read_header(rows: Iterator[list[str]], first: bytes, delimiter: str | None) -> list[str]:
    """Return the names of the columns. Raises RecordError if `first`, the first line, is not the header of a CSV."""
    text, header, error, hint = decode_utf8(first), [], "", None
    try:
        header = next(filter(None, rows), [])
        decode_utf8("".join(header).encode("utf-8", "surrogateescape"))
    except csv.Error as exc:
        error = _describe_error(exc)
    likely = max(DELIMITERS, key=re.sub('"[^"]*"', "", text).count)
    if delimiter is None and likely != ",":
        error = f"expected commas between columns, got {likely!r}"
        hint = f"use --delimiter {likely!r}, or --delimiter , if commas are right"
    elif duplicates := [name for name, count in Counter(header).items() if count > 1]:
        error = f"duplicate column {duplicates[0]!r}"
    if error:
        raise RecordError("invalid_csv", f"invalid header: {error}", hint)
    return header


def _describe_error(exc: csv.Error) -> str:
    return f"not CSV: {str(exc).partition(' - ')[0]}"  # The rest of a message is advice for programmers.


def read_columns(path: Path, dialect: Dialect) -> list[str]:
    """Return the columns of a CSV output."""
    with path.open("rb") as file, open_text(file, "utf-8", None) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        return next(csv.reader(text, delimiter=dialect.found_delimiter), [])


def format_row(cells: Sequence[object], dialect: Dialect) -> str:
    """Return the cells as a row. Its line ends with LF: spreadsheet programs and other tools read that too."""
    text = io.StringIO()
    # With "\n" as its line end, the writer would not quote a cell with "\r".
    csv.writer(text, delimiter=dialect.found_delimiter).writerow(cells)
    return text.getvalue().removesuffix("\r\n") + "\n"


READERS: Mapping[InputFormat, Callable[[Stream, str | None], Iterator[Record]]] = {  # `read_csv` reads the rest
    InputFormat.WHOLE: _read_whole, InputFormat.LINES: _read_lines, InputFormat.NULL: _read_null,
    InputFormat.JSONL: _read_jsonl, InputFormat.OPENAI_BATCH: _read_jsonl,
}  # fmt: skip
