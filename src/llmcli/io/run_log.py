"""The log of a run: a line of JSON that identifies the job and the input, then one entry of fixed size per record."""

import fcntl
import json
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llmcli.errors import LlmcliError, UsageError
from llmcli.io.output import Sink
from llmcli.job import JsonObject

ENTRY = struct.Struct("<QQIB")  # followed by its CRC-32
ENTRY_BYTES = ENTRY.size + 4
OK, FAILED, CARRIED_OVER, COMPLETE = range(4)  # states of a record; COMPLETE is the entry after the last record
SHARES_MEMBER = 0x80  # is added to the state in the file


class Entry(NamedTuple):
    """One record in the log."""

    end: int  # bytes of the output up to the end of the result
    size: int  # bytes of the result
    input_crc: int  # CRC-32 of all input up to this record
    state: int
    shares_member: bool = False  # whether the next result is in the same member of a compressed output


class RunLog:
    """An output and its log. The log is locked while it is open."""

    def __init__(self, path: Path, output: Path) -> None:
        self.path, self.output = path, output
        self.identity: JsonObject = {}
        self.is_complete = False
        self._entries = bytearray()
        self._sink = Sink(path, append=True)
        self._lock()
        self._read()

    def __len__(self) -> int:
        return len(self._entries) // ENTRY_BYTES

    def __getitem__(self, number: int) -> Entry:
        return _unpack(self._entries, number * ENTRY_BYTES)

    def __iter__(self) -> Iterator[Entry]:
        return map(self.__getitem__, range(len(self)))

    @property
    def end(self) -> int:
        """Bytes of the output that the log knows."""
        return self[len(self) - 1].end if len(self) else 0

    def begin(self, identity: JsonObject) -> None:
        os.truncate(self.path, 0)
        self._sink.write(json.dumps(identity) + "\n")
        sync(self.path)
        self._read()

    def _read(self) -> None:
        """Read the entries up to the first damaged one."""
        self._entries.clear()
        self.is_complete = False
        with self.path.open("rb") as file:
            identity = file.readline()
            self._identity_bytes = len(identity)
            with suppress(ValueError, RecursionError, TypeError):  # TypeError: it is not an object.
                self.identity = {**json.loads(identity)}
            for entry in read_entries(file):
                if entry.state == COMPLETE:
                    self.is_complete = True
                    break
                self._entries += _pack(entry)

    def cut(self) -> None:
        """Cut what only the log or only the output holds."""
        count = bisect_right(range(len(self)), self.output.stat().st_size, key=lambda number: self[number].end)
        while count and self[count - 1].shares_member:  # The log of its member has been cut.
            count -= 1
        self.is_complete = self.is_complete and count == len(self)
        del self._entries[count * ENTRY_BYTES :]
        os.truncate(self.path, self._identity_bytes + len(self._entries) + ENTRY_BYTES * self.is_complete)
        if self.end or not self.is_complete:  # A complete output without results can have a header.
            os.truncate(self.output, self.end)

    def append(self, entries: Iterable[Entry]) -> None:
        data = b"".join(map(_pack, entries))
        self._sink.write_bytes(data)
        self._entries += data

    def mark_complete(self) -> None:
        self._sink.write_bytes(_pack(Entry(self.end, 0, 0, COMPLETE)))
        self.is_complete = True

    def sync(self) -> None:
        sync(self.output)
        sync(self.path)

    def close(self) -> None:
        self._sink.__exit__(None)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._sink.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._sink.file.fileno()).st_ino != self.path.stat().st_ino:
                raise BlockingIOError  # Another run has just put a new log in its place.
        except BlockingIOError:
            raise UsageError(f"'{self.output}' is being written by another run") from None
        except OSError:
            pass  # The file system has no locks.


def read_entries(file: BinaryIO) -> Iterator[Entry]:
    """Yield the entries of a log, up to the first damaged one."""
    while (data := file.read(ENTRY_BYTES)) and data[ENTRY.size :] == _checksum(data[: ENTRY.size]):
        yield _unpack(data)


def sync(path: Path) -> None:
    """Write a file to the disk, so that a power cut cannot take it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        raise LlmcliError(f"cannot write to {path}: {exc.strerror}") from exc
    finally:
        os.close(descriptor)


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def _unpack(data: bytes | bytearray, start: int = 0) -> Entry:
    end, size, input_crc, state = ENTRY.unpack_from(data, start)
    return Entry(end, size, input_crc, state & ~SHARES_MEMBER, bool(state & SHARES_MEMBER))


def _pack(entry: Entry) -> bytes:
    data = ENTRY.pack(*entry[:3], entry.state | SHARES_MEMBER * entry.shares_member)
    return data + _checksum(data)
