"""Decompress inputs, which are known by how they begin, and compress outputs, which are known by their names."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from llmcli.errors import RecordError, UsageError, first_line

CHUNK_BYTES = 1 << 16
MEMBER_BYTES = 1 << 22  # maximum size of what a member of an output holds, before it is compressed
MEMBER_INTERVAL_S = 10.0  # work that `kill -9` may take
CODECS = {  # by suffix: how files begin, and the modules that can read and write them
    ".gz": (rb"\x1f\x8b", ["gzip"]),
    ".bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", ["bz2"]),
    ".xz": (rb"\xfd7zXZ\0", ["lzma"]),
    ".zst": (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", ["compression.zstd", "backports.zstd"]),
}


def _load(modules: Sequence[str]) -> Any:
    for name in modules:
        with suppress(ImportError):  # Zstandard is a module of Python 3.14.
            return import_module(name)
    raise UsageError(f"Zstandard requires the package {modules[-1]}", hint='pip install "llmcli[zstd]"')


def find_codec(start: bytes) -> Any:
    """Return the module that decompresses a file that begins so, or None. Raises UsageError if it is not installed."""
    return next((_load(modules) for pattern, modules in CODECS.values() if re.match(pattern, start)), None)


def decompress(stream: Any, codec: Any) -> Iterator[bytes]:
    """Yield what a stream holds, in chunks. Raises RecordError if it is damaged."""
    try:
        with codec.open(stream) as file:
            yield from iter(partial(file.read1, CHUNK_BYTES), b"")
    except Exception as exc:  # Each module has exceptions of its own.
        if getattr(exc, "errno", None):
            raise
        raise RecordError("invalid_utf8", f"cannot decompress: {first_line(exc)}") from exc


def find_compressor(path: Path) -> Callable[[bytes], bytes] | None:
    """Return what compresses a file with this name, or None. Raises UsageError if it is not installed."""
    if path.suffix.lower() not in CODECS:
        return None
    compress: Callable[..., bytes] = _load(CODECS[path.suffix.lower()][1]).compress
    is_gzip = path.suffix.lower() == ".gz"  # whose level is 6 by default, except in Python
    return partial(compress, compresslevel=6, mtime=0) if is_gzip else compress


class MemberWriter:
    """A compressed file: members (frames, in Zstandard) that hold whole records, and that tools read as one text."""

    def __init__(self, file: BinaryIO, compress: Callable[[bytes], bytes]) -> None:
        self._file, self._compress = file, compress
        self.on_member: Callable[[int], None] = lambda size: None  # is called with its size before it is written
        self._pending: bytes | bytearray | None = None
        self._begin = 0.0  # when the first of the pending data was written

    def write(self, data: bytes) -> None:
        """Write a record."""
        age = time.monotonic() - self._begin
        if self._pending and (len(self._pending) > MEMBER_BYTES or age > MEMBER_INTERVAL_S):
            self._write_member()
        if self._pending is None:
            self._pending, self._begin = bytearray(), time.monotonic()
        self._pending += data

    def flush(self) -> None:
        """Do nothing: data is pending until its member is written."""

    def discard(self) -> None:
        """Forget the records that are pending."""
        self._pending = None

    def close(self) -> None:
        with self._file:
            if self._pending or (self._pending is not None and not self._file.tell()):  # An empty text is a member too.
                self._write_member()

    def _write_member(self) -> None:
        member, self._pending = self._compress(bytes(self._pending or b"")), None  # A full disk must not repeat it.
        self.on_member(len(member))
        self._file.write(member)
        self._file.flush()
