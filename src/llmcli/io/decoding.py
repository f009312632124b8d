"""Read files and stdin as UTF-8, whatever their encoding and compression."""

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import cast

from llmcli import console
from llmcli.errors import RecordError, UsageError
from llmcli.io.compression import CHUNK_BYTES, decompress, find_codec

Stream = io.BufferedIOBase
BOM = "\ufeff"
AUTO = "auto"  # the encoding that charset-normalizer finds
CANDIDATES = ["cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r", "iso8859_2", "cp932",
              "euc_jp", "gb18030", "big5", "cp949"]  # fmt: skip  # Others are rare, and would win by chance.
SAMPLE_BYTES = 1 << 18
NOT_OF_FILES = ("idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "utf-7")
FOREIGN = {  # how files begin that are not UTF-8, what they are, and their encoding or what to do
    rb"\xff\xfe\0\0|\0\0\xfe\xff": ("UTF-32", "utf-32"),
    rb"[^\0]\0\0\0[^\0]\0\0\0": ("UTF-32", "utf-32-le"),
    rb"\0\0\0[^\0]\0\0\0[^\0]": ("UTF-32", "utf-32-be"),
    rb"\xff\xfe|\xfe\xff": ("UTF-16", "utf-16"),
    rb"[^\0]\0[^\0]\0": ("UTF-16", "utf-16-le"),
    rb"\0[^\0]\0[^\0]": ("UTF-16", "utf-16-be"),
    rb"PK\x03\x04": ("a zip archive", "extract the file with unzip -p, or save the spreadsheet as CSV"),
    rb"\xd0\xcf\x11\xe0": ("an Office document", "save the spreadsheet as CSV"),
    rb"PAR1\x15|ARROW1\0\0": ("Parquet or Arrow", "read it with --parquet"),
}


@dataclass
class Dialect:
    """How the text of the input is written. A CSV output follows the first CSV input."""

    encoding: str = "utf-8"
    delimiter: str | None = None  # of CSV; None: a comma, or what the first line of a file sets
    header: list[str] = field(default_factory=list)  # of the first CSV input, as what follows
    found_delimiter: str = ","
    has_bom: bool = False


def find_encoding(name: str) -> str:
    """Return the usual name of an encoding of files, or `auto`. Raises UsageError if it is unknown."""
    with suppress(LookupError, ValueError):  # ValueError: the name contains NUL.
        usual = AUTO if name.lower() == AUTO else codecs.lookup(name).name
        if usual == AUTO or (usual not in NOT_OF_FILES and "\n".encode(usual)):
            return "utf-8" if usual == "ascii" else usual
    raise UsageError(f"unknown encoding {name!r}", hint="e.g. latin-1, cp1252, utf-16 or auto")


def decode_utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        place = f"offset {exc.start}, line {line}" if b"\n" in data else f"offset {exc.start}"
        message = f"cannot decode byte 0x{data[exc.start]:02x} at {place}"
        raise RecordError("invalid_utf8", message, hint="use --encoding, or convert it to UTF-8 with iconv") from None


def printable(text: str) -> str:
    """Return a text that the system gave, with escapes such as `\\xff` for bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def check_signature(start: bytes) -> None:
    for pattern, (kind, advice) in FOREIGN.items():
        if re.match(pattern, start):
            hint = f"use --encoding {advice}, or convert it with iconv" if advice.startswith("utf") else advice
            raise RecordError("invalid_utf8", f"expected UTF-8, got {kind}", hint)


def read_lines(stream: Stream) -> Iterator[bytes]:
    """Return the lines of a file. Raises RecordError if it is not UTF-8."""
    first = stream.readline()
    check_signature(first)
    return chain([first] * bool(first), stream)


class _ChunkStream(io.RawIOBase):
    """A stream of bytes that come in chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._rest = self._rest or next(filter(None, self._chunks), b"")
        part, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def open_text(source: Stream, encoding: str, name: str | None) -> io.BufferedReader:
    """Return a stream of UTF-8: the source itself, if it is UTF-8 and not compressed."""
    stream = source if isinstance(source, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, source))
    codec = find_codec(stream.peek(1))
    if not codec and encoding == "utf-8":
        return stream
    chunks = decompress(stream, codec) if codec else iter(partial(stream.read1, CHUNK_BYTES), b"")
    if encoding != "utf-8":
        chunks = _detect(chunks, name) if encoding == AUTO else _recode(chunks, encoding)
    return io.BufferedReader(_ChunkStream(chunks), CHUNK_BYTES)


def _recode(chunks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Yield the chunks as UTF-8. What cannot be decoded becomes bytes that are not UTF-8, so that its record fails."""
    decoder = codecs.getincrementaldecoder(encoding)(_mark_invalid.__name__)
    for chunk in chunks:
        yield decoder.decode(chunk).encode("utf-8", "surrogateescape")
    yield decoder.decode(b"", final=True).encode("utf-8", "surrogateescape")


def _mark_invalid(exc: UnicodeError) -> tuple[str, int]:
    assert isinstance(exc, UnicodeDecodeError)
    byte = exc.object[exc.start]
    return f"{chr(0xDC00 + byte) if byte > 0x7F else ''}\udcff", exc.end  # Bytes without 0xff could be valid together.


codecs.register_error(_mark_invalid.__name__, _mark_invalid)


def _detect(chunks: Iterator[bytes], name: str | None) -> Iterator[bytes]:
    """Yield the chunks as UTF-8. Lines of ASCII are the same in every encoding, so that the first other one decides."""
    encoding, other, rest = "utf-8", None, b""
    for chunk in chunks:
        rest += chunk
        other = re.search(rb"[^\x01-\x7f]", rest)
        start = rest.rfind(b"\n", 0, other.start() if other else None) + 1
        yield rest[:start]
        rest = rest[start:]  # It begins with a line, so that the choice does not depend on the sizes of the chunks.
        if other:
            break
    if other:
        while len(rest) < SAMPLE_BYTES and (chunk := next(chunks, b"")):
            rest += chunk
        encoding = _choose_encoding(rest[: rest.rfind(b"\n", 0, SAMPLE_BYTES) + 1] or rest)
        console.notice(f"{name or 'stdin'}: --encoding auto chose {encoding}")
    yield from _recode(chain([rest], chunks), encoding)


def _choose_encoding(sample: bytes) -> str:
    for pattern, (_, encoding) in FOREIGN.items():
        if encoding.startswith("utf") and re.match(pattern, sample):
            return encoding
    lines = b"\n".join(line for line in sample.split(b"\n") if not line.isascii())
    others = [char for char in lines.decode("utf-8", "replace") if not char.isascii()]
    if others.count("\ufffd") * 10 <= len(others):  # A few bytes are damaged. Other encodings have many more of them.
        return "utf-8"
    from charset_normalizer import from_bytes

    matches = from_bytes(lines, cp_isolation=CANDIDATES)
    best = matches.best()
    if not best:
        raise RecordError("invalid_utf8", "cannot detect the encoding", hint="set it, e.g. --encoding cp1252")
    equal = [match for match in matches if (match.chaos, match.coherence) == (best.chaos, best.coherence)]
    is_western = any("cp1252" in match.could_be_from_charset for match in equal)
    return "cp1252" if is_western else best.encoding  # Short texts match several, and cp1252 is the usual one.
