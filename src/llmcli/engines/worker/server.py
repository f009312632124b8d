"""The worker's side: a thread for each call, models that stay loaded between calls, and exit after an idle time."""

import math
import os
import resource
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import psutil
from filelock import FileLock, Timeout

from llmcli import console
from llmcli.engines.batch_runner import BatchRunner
from llmcli.engines.local import LocalEngine, Model
from llmcli.engines.model_cache import ModelCache, ModelLease
from llmcli.engines.worker import protocol
from llmcli.engines.worker.device_lock import DeviceLock, FairLock
from llmcli.engines.worker.protocol import Connection, ConnectionClosedError, MessageTooLargeError
from llmcli.errors import DeviceError, ExitStatus, LlmcliError
from llmcli.job import Failure, Job, JsonObject, Record
from llmcli.models.devices import device_error
from llmcli.models.memory import use_one_arena
from llmcli.tasks import Strategy

HANDSHAKE_TIMEOUT_S = 5.0  # for a call to say what it wants
MAX_HANDSHAKE_BYTES = 4096
POLL_S = 0.5  # between two looks at what is idle
LOCK_TIMEOUT_S = 5.0  # for another worker to make way


class JobCancelledError(BaseException):
    """The call has closed its connection. Not an Exception: nothing may take it for a failed record."""


def serve(keep_alive_s: float | None) -> None:
    """Run jobs until a signal, `llmcli stop`, or that many seconds without a job and without a loaded model."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # Idle connections must not keep others out.
        resource.setrlimit(resource.RLIMIT_NOFILE, (65536 if limit == resource.RLIM_INFINITY else limit, limit))
    use_one_arena()  # One thread computes at a time.
    with Worker(math.inf if keep_alive_s is None else keep_alive_s) as worker:
        while not worker.is_finished:
            worker.handle_request()
    if worker.is_broken:
        console.warning("device failed; restarting")
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # A device that stays open may keep this process's memory.
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Worker(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """The socket, and what all calls share. One worker at a time holds the lock on a file beside the socket."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024
    timeout = POLL_S

    def __init__(self, keep_alive_s: float) -> None:
        self.environment = protocol.environment_fingerprint()
        self.models = ModelCache(keep_alive_s)
        self.device_lock = FairLock()
        self.jobs = 0
        self.is_broken = False
        self._keep_alive_s = keep_alive_s
        self._last_used = time.monotonic()
        self._state_lock = threading.RLock()
        self._is_stopped = False
        directory = protocol.runtime_dir()
        # Any thread may release the lock: the one that drains this worker.
        self._lock = FileLock(directory / "worker.lock", LOCK_TIMEOUT_S, mode=0o600, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise LlmcliError("a worker is already running", hint="run `llmcli stop` to stop it") from None
        self._path = directory / protocol.SOCKET_NAME
        self._path.unlink(missing_ok=True)  # A worker that was killed leaves it.
        super().__init__(str(self._path), ClientHandler)

    def server_bind(self) -> None:
        super().server_bind()
        self._path.chmod(0o600)

    def verify_request(self, request: Any, client_address: object) -> bool:
        return protocol.peer_uid(request) == os.getuid()

    def handle_error(self, request: object, client_address: object) -> None:
        console.error(traceback.format_exc(limit=-3))

    def handle_request(self) -> None:
        """Accept at most one call, and unload models that have expired."""
        if not self._lock.is_locked:
            self.socket.close()  # Calls that wait to be accepted go to another worker.
            time.sleep(POLL_S)
        else:
            super().handle_request()
        self.models.evict_expired()

    @property
    def is_finished(self) -> bool:
        with self._state_lock:
            if self._is_stopped or not (self._lock.is_locked or self.jobs):
                return True
            is_idle = not self.jobs and not len(self.models)
            if is_idle and time.monotonic() - self._last_used > self._keep_alive_s:
                self.drain()
                return True
            return False

    def begin_job(self) -> bool:
        with self._state_lock:
            self.jobs += self._lock.is_locked
            return self._lock.is_locked

    def end_job(self) -> None:
        with self._state_lock:
            self.jobs -= 1
            self._last_used = time.monotonic()

    def drain(self) -> None:
        """Make way for another worker: accept no more calls, and finish the jobs that run."""
        with self._state_lock:
            if self._lock.is_locked:
                self._path.unlink(missing_ok=True)
                self._lock.release()

    def stop(self) -> None:
        self._is_stopped, self.is_broken = True, False

    def server_close(self) -> None:
        self.drain()
        super().server_close()


class ClientHandler(socketserver.BaseRequestHandler):
    """One connection, in its own thread."""

    server: Worker

    def handle(self) -> None:
        self.request.settimeout(HANDSHAKE_TIMEOUT_S)
        self._connection = Connection(self.request)
        with closing(self._connection), suppress(ConnectionClosedError, JobCancelledError):
            try:
                hello = self._connection.receive(MAX_HANDSHAKE_BYTES)
            except (protocol.ProtocolError, MessageTooLargeError) as exc:
                self._connection.send(refused=exc.message)
            else:
                self._answer(hello)

    def _answer(self, hello: JsonObject) -> None:
        send = self._connection.send
        match hello.get("do"):
            case "status":
                memory, models = psutil.Process().memory_info().rss, self.server.models.status()
                send(worker=os.getpid())
                send(status={"pid": os.getpid(), "jobs": self.server.jobs, "memory": memory, "models": models})
            case "stop":
                send(worker=os.getpid())
                self.server.stop()
                self._connection.receive()  # The connection ends with this process, which tells the call.
            case "run" | "load" as action:
                if hello.get("environment") != self.server.environment:
                    if hello.get("replace"):
                        self.server.drain()
                    send(refused="it has another version or environment")
                elif not self.server.begin_job():
                    send(refused="it is about to exit")
                else:
                    try:
                        send(worker=os.getpid())
                        first = self._connection.receive()
                        self.request.settimeout(None)
                        self._run(first, loads=action == "load")
                    finally:
                        self.server.end_job()
            case _:
                send(refused="unknown action")

    def _run(self, first: JsonObject, *, loads: bool) -> None:
        device_lock = DeviceLock(self.server.device_lock)
        lease = ModelLease(self.server.models, device_lock.unlocked)

        def send(**message: object) -> None:
            with device_lock.unlocked():  # The call may be slow to read.
                try:
                    self._connection.send(**message)
                except ConnectionClosedError:
                    raise JobCancelledError from None

        job: Job | None = None
        is_broken = False
        try:
            job = Job.from_json(first["job"])
            engine = WarmEngine(self._connection, device_lock, lease)
            on_text = (lambda text: send(text=text)) if first.get("streams") else None
            with console.relayed(lambda kind, message: send(**{kind: message})):
                if loads:
                    with device_lock:
                        engine.load(job)
                else:
                    with closing(engine.run(job, _records(self._connection), on_text)) as results:
                        for result in results:
                            is_broken |= result.failure is not None and result.failure.type == "internal_error"
                            try:
                                send(result=(result.output, result.text, result.failure))
                            except MessageTooLargeError as exc:
                                send(result=({}, "", Failure.from_error(exc)))
            send(done=True)
        except Exception as exc:
            known = exc if isinstance(exc, LlmcliError) else device_error(exc)
            if isinstance(known, DeviceError):
                self.server.is_broken = True  # Only another process can use the device.
                self.server.drain()
            unknown = type(exc).__name__, str(exc), None, ExitStatus.FAILED
            error = (None, known.message, known.hint, known.status) if known else unknown
            send(error=(*error, traceback.format_exc()))
        finally:
            # A model that may be broken is loaded again by the next call.
            lease.release(0 if is_broken else job.keep_alive if job else None)
            self.server.models.evict_expired()


class WarmEngine(LocalEngine):
    """Runs a job beside others on the same device and models; it ends within a token once the call has hung up."""

    def __init__(self, connection: Connection, device_lock: DeviceLock, lease: ModelLease) -> None:
        super().__init__(lease)
        self.exclusive = self._device_lock = device_lock
        self._connection = connection

    def find_model(self, job: Job) -> Model:
        with self._device_lock.unlocked():  # A download may take long.
            return super().find_model(job)

    def make_runner(self, job: Job, strategy: Strategy, model: Model) -> BatchRunner:
        runner = super().make_runner(job, strategy, model)

        def between_tokens() -> None:
            if self._connection.is_closed:
                raise JobCancelledError
            self._device_lock.yield_to_others()

        runner.on_token = between_tokens
        return runner


def _records(connection: Connection) -> Iterator[Record]:
    while True:
        try:
            message = connection.receive()
        except ConnectionClosedError:
            raise JobCancelledError from None
        if "end" in message:
            return
        fields, failure, is_row = message["record"]
        yield Record(fields, failure=Failure(**failure) if failure else None, is_row=is_row)
