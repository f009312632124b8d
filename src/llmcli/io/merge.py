"""Put the outputs of shards (--shard) together, in the order of one run."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from io import BufferedReader, FileIO
from itertools import chain, count, takewhile
from pathlib import Path

from llmcli.errors import RecordError, UsageError, reason
from llmcli.io.compression import CODECS
from llmcli.io.decoding import open_text
from llmcli.io.output import OutputFormat
from llmcli.io.run_log import COMPLETE, ENTRY_BYTES, Entry, read_entries
from llmcli.job import JsonObject

BLOCK_BYTES = 1 << 16
BUFFER_BYTES = 1 << 14  # of each file: there may be many
SUFFIXES = {".csv": OutputFormat.CSV, ".jsonl": OutputFormat.JSON}


class Shard:
    """An output, and what the log beside it knows about its run."""

    def __init__(self, name: str, format: OutputFormat | None) -> None:
        self.name = name
        suffixes = [suffix.lower() for suffix in Path(name).suffixes if suffix.lower() not in CODECS]
        self.format = format or SUFFIXES.get("".join(suffixes[-1:]), OutputFormat.LINES)
        self.run: JsonObject = {}  # the job, the format and the input
        self.place: tuple[int, ...] = ()  # I and N of --shard
        self._entries: Iterator[Entry] = iter(())
        try:
            self._file = open_text(BufferedReader(FileIO(name), BUFFER_BYTES), "utf-8", name)
            if os.path.exists(f"{name}.state"):
                self._read_log(BufferedReader(FileIO(f"{name}.state"), BUFFER_BYTES))
            start = self._file.peek(4)
        except RecordError as exc:
            raise UsageError(f"{name}: {exc.message}", exc.hint) from exc
        except OSError as exc:
            raise UsageError(f"{exc.filename or name}: {reason(exc)}") from exc
        if start.startswith(b"PAR1"):
            raise UsageError(f"'{name}' is Parquet, which merge does not read", hint="run the shards with --json")
        self._parts = self._read()
        self.header = next(self._parts, b"") if self.format is OutputFormat.CSV else b""

    def _read_log(self, log: BufferedReader) -> None:
        start = len(line := log.readline())
        try:
            self.run = json.loads(line)
            self.format, self.place = OutputFormat(self.run["format"]), tuple(self.run["job"].pop("shard"))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UsageError(f"'{self.name}.state' is not the state of a run with --shard") from None
        log.seek(-ENTRY_BYTES, os.SEEK_END)
        if not any(entry.state == COMPLETE for entry in read_entries(log)):
            raise UsageError(f"'{self.name}' is not complete", hint="finish its run with --resume")
        log.seek(start)
        self._entries = takewhile(lambda entry: entry.state != COMPLETE, read_entries(log))

    def results(self) -> Iterator[bytes]:
        """Yield what was written of each record: nothing if a filter has dropped the result."""
        for entry in self._entries:
            result = next(self._parts, b"") if entry.size else b""
            if len(result) != entry.size:
                raise UsageError(f"'{self.name}' has changed since its run")
            yield result
        for result in self._parts:  # all, if there is no log
            if self.place:
                raise UsageError(f"'{self.name}' has changed since its run")
            yield result

    def _read(self) -> Iterator[bytes]:
        try:
            yield from self._split()
        except RecordError as exc:
            raise UsageError(f"{self.name}: {exc.message}", exc.hint) from exc

    def _split(self) -> Iterator[bytes]:
        """Yield lines, NUL-terminated strings, or rows of CSV, which can have line breaks."""
        lines, end = chain(self._file), b"\n"
        if self.format is OutputFormat.NULL:
            chunks = iter(partial(self._file.read, BUFFER_BYTES), b"")
            lines, end = chain.from_iterable(re.split(rb"(?<=\0)", chunk) for chunk in chunks), b"\0"
        parts, quotes = list[bytes](), 0  # of the next result
        for line in lines:
            parts.append(line)
            quotes += line.count(b'"') if self.format is OutputFormat.CSV else 0
            if line.endswith(end) and quotes % 2 == 0:
                if self.format is OutputFormat.JSON and not (line.startswith(b"{") and line.endswith(b"}\n")):
                    raise UsageError(f"'{self.name}' is not JSON Lines")
                yield b"".join(parts)
                parts.clear()
        if any(parts):
            raise UsageError(f"'{self.name}' ends in the middle of a result")


def merge_shards(names: Sequence[str], format: OutputFormat | None) -> Iterator[bytes]:
    """Yield blocks of what one run would have written: the results of all shards by turns."""
    if len(set(names)) < len(names):
        raise UsageError(f"'{max(names, key=names.count)}' is given twice")
    logs = {f"{name}.state" for name in names}  # which a pattern such as `out.*` may bring
    shards = [Shard(name, format) for name in names if name not in logs]
    if all(shard.place for shard in shards):
        shards.sort(key=lambda shard: shard.place)
    _check_fit(shards)
    block = bytearray(max(shard.header for shard in shards))  # An empty shard has none.
    results = [shard.results() for shard in shards]
    for number in count():
        ended = shards[number % len(shards)]
        if (result := next(results[number % len(shards)], None)) is None:
            break
        block += result
        if len(block) >= BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    for shard, rest in zip(shards, results, strict=True):
        if next(rest, None) is not None:
            message = f"a result is missing: '{ended.name}' ends before '{shard.name}'"
            raise UsageError(message, hint="pass the outputs of all shards, in order")
    yield bytes(block)


def _check_fit(shards: Sequence[Shard]) -> None:
    """Raise UsageError if the shards are not those of one run, in order, as far as it can be known."""
    first = shards[0]
    for number, shard in enumerate(shards):
        if shard.place and shard.place != (number, len(shards)):
            place = "/".join(map(str, shard.place))
            message = f"expected shard {number} of {len(shards)}, got '{shard.name}', which is shard {place}"
            raise UsageError(message, hint="pass the outputs of all shards, each once and in order")
        for trait in ("format", "header", "run"):
            expected, own = getattr(first, trait), getattr(shard, trait)
            if expected and own and expected != own:
                what = "outputs of different commands or inputs" if trait == "run" else f"of different {trait}s"
                raise UsageError(f"'{first.name}' and '{shard.name}' are {what}")
