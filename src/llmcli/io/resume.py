"""--resume: an interrupted run goes on, by the log that lies beside its output in PATH.state.

A line of the log is a JSON object: first the job and the input, so that a change is refused; then, for each record in
its turn, where its result ends in the output, and whether it failed. What both files hold is done: what a crash, a
full disk or a power cut took from one of them is cut from the other, and run again. Results of records that are tried
again wait in the log until they can all take their places, in a copy that then becomes the output.
"""

import dataclasses
import hashlib
import json
import os
import time
import zlib
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmcli.errors import LlmcliError, UsageError
from llmcli.io.output import Output, OutputSpec, Sink
from llmcli.io.progress import Tally
from llmcli.job import Job, Record, Result

SYNC_EVERY = 1.0  # seconds of work that a power cut may take
PLACE_ONLY = ("batch_size", "concurrency", "keep_alive", "offline", "max_memory", "offload_folder")  # change no result


class Journal(AbstractContextManager["Journal"]):
    """What is known of a target's output.

    Raises UsageError where the output there is of another job or input, has no log, or is being written by another
    run; LlmcliError when the disk is full.
    """

    def __init__(self, target: OutputSpec, job: Job) -> None:
        assert target.path
        self.path = path = target.path
        self._state = path.with_name(f"{path.name}.state")
        self._new = path.resolve().with_name(f"{path.name}.state.new")
        self._retry = target.retry
        self._errors: dict[int, str] = {}  # by record, from 0: `failed`, or `passed` on as it came
        self._ends = array("Q")  # of each result in the output, in bytes
        self._header = 0  # bytes before the first
        self._checks = array("I")  # CRC of all input up to and with each record
        self._retried: dict[int, bytes] = {}
        self._whole: int | None = None
        self._taken: deque[tuple[int, int]] = deque()
        self._synced = time.monotonic()
        about = {"job": _identity(job), "form": target.format.value, "input": target.resume}
        is_begun = path.exists() and path.stat().st_size > 0
        if is_begun and not self._state.exists():
            raise UsageError(f"{path} exists, and has no {self._state}", hint="name another file, or remove it first")
        self._log = Sink(self._state, append=True)
        self._lock()
        if is_begun:
            self._go_on(about)
        else:
            self._new.unlink(missing_ok=True)
            os.truncate(self._state, 0)
            self._put(about)
            _sync(self._state)

    @property
    def done(self) -> int:
        """How many records have a result."""
        return len(self._ends)

    def tally(self) -> Tally:
        """What of it stays as it is."""
        written = sum(start < end for start, end in pairwise([self._header, *self._ends]))
        if self._retry:  # those that failed are yet to be counted, and have lines but in text mode
            return Tally(self.done - len(self._errors), written=max(0, written - len(self._errors)))
        failed = sum(error == "failed" for error in self._errors.values())
        return Tally(self.done, failed, len(self._errors) - failed, written)

    @property
    def _is_empty(self) -> bool:
        """Whether no result has left anything in the output."""
        return not self._ends or self._ends[-1] == 0

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self._whole == self.done and not (self._retry and self._errors)

    def remaining(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records that are to be run. Raises UsageError where those that are done were others."""
        done, again = self.done, set(self._errors) if self._retry else set()
        count = check = 0
        for number, record in enumerate(records):
            count = number + 1
            check = zlib.crc32(json.dumps(record.fields, sort_keys=True, default=str).encode(), check)
            if number < done and check != self._checks[number]:
                raise _changed(self.path, "the input")
            if number >= done or number in again:
                self._taken.append((number, check))
                yield record
        if count < done:
            raise _changed(self.path, "the input")

    def write(self, output: Output, result: Result) -> None:
        """The result of the next of the `remaining` records: to the output, or, of one that is tried again, to the
        log."""
        number, check = self._taken.popleft()
        error = "failed" if result.failure else "passed" if result.record.has_error else None
        if number < self.done:
            self._put({"retried": number, "line": output.line(result), "error": error})
        else:
            size = output.write(result)
            self._put({"record": number, "size": size, "end": output.end, "input": check, "error": error})
        if time.monotonic() - self._synced > SYNC_EVERY:
            self._sync()

    def mark_complete(self) -> None:
        """All records are done."""
        self._put({"whole": self.done})

    def __exit__(self, kind: type[BaseException] | None, *others: Any) -> None:
        """What was tried again takes its place in the output, which is closed; after an interruption, with the next
        run."""
        try:
            if kind is None and self._retried:
                self._merge()
            if kind is None:
                self._sync()
        finally:
            self._log.__exit__(kind, *others)

    def _lock(self) -> None:
        import fcntl  # on Unix only, unlike the rest

        try:
            fcntl.flock(self._log.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self.path} is being written by another run") from None
        except OSError:  # a file system without locks
            return

    def _go_on(self, about: dict[str, Any]) -> None:
        (first, *entries), end = _entries(self._state)
        for key, what in (("job", "the command"), ("form", "the format"), ("input", "the input")):
            if first.get(key) != about[key]:
                raise _changed(self.path, what)
        os.truncate(self._state, end)
        for entry in entries:
            self._apply(entry)
        if self._new.exists():
            if entries and "merged" in entries[-1]:
                self._replace()
            else:
                self._new.unlink()
        there = bisect_right(self._ends, self.path.stat().st_size)
        if there < self.done:
            self._put({"done": there})
        os.truncate(self.path, self._ends[-1] if self._ends else 0)
        if self._retried:
            self._merge()

    def _put(self, entry: dict[str, Any]) -> None:
        self._log.put(json.dumps(entry) + "\n")
        self._apply(entry)

    def _apply(self, entry: dict[str, Any]) -> None:
        """What the log says is so: the same when it is written as when it is read again."""
        match entry:
            case {"record": number, "size": size, "end": end, "input": check, "error": error}:
                if size and self._is_empty:
                    self._header = end - size
                self._ends.append(end)
                self._checks.append(check)
                self._note(number, error)
            case {"retried": number, "line": line, "error": error}:
                self._retried[number] = line.encode()
                self._note(number, error)
            case {"merged": _}:
                self._ends = self._merged_ends()
                self._retried = {}
            case {"done": count}:
                del self._ends[count:], self._checks[count:]
                self._errors = {number: error for number, error in self._errors.items() if number < count}
                self._retried = {number: line for number, line in self._retried.items() if number < count}
            case {"whole": count}:
                self._whole = count

    def _note(self, number: int, error: str | None) -> None:
        self._errors.pop(number, None)
        if error:
            self._errors[number] = error

    def _merge(self) -> None:
        """A crash leaves the old output and all of the log, or a new one that `_go_on` puts in its place."""
        try:
            with self.path.open("rb") as old, self._new.open("wb") as new:
                new.write(old.read(self._header))
                for number, end in enumerate(self._ends):
                    line = old.read(max(0, end - old.tell()))  # what was dropped before a header ends before it
                    new.write(self._retried.get(number, line))
            self._new.chmod(self.path.stat().st_mode)
        except OSError as exc:
            self._new.unlink(missing_ok=True)
            raise LlmcliError(f"cannot write to {self._new}: {exc.strerror}") from exc
        _sync(self._new)
        self._put({"merged": len(self._retried)})
        _sync(self._state)
        self._replace()

    def _merged_ends(self) -> "array[int]":
        ends, start, shift = array("Q"), self._header, 0
        for number, end in enumerate(self._ends):
            if number in self._retried:
                shift += len(self._retried[number]) - max(0, end - start)
            ends.append(end + shift)
            start = max(start, end)
        return ends

    def _replace(self) -> None:
        os.replace(self._new, self.path.resolve())
        with suppress(LlmcliError):  # not every file system can
            _sync(self._new.parent)

    def _sync(self) -> None:
        _sync(self.path)
        _sync(self._state)
        self._synced = time.monotonic()


def _entries(state: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a log as far as its lines are whole, and where these end. There is a first one."""
    entries: list[dict[str, Any]] = []
    end = 0
    with state.open("rb") as file, suppress(ValueError):
        for line in file:
            if not line.endswith(b"\n"):
                break
            entries.append(json.loads(line))
            end += len(line)
    return entries or [{}], end


def _sync(path: Path) -> None:
    """Onto the disk, lest a power cut takes it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        raise LlmcliError(f"cannot write to {path}: {exc.strerror}") from exc
    finally:
        os.close(descriptor)


def _identity(job: Job) -> dict[str, Any]:
    about = dataclasses.asdict(job)
    about["endpoint"] = bool(job.endpoint)  # a server may come back in another place
    about["load_options"] = {key: value for key, value in about["load_options"].items() if key not in PLACE_ONLY}
    kept: dict[str, Any] = json.loads(json.dumps({key: value for key, value in about.items() if key not in PLACE_ONLY}))
    return kept


def _changed(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{path} was begun with another job: {what} has changed", hint="name another --output, or remove that one"
    )


def fingerprint(texts: list[str], files: list[str]) -> str:
    """Of the input as far as it can be read twice: texts and regular files, by their content. What a pipe brings is
    checked as it comes."""
    digest = hashlib.sha256(json.dumps(texts).encode())
    for name in files or ["-"]:
        digest.update(name.encode("utf-8", "surrogateescape"))
        with suppress(OSError, ValueError):
            if name != "-":
                with open(name, "rb") as file:
                    _add_regular(digest, file.fileno())
            else:
                _add_regular(digest, 0)
    return digest.hexdigest()


def _add_regular(digest: Any, descriptor: int) -> None:
    """The content of a regular file, whose place stays where it is."""
    import stat

    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return
    at = 0
    while chunk := os.pread(descriptor, 1 << 20, at):
        digest.update(chunk)
        at += len(chunk)
