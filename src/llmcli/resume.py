"""--resume: what an interrupted run has done, kept beside its output in PATH.state.

The output itself says how many records are done: it is cut after its last whole one. The state is a log, one JSON
object a line: first the job and the input, so that a change is refused; then the records that failed, checks of what
was read, and how it ended. A last line that is not whole is no line.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from llmcli.errors import ExitStatus, UsageError, reason
from llmcli.job import Job, Record

CHECK_EVERY = 1.0  # seconds
PLACE_ONLY = ("batch_size", "offline", "max_memory", "offload_folder")  # change no result


class Journal:
    """What is known of the output at `path`: `done` records, those of them that `failed`, and the `status` that the
    whole run ended with, if it did.

    Raises UsageError where the output there is of another job or input, or has no state.
    """

    def __init__(self, path: Path, job: Job, inputs: str, form: str) -> None:
        self.path, self._state = path, path.with_name(path.name + ".state")
        self.done = 0
        self.failed: set[int] = set()
        self.status: ExitStatus | None = None
        self._form = form
        self._hash = hashlib.sha256()
        self._checks: dict[int, str] = {}
        self._read = 0
        self._checked = time.monotonic()
        about = {"job": _identity(job), "form": form, "input": inputs}
        if path.exists():
            self._go_on(about)
        else:
            self._state.write_text(json.dumps(about) + "\n", encoding="utf-8")

    def remaining(self, records: Iterator[Record]) -> Iterator[Record]:
        """The records that are not done. Raises UsageError where those that are have changed."""
        for record in records:
            self._hash.update(json.dumps(record.fields, sort_keys=True, default=str).encode())
            self._read += 1
            known = self._checks.get(self._read)
            if known and known != self._hash.hexdigest():
                raise _changed(self.path, "the input")
            if self._read > self.done:
                self._note_check()
                yield record

    def note_failure(self, number: int) -> None:
        """Record `number`, from 0, failed."""
        self._append({"failed": number})

    def note_end(self, status: ExitStatus) -> None:
        """All records are done."""
        self._append({"status": int(status), "records": self._read, "check": self._hash.hexdigest()})

    def _go_on(self, about: dict[str, Any]) -> None:
        try:
            lines = self._state.read_bytes().splitlines(keepends=True)
        except OSError as problem:
            raise UsageError(
                f"{self.path} exists, and {self._state}: {reason(problem)}",
                hint="name another file, or remove it first",
            ) from problem
        entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
        for key, value in about.items():
            if not entries or entries[0].get(key) != value:
                what = {"job": "the command", "form": "the format", "input": "the input"}[key]
                raise _changed(self.path, what)
        for entry in entries[1:]:
            if "failed" in entry:
                self.failed.add(entry["failed"])
            if "status" in entry:
                self.status = ExitStatus(entry["status"])
            if "check" in entry:
                self._checks[entry["records"]] = entry["check"]
        with self.path.open("r+b") as output:
            self.done, end = whole_records(output, self._form)
            output.truncate(end)
        with self._state.open("r+b") as state:
            state.truncate(sum(len(line) for line in lines if line.endswith(b"\n")))
        self.failed = {number for number in self.failed if number < self.done}

    def _note_check(self) -> None:
        if time.monotonic() - self._checked > CHECK_EVERY:
            self._checked = time.monotonic()
            self._append({"records": self._read, "check": self._hash.hexdigest()})

    def _append(self, entry: dict[str, Any]) -> None:
        with suppress(OSError), self._state.open("ab") as state:  # the output is what counts
            state.write(json.dumps(entry).encode() + b"\n")


def whole_records(output: BinaryIO, form: str) -> tuple[int, int]:
    """How many records stand whole in an output of that form, and the byte where the last of them ends."""
    if form == "csv":
        return _whole_rows(output)
    end_mark = b"\0" if form == "null" else b"\n"
    count = end = 0
    size = 0
    while chunk := output.read(1 << 20):
        count += chunk.count(end_mark)
        if (last := chunk.rfind(end_mark)) >= 0:
            end = size + last + 1
        size += len(chunk)
    return count, end


def _whole_rows(output: BinaryIO) -> tuple[int, int]:
    """Rows without the header; a line end between quotes ends none."""
    count, end, quotes = -1, 0, 0
    at = 0
    for line in output:
        at += len(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0 and line.endswith(b"\n"):
            count, end = count + 1, at
    return max(count, 0), end


def _identity(job: Job) -> dict[str, Any]:
    about = dataclasses.asdict(job)
    about["placement"] = {key: value for key, value in about["placement"].items() if key not in PLACE_ONLY}
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
