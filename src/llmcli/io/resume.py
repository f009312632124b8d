"""Keep PATH.state, the log beside the output, and continue an interrupted run from it (--resume).

The log is a line of JSON that identifies the job and the input, then one entry of fixed size per record, in
input order. A result counts if both files hold it. If a crash, a full disk or a power cut took it from one file, it
is cut from the other, and the record runs again.

--retry-errors writes a new output and a new log. It copies the results that stay, and runs the other records again.
Then the new files replace the old ones. If the run is interrupted, the next one first completes the new files from the
old ones.
"""

import dataclasses
import hashlib
import json
import os
import stat
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from llmcli import console
from llmcli.errors import LlmcliError, UsageError
from llmcli.io.compression import MemberWriter, find_compressor
from llmcli.io.output import EXISTS_HINT, Output, OutputFormat, OutputSpec, Sink
from llmcli.io.progress import RunCounts
from llmcli.io.run_log import CARRIED_OVER, FAILED, OK, Entry, RunLog, sync
from llmcli.job import Job, JsonObject, Record, Result

SYNC_INTERVAL_S = 1.0  # work that a power cut may take
ENTRIES_PER_COPY = 1024
ENCODE = json.JSONEncoder(sort_keys=True, default=str).encode
RESUME_HINT = "to continue: rerun with --resume"
RESUME_IGNORED_FIELDS = ("batch_size", "concurrency", "keep_alive", "offline", "max_memory", "offload_folder",
                         "tensor_parallel")  # fmt: skip


class Journal(AbstractContextManager["Journal"]):
    """What a run knows about its output, the file `output`."""

    def __init__(self, spec: OutputSpec, job: Job) -> None:
        assert spec.path
        self.path = path = spec.path
        # A Parquet file is written at the end, from the results.
        self._results = results = Path(f"{path}.state.rows") if spec.table else path
        self._resumes, self._is_shard = spec.resume, bool(job.shard) and not spec.table
        self._state, self._new_state = Path(f"{path}.state"), Path(f"{path}.state.retry")
        self._new_output = path.resolve().parent / f"{path.name}.state.new"
        command = {**_identify(job), "rename": spec.rename, "select": spec.select}
        self._identity = {"job": command, "format": spec.format.value, "input": spec.fingerprint}
        self._crcs: deque[tuple[int, int]] = deque()  # numbers of the records that run, and their CRC
        self._pending: list[Entry] = []  # of results that wait for their member of a compressed output
        self._last_sync = time.monotonic()
        is_begun = spec.resume and any(file.exists() and file.stat().st_size > 0 for file in (path, results))
        if is_begun and (missing := [file for file in (self._state, results) if not file.exists()]):
            message = f"'{path}' exists but its state file '{missing[0]}' is missing"
            raise UsageError(message, hint="choose another path, or remove the file first")
        if not spec.resume and path.exists():
            raise UsageError(f"'{path}' already exists", EXISTS_HINT)
        with nullcontext() if spec.resume else Sink(results):  # refuses a file that exists
            # There are two logs if the results of one are copied to the other.
            self._log = self._done = RunLog(self._state, results)
            if "job" not in self._log.identity and (is_begun or self._state.stat().st_size):
                self._log.close()
                message = f"'{self._state}' exists and is not the state of a run, or is damaged"
                raise UsageError(message, hint="choose another --output, or remove the file")
        if is_begun:
            self._resume()
        else:
            self._discard_new()
            self._log.begin(self._identity)
        if spec.retry and any(entry.state != OK for entry in self._done):
            if find_compressor(path):
                has_errors = spec.format is OutputFormat.JSON and spec.select is None and not spec.rename
                hint = (
                    f"run them into a new file: -f '{path}' --retry-errors --output NEW"
                    if has_errors
                    else ("decompress the output, and start again with its new name as --output")
                )
                raise UsageError(f"--retry-errors cannot replace results in '{path}', which is compressed", hint)
            self._begin_retry()
        self.output = self._log.output

    def counts(self) -> RunCounts:
        counts = RunCounts()
        for entry in filter(self._stays, self._done):
            counts.records += 1
            counts.failed += entry.state == FAILED
            counts.carried_over += entry.state == CARRIED_OVER
            counts.written += entry.size > 0
        return counts

    @property
    def is_complete(self) -> bool:
        return self._log.is_complete and self.path.exists()

    def _stays(self, entry: Entry) -> bool:
        return entry.state == OK or self._done is self._log

    def remaining(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records that have to run; refuse others than those that are done."""
        done, count, crc = len(self._done), 0, 0
        for number, record in enumerate(records):
            count = number + 1
            crc = zlib.crc32(ENCODE(record.fields).encode(), crc)
            if number < done and crc != self._done[number].input_crc:
                raise _changed(self.path, "the input")
            if number >= done or not self._stays(self._done[number]):
                self._crcs.append((number, crc))
                yield record
        if count < done:
            raise _changed(self.path, "the input")

    def write(self, output: Output, result: Result, written: Sequence[Result]) -> None:
        """Write the result of the next of the `remaining` records: the parts `written`."""
        number, crc = self._crcs.popleft()
        self._copy_done(number)
        state = FAILED if result.failure else CARRIED_OVER if result.is_carried_over else OK
        try:
            size = sum(map(output.write, written))
            if isinstance(output.file, MemberWriter) and (size or self._pending):
                output.file.on_member = self._log_member
                self._pending.append(Entry(0, size, crc, state))
                return
        except BaseException:
            if isinstance(output.file, MemberWriter):
                output.file.discard()  # It may hold a result without its entry.
            raise
        end = self._log.end + size if self._log.end else self.output.stat().st_size  # with the header of CSV
        self._log.append([Entry(end, size, crc, state)])
        if time.monotonic() - self._last_sync > SYNC_INTERVAL_S:
            self._log.sync()
            self._last_sync = time.monotonic()

    def mark_complete(self, write_table: Callable[[Path, RunLog], None] | None = None) -> None:
        self._copy_done()
        if write_table:
            write_table(self.path, self._log)
        self._log.mark_complete()

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        try:
            if exc is None and self._done is not self._log:
                self._replace_done()
            elif exc is None:
                self._log.sync()
            is_begun = self._results.stat().st_size > 0 and self._identity["input"]  # else the files are temporary
            if is_begun and isinstance(exc, LlmcliError) and not isinstance(exc, UsageError):
                exc.hint = "; ".join(filter(None, (exc.hint, RESUME_HINT)))
            elif is_begun and exc and not isinstance(exc, UsageError):
                console.print_line(f"hint: {RESUME_HINT}")
            keeps_state = self._resumes or (self._is_shard and self.is_complete)  # which `llmcli merge` reads
            if not keeps_state and (self.is_complete or not is_begun):
                self._state.unlink()
                if self._results is not self.path or (exc and not self.is_complete):
                    self._results.unlink()
        finally:
            self._log.close()
            self._done.close()

    def _log_member(self, size: int) -> None:
        """Log the results of the next member of a compressed output, which is then written."""
        end, last = self._log.end + size, len(self._pending) - 1
        self._log.append([entry._replace(end=end, shares_member=i < last) for i, entry in enumerate(self._pending)])
        self._pending.clear()
        self._log.sync()  # If a crash takes the member, `cut` takes all its entries, which have the same end.

    def _resume(self) -> None:
        if self._new_state.exists() and not self._new_output.exists():  # Interrupted between the two replacements.
            self._log.close()
            os.replace(self._new_state, self._state)
            self._log = self._done = RunLog(self._state, self._results)
        for key, name in (("job", "the command"), ("format", "the format"), ("input", "the input")):
            if self._log.identity.get(key) != self._identity[key]:
                raise _changed(self.path, name)
        self._log.cut()
        if self._new_state.exists():
            self._log = RunLog(self._new_state, self._new_output)
            self._log.cut()
            if len(self._log):
                if self._results is not self.path:  # The table may lack the new results.
                    self.path.unlink(missing_ok=True)
                self._replace_done()
                self._log, self._done = self._done, self._log
            self._log.close()
            self._log = self._done
        self._discard_new()

    def _discard_new(self) -> None:
        self._new_state.unlink(missing_ok=True)  # first: without its output, it would replace the old one
        self._new_output.unlink(missing_ok=True)

    def _begin_retry(self) -> None:
        self._new_output.touch()
        self._log = RunLog(self._new_state, self._new_output)
        self._log.begin(self._identity)
        first = next((entry for entry in self._done if entry.size), None)
        header = first.end - first.size if first else self._done.end
        with self._results.open("rb") as old, Sink(self._new_output, append=True) as new:
            new.write_bytes(old.read(header))

    def _copy_done(self, until: int | None = None) -> None:
        """Copy the results up to record `until` that the new output does not have yet."""
        until = len(self._done) if until is None else min(until, len(self._done))
        if len(self._log) >= until:
            return
        with self._done.output.open("rb") as old, Sink(self._log.output, append=True) as new:
            end = self._log.output.stat().st_size
            for start in range(len(self._log), until, ENTRIES_PER_COPY):
                copied, data = [], bytearray()
                for number in range(start, min(start + ENTRIES_PER_COPY, until)):
                    entry = self._done[number]
                    old.seek(entry.end - entry.size)
                    data += old.read(entry.size)
                    copied.append(entry._replace(end=end + len(data)))
                end += new.write_bytes(bytes(data))
                self._log.append(copied)

    def _replace_done(self) -> None:
        """Complete the new output and its log, and put them in the place of the old ones."""
        self._copy_done()
        if self._done.is_complete and not self._log.is_complete:
            self._log.mark_complete()
        self._new_output.chmod(self._results.stat().st_mode)
        self._log.sync()
        # In this order: a log without an output beside it is the one of an output that is in its place.
        for new, old in ((self._new_output, self._results.resolve()), (self._new_state, self._state)):
            os.replace(new, old)
            with suppress(LlmcliError):  # Not every file system can.
                sync(old.parent)
        self._log.path, self._log.output = self._state, self._results


def fingerprint(texts: Sequence[str], files: Sequence[str]) -> str:
    """Return a fingerprint of the texts and the regular files; `Journal.remaining` checks what is piped."""
    digest = hashlib.sha256(json.dumps(list(texts)).encode())
    for name in files or ["-"]:
        digest.update(name.encode("utf-8", "surrogateescape"))
        place = 0 if name == "-" else name
        with suppress(OSError, ValueError):
            if stat.S_ISREG(os.stat(place).st_mode):  # The writer of a FIFO must not see it opened and closed.
                with open(place, "rb", buffering=0, closefd=name != "-") as file:
                    position = file.tell()
                    digest.update(hashlib.file_digest(file, "sha256").digest())
                    file.seek(position)  # Records are read from here if it is stdin.
    return digest.hexdigest()


def _identify(job: Job) -> JsonObject:
    fields = dataclasses.asdict(job)
    fields["endpoint"] = bool(job.endpoint)  # A server may come back under another URL.
    fields["load_options"]["device"] = job.load_options.device.partition(":")[0]  # or another GPU of this kind
    for table in (fields, fields["load_options"]):
        for name in RESUME_IGNORED_FIELDS:
            table.pop(name, None)
    identity: JsonObject = json.loads(json.dumps(fields))
    return identity


def _changed(path: Path, name: str) -> UsageError:
    message = f"cannot resume '{path}': {name} has changed since it was started"
    return UsageError(message, hint="choose another --output, or remove the file")
