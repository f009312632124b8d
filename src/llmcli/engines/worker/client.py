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

from llmcli import console
from llmcli.engines.engine import Engine
from llmcli.engines.job_run import OnResult
from llmcli.engines.requests import OnText
from llmcli.engines.worker import protocol
from llmcli.engines.worker.protocol import Connection, ConnectionClosedError, MessageTooLargeError
from llmcli.errors import ExitStatus, LlmcliError, ModelUnavailableError, reason
from llmcli.job import Failure, Job, Record, Result
from llmcli.models import registry
from llmcli.models.registry import FolderSource, GgufSource

ANSWER = 10.0  # seconds for the worker to answer a hello: where it does not, it is no use
START = 60.0  # seconds for a new one to be there
POLL = 0.02


class WorkerUnavailableError(LlmcliError):
    """There is none, or it will not do the job."""


class WorkerEngine:
    """Has the worker run a job; where none can be had, this process does. One is started only for a job that says how
    long its model is to be kept."""

    def __init__(self) -> None:
        self._here: Engine | None = None  # once it turns out that there is no worker to be had

    def run(
        self, job: Job, records: Iterable[Record], on_text: OnText | None = None, on_result: OnResult | None = None
    ) -> Iterator[Result]:
        """Results in the order of the records. Raises what the engine of this process would; LlmcliError where the
        worker ends before the work is done."""
        reached = self._reached("run", job)
        if isinstance(reached, Connection):
            return _Call(reached, job, on_text).run(records, on_result)
        return reached.run(job, records, on_text, on_result)

    def load(self, job: Job) -> None:
        """Have the job's model ready."""
        reached = self._reached("load", job)
        if isinstance(reached, Connection):
            list(_Call(reached, job, None).run((), None))
        else:
            reached.load(job)

    def _reached(self, what: str, job: Job) -> Connection | Engine:
        """A worker that waits for the job, or the engine of this process."""
        if self._here:
            return self._here
        try:
            return reach(what, job.keep_alive)
        except LlmcliError as exc:
            if console.verbose:
                console.notice(f"no worker: {exc.message}: this process runs the model")
        from llmcli.engines.local import LocalEngine

        self._here = LocalEngine()
        return self._here


class _Call:
    """One job in the worker."""

    def __init__(self, connection: Connection, job: Job, on_text: OnText | None) -> None:
        self._wire, self._on_text = connection, on_text
        self._sent: SimpleQueue[Record] = SimpleQueue()
        self._problem: BaseException | None = None  # of the records
        with suppress(ConnectionClosedError):  # who waits for the results will say so
            self._wire.send(job=asdict(_from_anywhere(job)), streams=on_text is not None)

    def run(self, records: Iterable[Record], on_result: OnResult | None) -> Iterator[Result]:
        threading.Thread(target=self._send, args=(records,), daemon=True).start()
        try:
            for output, text, failure in self._results():
                result = Result(self._sent.get(), output, text, failure and Failure(**failure))
                if on_result:
                    on_result(result)
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
                except ConnectionClosedError:
                    raise LlmcliError(
                        "the worker ended before the work was done", hint="run it again; --keep-alive 0 needs no worker"
                    ) from None
                match kind:
                    case "result":
                        yield said
                    case "text":
                        assert self._on_text
                        self._on_text(said)
                    case "note":
                        console.notice(said)
                    case "warning":
                        console.warning(said)
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
                except MessageTooLargeError as exc:
                    why = f"{exc.message}; --keep-alive 0 takes it"
                    self._wire.send(record=[{}, asdict(Failure("too_large", why))])
        except ConnectionClosedError:
            return
        except BaseException as caught:  # raised when the results of those before it are there
            self._problem = caught
        with suppress(ConnectionClosedError):
            self._wire.send(end=True)


def reach(what: str, seconds: float | None) -> Connection:
    """A worker that has agreed to do `what`. Where `seconds` says how long models are to stay warm, one is started if
    it is not there, and one of another environment makes place for it. Raises LlmcliError."""
    try:
        return greet(what, replace=seconds is not None)
    except WorkerUnavailableError:
        if seconds is None:
            raise
    process, deadline = _started(seconds), time.monotonic() + START
    with console.working("starting a worker"):
        while True:
            try:
                return greet(what, replace=True)
            except WorkerUnavailableError as exc:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise WorkerUnavailableError(_last_words() or exc.message) from exc
                time.sleep(POLL)


def greet(what: str, *, replace: bool = False) -> Connection:
    """The worker that is there, and is willing to do `what`; one of another environment may be told to make place for
    one that is. Raises NoWorkerError, and what `protocol.folder` raises."""
    try:
        address = protocol.folder() / protocol.SOCKET
    except ConnectionClosedError as exc:
        raise WorkerUnavailableError("none is running") from exc
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(ANSWER)
        connection.connect(str(address))
        if protocol.peer(connection) != os.getuid():
            raise WorkerUnavailableError("the one that is there is another user's")
        reached = Connection(connection)
        reached.send(do=what, environment=protocol.environment(), replace=replace)
        answer = reached.receive()
        if "worker" not in answer:
            raise WorkerUnavailableError(f"the one that is there refuses: {answer.get('refused')}")
    except (OSError, ConnectionClosedError) as exc:
        connection.close()
        raise WorkerUnavailableError("none is running") from exc
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
    with closing(reached), suppress(ConnectionClosedError):
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
    except OSError as exc:
        raise WorkerUnavailableError(f"{path}: {reason(exc)}") from exc


def _log() -> Path:
    return protocol.folder(make=True) / "worker.log"


def _last_words() -> str:
    lines = _log().read_text(errors="replace").splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""


def _from_anywhere(job: Job) -> Job:
    """The job, with whole paths in the place of those that begin in this process's folder."""
    load_options, model = job.load_options, job.model
    if load_options.offload_folder:
        load_options = replace(load_options, offload_folder=os.path.abspath(load_options.offload_folder))
    try:
        source = registry.resolve(job.model).source
    except ModelUnavailableError:  # for the worker to say
        source = None
    if isinstance(source, FolderSource | GgufSource):
        model = str(source.path)
    return replace(job, model=model, load_options=load_options)


def _raised(about: dict[str, Any]) -> Exception:
    """The error that the job ended with, as it would be here."""
    exc: Exception
    if name := about.get("unexpected"):
        exc = type(name, (Exception,), {})(about["message"])
    else:
        exc = LlmcliError(about["message"], about["hint"], ExitStatus(about["status"]))
    exc.add_note(f"in the worker:\n{about['trace']}")
    return exc
