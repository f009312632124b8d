"""A call's side of the worker: connects, starts a worker, sends a job. Imports nothing heavy."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from llmcli import console
from llmcli.engines.engine import Engine, OnResult
from llmcli.engines.requests import OnText
from llmcli.engines.worker import protocol
from llmcli.engines.worker.protocol import Connection, ConnectionClosedError, MessageTooLargeError
from llmcli.errors import ExitStatus, LlmcliError, ModelUnavailableError, reason
from llmcli.job import Failure, Job, JsonObject, Record, Result
from llmcli.models import registry

HANDSHAKE_TIMEOUT_S = 10.0  # a worker that takes longer to answer is not used
START_TIMEOUT_S = 60.0
POLL_S = 0.02
MIN_KEEP_ALIVE_S = 1.0  # a worker that exited sooner would not meet the call that started it


class WorkerUnavailableError(LlmcliError):
    """The worker refuses the job, or cannot be started."""


class WorkerEngine:
    """Runs jobs in the worker, or in this process if the worker is not available."""

    def __init__(self) -> None:
        self._local: Engine | None = None  # once the worker was not available

    def run(
        self, job: Job, records: Iterable[Record], on_text: OnText | None = None, on_result: OnResult | None = None
    ) -> Iterator[Result]:
        yield from self._choose("run", job).run(job, records, on_text, on_result)

    def load(self, job: Job) -> None:
        self._choose("load", job).load(job)

    def _choose(self, action: str, job: Job) -> Engine:
        if self._local is None:
            try:
                if connection := connect_or_start(action, job.keep_alive):
                    return ConnectedEngine(connection)
                why = "no worker is running"
            except LlmcliError as exc:
                why = exc.message
            if console.verbose:
                console.notice(f"{why}; this process runs the model")
            from llmcli.engines.local import LocalEngine

            self._local = LocalEngine()
        return self._local


class ConnectedEngine:
    """Runs one job through a connection to the worker."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sent: SimpleQueue[Record] = SimpleQueue()
        self._input_error: BaseException | None = None

    def load(self, job: Job) -> None:
        list(self.run(job, ()))

    def run(
        self, job: Job, records: Iterable[Record], on_text: OnText | None = None, on_result: OnResult | None = None
    ) -> Iterator[Result]:
        """Yield results in the order of the records. The job is canceled if the iterator is closed."""
        try:
            try:
                with suppress(ConnectionClosedError):  # _receive raises the error
                    self._connection.send(job=_with_absolute_paths(job), streams=on_text is not None)
            except MessageTooLargeError as exc:  # The documents of qa are in the job.
                yield from (Result(record, failure=Failure.from_error(exc)) for record in records)
                return
            threading.Thread(target=self._send, args=(records,), daemon=True).start()
            for output, text, failure in self._receive(on_text):
                result = Result(self._sent.get(), output, text, Failure(**failure) if failure else None)
                if on_result:
                    on_result(result)
                yield result
        finally:
            self._connection.close()
        if self._input_error:
            raise self._input_error

    def _receive(self, on_text: OnText | None) -> Iterator[Any]:
        with ExitStack() as shown:
            while True:
                try:
                    ((kind, value),) = self._connection.receive().items()
                except ConnectionClosedError:
                    hint = "run the command again, or pass --keep-alive 0"
                    raise LlmcliError("worker exited unexpectedly", hint) from None
                match kind:
                    case "result":
                        yield value
                    case "text":
                        assert on_text
                        on_text(value)
                    case "note" | "warning":
                        console.notice(value, kind)
                    case "thought":
                        console.show_thought(value)
                    case "working":
                        shown.close()
                        if value:
                            shown.enter_context(console.working(value))
                    case "error":  # raised as this process would have raised it
                        class_name, message, hint, status, trace = value
                        error: Exception = LlmcliError(message, hint, ExitStatus(status))
                        if class_name:
                            error = type(class_name, (Exception,), {})(message)
                        error.add_note(f"in the worker:\n{trace}")
                        raise error
                    case "done":
                        return

    def _send(self, records: Iterable[Record]) -> None:
        try:
            for record in records:
                self._sent.put(record)
                try:
                    self._connection.send(record=(dict(record.fields), record.failure, record.is_row))
                except MessageTooLargeError as exc:
                    self._connection.send(record=({}, Failure.from_error(exc), False))
        except ConnectionClosedError:
            return
        except BaseException as exc:  # raised after the results of the records before it
            self._input_error = exc
        with suppress(ConnectionClosedError):
            self._connection.send(end=True)


def connect_or_start(action: str, keep_alive_s: float | None) -> Connection | None:
    """Return a connection as `connect` does. If `keep_alive_s` is given, a worker is started if needed; it replaces one
    of another environment. Raises LlmcliError if the worker refuses or cannot be started."""
    if keep_alive_s is None:
        return connect(action)
    with suppress(WorkerUnavailableError):  # It makes way for the one that is started here.
        if connection := connect(action, replace=True):
            return connection
    return _start(action, keep_alive_s)


def connect(action: str, *, replace: bool = False) -> Connection | None:
    """Return a connection to the worker, which has agreed to an action, or None if none is running.

    Raises WorkerUnavailableError if the worker refuses; if `replace`, one of another environment then makes way.
    """
    if not protocol.has_socket():
        return None
    address = protocol.runtime_dir() / protocol.SOCKET_NAME
    with ExitStack() as on_failure:
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        on_failure.callback(end.close)
        try:
            end.settimeout(HANDSHAKE_TIMEOUT_S)
            end.connect(str(address))
            if protocol.peer_uid(end) != os.getuid():
                raise WorkerUnavailableError("the worker belongs to another user")
            connection = Connection(end)
            connection.send(do=action, environment=protocol.environment_fingerprint(), replace=replace)
            answer = connection.receive()
        except (OSError, ConnectionClosedError):
            return None
        if "worker" not in answer:
            raise WorkerUnavailableError(f"the worker refuses: {answer.get('refused')}")
        end.settimeout(None)
        on_failure.pop_all()
        return connection


def status() -> JsonObject | None:
    """Return the worker's process ID, jobs, main memory and models, or None if none is running."""
    answer = _ask("status")
    return answer and answer["status"]


def stop() -> bool:
    """Stop the worker, wait until it has exited, and return whether one was running."""
    return _ask("stop") is not None


def _ask(action: str) -> JsonObject | None:
    """Return the last message of the worker before it closes the connection."""
    if not (connection := connect(action)):
        return None
    answer: JsonObject = {}
    with closing(connection), suppress(ConnectionClosedError):
        while True:
            answer = connection.receive()
    return answer


def _start(action: str, keep_alive_s: float) -> Connection:
    """Start a worker, and connect to it. The worker has none of this process's terminal, streams and directory."""
    from subprocess import DEVNULL, Popen

    path = protocol.runtime_dir() / "worker.log"
    keep_alive = f"{max(keep_alive_s, MIN_KEEP_ALIVE_S):f}s"
    command = [sys.executable, "-P", "-m", "llmcli", "serve", "--keep-alive", keep_alive]
    try:
        with path.open("wb") as log:
            process = Popen(command, stdin=DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True)
    except OSError as exc:
        raise WorkerUnavailableError(f"{path}: {reason(exc)}") from exc
    deadline, why = time.monotonic() + START_TIMEOUT_S, "it did not start in time"
    with console.working("starting a worker"):
        while True:
            try:
                if connection := connect(action, replace=True):
                    return connection
            except WorkerUnavailableError as exc:
                why = exc.message
            if process.poll() is not None or time.monotonic() > deadline:
                lines = path.read_text(errors="replace").splitlines()
                errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
                raise WorkerUnavailableError([why, *lines[-1:], *errors][-1])
            time.sleep(POLL_S)


def _with_absolute_paths(job: Job) -> Job:
    """Return the job with absolute paths, as the worker has another working directory."""
    load_options, model, adapter = job.load_options, job.model, job.adapter
    if load_options.offload_folder:
        load_options = replace(load_options, offload_folder=os.path.abspath(load_options.offload_folder))
    with suppress(ModelUnavailableError):  # The worker raises the error.
        spec = registry.resolve(job.model)
        if isinstance(spec.source, registry.FolderSource | registry.GgufSource):
            model = str(spec.source.path)
        if merged := spec.adapter if adapter is None else registry.resolve_adapter(adapter):
            adapter = merged.name
    return replace(job, model=model, adapter=adapter, load_options=load_options)
