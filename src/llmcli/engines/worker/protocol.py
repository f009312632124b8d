"""Messages between a call and the worker: JSON objects, one a line, through a Unix socket that is private to the user.

A call begins with `do`, what it wants, and `environment`, its fingerprint. The worker answers with `worker`, its
process ID, or with `refused`, the reason. What follows depends on `do`:

run     The call sends `job`, then `record`s and `end`. The worker sends `result`s in the order of the records, between
        them `text` of the next result while it is generated, `note`, `warning`, `working` and `thought` for stderr, and
        at last `done` or `error`.
load    As run, without records: the worker loads the model.
status  The worker sends `status`.
stop    The worker exits.
"""

import hashlib
import json
import os
import select
import socket
import stat
import struct
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import typer

from llmcli import __version__, config
from llmcli.errors import LlmcliError, RecordError
from llmcli.job import JsonObject

MAX_MESSAGE_BYTES = 64 * 2**20
CLOSED = "the connection is closed"
SOCKET_NAME = "worker.sock"
MAX_SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103  # of sockaddr_un
LIBRARY_PREFIXES = ("HF_", "TRANSFORMERS_", "TORCH", "PYTORCH", "CUDA", "OMP_", "MKL_", "PIP_", "UV_")

_encode = json.JSONEncoder(default=asdict).encode  # dataclasses become objects


class ConnectionClosedError(LlmcliError):
    """The other end has closed the connection."""


class ProtocolError(LlmcliError):
    """The other end sent something that is not a message."""


class MessageTooLargeError(RecordError):
    """A message has more than MAX_MESSAGE_BYTES."""


class Connection:
    """One end of a connection. Several threads may send."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._reader = connection.makefile("rb")
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._poll.register(connection, 0)  # poll always reports hangups and errors

    def send(self, **message: object) -> None:
        """Send a message, and wait while the other end is slow to read. If it is too large, nothing is sent."""
        line = _encode(message).encode() + b"\n"
        if len(line) > MAX_MESSAGE_BYTES:
            size = f"message has {len(line)} bytes, but a worker accepts at most {MAX_MESSAGE_BYTES}"
            raise MessageTooLargeError("too_large", size, hint="pass --keep-alive 0 to run without the worker")
        try:
            with self._sending:
                self.socket.sendall(line)
        except OSError as exc:
            raise ConnectionClosedError(CLOSED) from exc

    def receive(self, max_bytes: int = MAX_MESSAGE_BYTES) -> JsonObject:
        """Return the next message. Raises ConnectionClosedError, MessageTooLargeError and ProtocolError."""
        try:
            line = self._reader.readline(max_bytes + 1)
        except (OSError, ValueError) as exc:  # ValueError: another thread has closed it
            raise ConnectionClosedError(CLOSED) from exc
        if len(line) > max_bytes:
            raise MessageTooLargeError("too_large", f"message has more than {max_bytes} bytes")
        if not line.endswith(b"\n"):
            raise ConnectionClosedError(CLOSED)
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise ProtocolError(f"invalid message: {exc}") from exc
        if not isinstance(message, dict):
            raise ProtocolError("invalid message: expected a JSON object")
        return message

    @property
    def is_closed(self) -> bool:
        """Whether the other end has hung up, even if not all that it sent has been read."""
        return bool(self._poll.poll(0))

    def close(self) -> None:
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._reader.close()
        self.socket.close()


def has_socket() -> bool:
    """Return whether a worker runs, or was killed and left its socket."""
    return os.path.exists(_runtime_dir() / SOCKET_NAME)


def runtime_dir() -> Path:
    """Return the directory of the worker's socket, lock and log, made if needed; it has to be the user's alone."""
    path = _runtime_dir()
    if (size := len(os.fsencode(path / SOCKET_NAME))) > MAX_SOCKET_PATH_BYTES:
        limits = f"{size} bytes, but at most {MAX_SOCKET_PATH_BYTES} are allowed"
        raise LlmcliError(f"path of the socket in {path} has {limits}", "set XDG_RUNTIME_DIR to a shorter path")
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
    except OSError as exc:
        raise LlmcliError(f"{path}: {exc.strerror}") from exc
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise LlmcliError(f"{path} is not a private directory", hint=f"remove it, or run `chmod 700 {path}`")
    return path


def _runtime_dir() -> Path:
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime, "llmcli")
    return Path(os.environ.get("TMPDIR") or "/tmp", f"llmcli-{os.getuid()}")


def peer_uid(connection: socket.socket) -> int:
    if hasattr(socket, "SO_PEERCRED"):  # Linux: struct ucred
        return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])
    return int(struct.unpack("Ii", connection.getsockopt(0, 1, 8))[1])  # macOS, BSD: struct xucred, by LOCAL_PEERCRED


def environment_fingerprint() -> str:
    """Return a hash of what results depend on, besides the job: a worker serves only calls with its own hash."""
    settings = config.config_file()
    names = (settings.name, "models.toml", "prompts.toml", "presets.toml", "translations.toml")
    files = [settings.with_name(name) for name in names]
    packages = [Path(typer.__file__).parents[1], Path(__file__).parents[1]]
    stamps = [(str(path), path.stat().st_mtime_ns if os.path.exists(path) else None) for path in files + packages]
    variables = sorted(item for item in os.environ.items() if item[0] == "HOME" or item[0].startswith(LIBRARY_PREFIXES))
    seen = [__version__, str(config.cache_dir()), stamps, variables]
    return hashlib.sha256(json.dumps(seen).encode("utf-8", "backslashreplace")).hexdigest()
