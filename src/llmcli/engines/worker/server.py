"""The worker's side: a thread for each call, models that stay warm between them, and the end when nobody has called
for a while."""

import fcntl
import math
import os
import socketserver
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmcli import console
from llmcli.engines.batch_runner import BatchRunner
from llmcli.engines.local import LocalEngine
from llmcli.engines.model import Model
from llmcli.engines.worker import protocol
from llmcli.engines.worker.device_lock import DeviceLock, FairLock
from llmcli.engines.worker.model_cache import LRUModelCache, ModelLease
from llmcli.engines.worker.protocol import Connection, ConnectionClosedError, MessageTooLargeError, ProtocolError
from llmcli.errors import LlmcliError
from llmcli.job import Failure, Job, Record
from llmcli.models import malloc
from llmcli.tasks import Strategy

HELLO = 5.0  # seconds for a call to say what it wants
LARGEST_HELLO = 4096  # bytes of that
POLL = 0.5  # seconds between two looks at what is idle
PATIENCE = 5.0  # seconds for another worker to make place
CALLS = 1024  # that may wait to be let in


class JobCancelledError(BaseException):
    """The call has gone. Not an Exception: nothing may take it for a failed record."""


def serve(seconds: float | None) -> None:
    """Run jobs until nothing was asked for so long, and no model is warm; None: until a signal, or `llmcli stop`.

    Raises LlmcliError where a worker is running already, or the folder for its socket cannot be had.
    """
    _allow_many_connections()
    malloc.use_one_arena()  # only one thread computes at a time
    with Worker(math.inf if seconds is None else seconds) as worker:
        while not worker.is_over:
            worker.handle_request()


class Worker(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """The socket, and what all calls share. Only one at a time is where calls look for it: it holds a lock on a file
    beside the socket, which the system releases however it ends."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = CALLS
    timeout = POLL

    def __init__(self, seconds: float) -> None:
        self.environment = protocol.environment()
        self.models = LRUModelCache(seconds)
        self.baton = FairLock()
        self.jobs = 0
        self._seconds = seconds
        self._used = time.monotonic()
        self._changing = threading.RLock()
        self._is_stopped = False
        folder = protocol.folder(make=True)
        self._lock_file: int | None = _lock(folder / "worker.lock")
        self._path = folder / protocol.SOCKET
        self._path.unlink(missing_ok=True)  # a worker that was killed leaves it
        super().__init__(str(self._path), Call)

    def server_bind(self) -> None:
        super().server_bind()
        self._path.chmod(0o600)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Only who this process belongs to."""
        return protocol.peer(request) == os.getuid()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Into the log: what a call can be told, it has been told."""
        console.error(traceback.format_exc(limit=-3))

    def handle_request(self) -> None:
        """At most one call is let in; idle models go."""
        if self._lock_file is None:
            self.socket.close()  # who still waits at the door goes to another
            time.sleep(POLL)  # what runs, runs to its end
        else:
            super().handle_request()
        self.models.drop_expired()

    @property
    def is_over(self) -> bool:
        with self._changing:
            if self._is_stopped or (self._lock_file is None and not self.jobs):
                return True
            is_idle = not self.jobs and not len(self.models)
            if is_idle and time.monotonic() - self._used > self._seconds:
                self.retire()
                return True
            return False

    def begin_job(self) -> bool:
        """Whether one more may begin."""
        with self._changing:
            is_here = self._lock_file is not None
            self.jobs += is_here
            return is_here

    def end_job(self) -> None:
        with self._changing:
            self.jobs -= 1
            self._used = time.monotonic()

    def retire(self) -> None:
        """Make place for another worker: no new calls come in; those that run are served."""
        with self._changing:
            if self._lock_file is not None:
                self._path.unlink(missing_ok=True)
                os.close(self._lock_file)
                self._lock_file = None

    def stop(self) -> None:
        """End now."""
        self._is_stopped = True

    def status(self) -> dict[str, Any]:
        """What `llmcli ps` shows."""
        import psutil

        memory = psutil.Process().memory_info().rss
        return {"process": os.getpid(), "jobs": self.jobs, "memory": memory, "models": self.models.status()}

    def server_close(self) -> None:
        self.retire()
        super().server_close()


class Call(socketserver.BaseRequestHandler):
    """One connection, in a thread of its own."""

    server: Worker

    def handle(self) -> None:
        self.request.settimeout(HELLO)
        self.protocol = Connection(self.request)
        with closing(self.protocol), suppress(ConnectionClosedError, JobCancelledError):
            try:
                hello = self.protocol.receive(LARGEST_HELLO)
            except (ProtocolError, MessageTooLargeError) as exc:
                self.protocol.send(refused=exc.message)
            else:
                self._answer(hello)

    def _answer(self, hello: dict[str, Any]) -> None:
        match hello.get("do"):
            case "status":
                self.protocol.send(worker=os.getpid())
                self.protocol.send(status=self.server.status())
            case "stop":
                self.protocol.send(worker=os.getpid())
                self.server.stop()
                self.protocol.receive()  # it is told by the end of the connection, with that of the process
            case "run" | "load" as what:
                if hello.get("environment") != self.server.environment:
                    if hello.get("replace"):
                        self.server.retire()
                    self.protocol.send(refused="it is of another version, or another environment")
                elif not self.server.begin_job():
                    self.protocol.send(refused="it is about to end")
                else:
                    try:
                        self.protocol.send(worker=os.getpid())
                        first = self.protocol.receive()
                        self.request.settimeout(None)
                        self._run(first, loads=what == "load")
                    finally:
                        self.server.end_job()
            case _:
                self.protocol.send(refused="not understood")

    def _run(self, first: dict[str, Any], *, loads: bool) -> None:
        """The job that is in the first message, to its end."""
        turns, borrowed = DeviceLock(self.server.baton), ModelLease(self.server.models)

        def send(**message: Any) -> None:
            with turns.released():  # the call may be slow to read
                self.protocol.send(**message)

        job: Job | None = None
        try:
            job = Job.from_json(first["job"])
            engine = WarmEngine(self.protocol, turns, borrowed)
            on_text = (lambda text: send(text=text)) if first.get("streams") else None
            with console.relayed(lambda kind, message: send(**{kind: message})):
                if loads:
                    with turns:
                        engine.load(job)
                else:
                    with closing(engine.run(job, _records(self.protocol), on_text)) as results:
                        for result in results:
                            failure = result.failure and asdict(result.failure)
                            send(result=[dict(result.output), result.text, failure])
            send(done=True)
        except ConnectionClosedError:
            raise
        except LlmcliError as exc:
            about = {"message": exc.message, "hint": exc.hint, "status": exc.status}
            send(error=about | {"trace": traceback.format_exc()})
        except Exception as exc:
            about = {"unexpected": type(exc).__name__, "message": str(exc)}
            send(error=about | {"trace": traceback.format_exc()})
        finally:
            borrowed.give_back(job.keep_alive if job else None)


class WarmEngine(LocalEngine):
    """Runs a job in turns with others, on the models they share. Raises Cancelled, within a token, when its call has
    gone."""

    def __init__(self, connection: Connection, turns: DeviceLock, borrowed: ModelLease) -> None:
        super().__init__(borrowed)
        self.exclusive = self._turns = turns
        self._wire = connection

    def find_model(self, job: Job) -> Model:
        with self._turns.released():  # a download may take long
            return super().find_model(job)

    def make_runner(self, job: Job, strategy: Strategy, model: Model) -> BatchRunner:
        runner = super().make_runner(job, strategy, model)
        runner.on_token = self._between
        return runner

    def _between(self) -> None:
        if self._wire.is_gone:
            raise JobCancelledError
        self._turns.offer()


def _records(connection: Connection) -> Iterator[Record]:
    """As they come. Raises Cancelled where they end before their end."""
    while True:
        try:
            message = connection.receive()
        except ConnectionClosedError:
            raise JobCancelledError from None
        if "end" in message:
            return
        fields, failure = message["record"]
        yield Record(fields, failure=failure and Failure(**failure))


def _lock(path: Path) -> int:
    """An open file that is locked. Raises LlmcliError where another worker goes on holding it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise LlmcliError("a worker is running already", hint="`llmcli stop` ends it") from None
            time.sleep(POLL / 10)


def _allow_many_connections() -> None:
    """As many as the system lets this user have: silent ones must not keep others out."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most if most != resource.RLIM_INFINITY else 65536, most))
