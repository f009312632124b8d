"""A call's side of the worker: reaches it, starts one, and gives it a job. Imports nothing heavy."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from llmcli import console, registry
from llmcli.engines.engine import Engine, OnDone
from llmcli.engines.request import OnText
from llmcli.engines.worker import wire
from llmcli.engines.worker.wire import GoneError, TooLargeError, Wire
from llmcli.errors import ExitStatus, LlmcliError, ModelUnavailable, reason
from llmcli.job import Failure, Job, Record, Result
from llmcli.registry import FolderSource, GgufSource

ANSWER = 10.0  # seconds for the worker to answer a hello: where it does not, it is no use
START = 60.0  # seconds for a new one to be there
POLL = 0.02


class NoWorkerError(LlmcliError):
    """There is none, or it will not do the job."""


class WorkerEngine:
    """Has the worker run a job; where none can be had, this process does. One is started only for a job that says how
    long its model is to be kept."""

    def __init__(self) -> None:
        self._here: Engine | None = None  # once it turns out that there is no worker to be had

    def run(
        self, job: Job, records: Iterable[Record], on_text: OnText | None = None, on_done: OnDone | None = None
    ) -> Iterator[Result]:
        """Results in the order of the records. Raises what the engine of this process would; LlmcliError where the
        worker ends before the work is done."""
        reached = self._reached("run", job)
        if isinstance(reached, Wire):
            return _Call(reached, job, on_text).run(records, on_done)
        return reached.run(job, records, on_text, on_done)

    def load(self, job: Job) -> None:
        """Have the job's model ready."""
        reached = self._reached("load", job)
        if isinstance(reached, Wire):
            list(_Call(reached, job, None).run((), None))
        else:
            reached.load(job)

    def _reached(self, what: str, job: Job) -> Wire | Engine:
        """A worker that waits for the job, or the engine of this process."""
        if self._here:
            return self._here
        try:
            return reach(what, job.keep_alive)
        except LlmcliError as problem:
            if console.verbose:
                console.notice(f"no worker: {problem.message}: this process runs the model")
        from llmcli.engines.local import LocalEngine

        self._here = LocalEngine()
        return self._here


class _Call:
    """One job in the worker."""

    def __init__(self, connection: Wire, job: Job, on_text: OnText | None) -> None:
        self._wire, self._on_text = connection, on_text
        self._sent: SimpleQueue[Record] = SimpleQueue()
        self._problem: BaseException | None = None  # of the records
        with suppress(GoneError):  # who waits for the results will say so
            self._wire.send(job=asdict(_from_anywhere(job)), streams=on_text is not None)

    def run(self, records: Iterable[Record], on_done: OnDone | None) -> Iterator[Result]:
        threading.Thread(target=self._send, args=(records,), daemon=True).start()
        try:
            for output, text, failure in self._results():
                result = Result(self._sent.get(), output, text, failure and Failure(**failure))
                if on_done:
                    on_done(result)
                yield result
        finally:
            self._wire.close()  # a job that is not done ends there too
        if self._problem:
            raise self._problem

    def _results(self) -> Iterator[list[Any]]:
        """What is in the messages for each record; the rest of what they say goes where it belongs."""
        with ExitStack() as shown:
            while True:
                try:
                    ((kind, said),) = self._wire.receive().items()
                except GoneError:
                    raise LlmcliError(
                        "the worker ended before the work was done", hint="run it again; --keep-alive 0 needs no worker"
                    ) from None
                match kind:
                    case "result":
                        yield said
                    case "text":
                        assert self._on_text
                        self._on_text(said)
                    case "notice":
                        console.notice(said)
                    case "working":
                        shown.close()
                        if said:
                            shown.enter_context(console.working(said))
                    case "error":
                        raise _raised(said)
                    case "done":
                        return

    def _send(self, records: Iterable[Record]) -> None:
        try:
            for record in records:
                self._sent.put(record)
                try:
                    self._wire.send(record=[dict(record.fields), record.failure and asdict(record.failure)])
                except TooLargeError as problem:
                    why = f"{problem.message}; --keep-alive 0 takes it"
                    self._wire.send(record=[{}, asdict(Failure("too_large", why))])
        except GoneError:
            return
        except BaseException as caught:  # raised when the results of those before it are there
            self._problem = caught
        with suppress(GoneError):
            self._wire.send(end=True)


def reach(what: str, seconds: float | None) -> Wire:
    """A worker that has agreed to do `what`. Where `seconds` says how long models are to stay warm, one is started if
    it is not there, and one of another environment makes place for it. Raises LlmcliError."""
    try:
        return greet(what, replace=seconds is not None)
    except NoWorkerError:
        if seconds is None:
            raise
    process, deadline = _started(seconds), time.monotonic() + START
    with console.working("starting a worker"):
        while True:
            try:
                return greet(what, replace=True)
            except NoWorkerError as problem:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise NoWorkerError(_last_words() or problem.message) from problem
                time.sleep(POLL)


def greet(what: str, *, replace: bool = False) -> Wire:
    """The worker that is there, and is willing to do `what`; one of another environment may be told to make place for
    one that is. Raises NoWorkerError, and what `wire.folder` raises."""
    try:
        address = wire.folder() / wire.SOCKET
    except GoneError as problem:
        raise NoWorkerError("none is running") from problem
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(ANSWER)
        connection.connect(str(address))
        if wire.peer(connection) != os.getuid():
            raise NoWorkerError("the one that is there is another user's")
        reached = Wire(connection)
        reached.send(do=what, environment=wire.environment(), replace=replace)
        answer = reached.receive()
        if "worker" not in answer:
            raise NoWorkerError(f"the one that is there refuses: {answer.get('refused')}")
    except (OSError, GoneError) as problem:
        connection.close()
        raise NoWorkerError("none is running") from problem
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return reached


def status() -> dict[str, Any]:
    """The worker's process, jobs, bytes of main memory and models. Raises NoWorkerError."""
    found: dict[str, Any] = _asked("status")["status"]
    return found


def stop() -> None:
    """Ask the worker to end, and wait until it has. Raises NoWorkerError."""
    _asked("stop")


def _asked(what: str) -> dict[str, Any]:
    """The worker's last word, before it hangs up."""
    reached, said = greet(what), dict[str, Any]()
    with closing(reached), suppress(GoneError):
        while True:
            said = reached.receive()
    return said


def _started(seconds: float) -> Any:
    """A new worker, which has nothing of this process: not its terminal, not its streams, not its folder."""
    import subprocess

    command = [sys.executable, "-P", "-m", "llmcli", "serve", "--keep-alive", f"{seconds}s"]
    path = _log()
    try:
        with path.open("wb") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True
            )
    except OSError as problem:
        raise NoWorkerError(f"{path}: {reason(problem)}") from problem


def _log() -> Path:
    return wire.folder(make=True) / "worker.log"


def _last_words() -> str:
    lines = _log().read_text(errors="replace").splitlines()
    return lines[-1].removeprefix("llmcli: ") if lines else ""


def _from_anywhere(job: Job) -> Job:
    """The job, with whole paths in the place of those that begin in this process's folder."""
    placement, model = job.placement, job.model
    if placement.offload_folder:
        placement = replace(placement, offload_folder=os.path.abspath(placement.offload_folder))
    try:
        source = registry.resolve(job.model).source
    except ModelUnavailable:  # for the worker to say
        source = None
    if isinstance(source, FolderSource | GgufSource):
        model = str(source.path)
    return replace(job, model=model, placement=placement)


def _raised(about: dict[str, Any]) -> Exception:
    """The error that the job ended with, as it would be here."""
    problem: Exception
    if name := about.get("unexpected"):
        problem = type(name, (Exception,), {})(about["message"])
    else:
        problem = LlmcliError(about["message"], about["hint"], ExitStatus(about["status"]))
    problem.add_note(f"in the worker:\n{about['trace']}")
    return problem
