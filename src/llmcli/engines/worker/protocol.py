"""What goes between a call and the worker: JSON objects, a line each, through a Unix socket that only its user reaches.

A call begins with a hello: what it wants to `do`, and its `environment`. The worker answers with `worker`, its process
id, where it will, else with `refused`, why. What follows depends on `do`:

run     the call sends `job`, then `record`s and `end`; the worker `result`s in their order, between them `text` of the
        next result as it comes, `note`, `warning` and `working` for stderr, and last `done`, or `error`
load    as run, with no records: the model is loaded
status  the worker sends `status`
stop    nothing: the worker ends
"""

import hashlib
import json
import os
import select
import socket
import stat
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from llmcli import __version__, config
from llmcli.errors import LlmcliError

LARGEST = 64 * 2**20  # bytes of a message
SOCKET = "worker.sock"  # in the folder
READ_BY_LIBRARIES = ("HF_", "TRANSFORMERS_", "TORCH", "PYTORCH", "CUDA", "OMP_", "MKL_", "PIP_", "UV_")


class ConnectionClosedError(LlmcliError):
    """The other end is not there any more."""


class ProtocolError(LlmcliError):
    """What came is no message."""


class MessageTooLargeError(LlmcliError):
    """A message of more than LARGEST bytes."""


class Connection:
    """One end of a connection. Several threads may send."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._reader = connection.makefile("rb")
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._poll.register(connection, 0)  # hangups and errors are always told

    def send(self, **message: Any) -> None:
        """Waits where the other end is slow to read. Raises GoneError; TooLargeError, and nothing is sent."""
        line = json.dumps(message).encode() + b"\n"
        if len(line) > LARGEST:
            raise MessageTooLargeError(f"{len(line)} bytes in one message: a worker takes {LARGEST}")
        try:
            with self._sending:
                self.socket.sendall(line)
        except OSError as exc:
            raise ConnectionClosedError("the connection has ended") from exc

    def receive(self, most: int = LARGEST) -> dict[str, Any]:
        """The next message. Raises GoneError where there will be none, MessageError and TooLargeError."""
        try:
            line = self._reader.readline(most + 1)
        except (OSError, ValueError) as exc:  # ValueError: closed by another thread
            raise ConnectionClosedError("the connection has ended") from exc
        if len(line) > most:
            raise MessageTooLargeError(f"more than {most} bytes in one message")
        if not line.endswith(b"\n"):
            raise ConnectionClosedError("the connection has ended")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise ProtocolError(f"no message: {exc}") from exc
        if not isinstance(message, dict):
            raise ProtocolError("no message: not a JSON object")
        return message

    @property
    def is_gone(self) -> bool:
        """Whether the other end has hung up, even if not all that it sent has been read."""
        return bool(self._poll.poll(0))

    def close(self) -> None:
        """Wakes threads that wait at either end."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._reader.close()
        self.socket.close()


def folder(*, make: bool = False) -> Path:
    """Where the worker's socket, lock and log lie. Raises GoneError where it is not there, and not to be made;
    LlmcliError where it is not the user's alone, or the system has no Unix sockets."""
    if not hasattr(socket, "AF_UNIX"):
        raise LlmcliError("this system has no Unix sockets")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(runtime, "llmcli") if runtime else Path(os.environ.get("TMPDIR") or "/tmp", f"llmcli-{os.getuid()}")
    try:
        if make:
            path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except FileNotFoundError as exc:
        raise ConnectionClosedError(f"{path} is not there") from exc
    except OSError as exc:
        raise LlmcliError(f"{path}: {exc.strerror}") from exc
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise LlmcliError(f"{path} is not a folder that you alone may enter", hint=f"remove it, or `chmod 700 {path}`")
    return path


def peer(connection: socket.socket) -> int:
    """The user id of the other end, from the system."""
    if hasattr(socket, "SO_PEERCRED"):  # Linux: struct ucred
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    else:  # macOS, BSD: the beginning of struct xucred, by LOCAL_PEERCRED
        _, user = struct.unpack("Ii", connection.getsockopt(0, 1, 8))
    return int(user)


def environment() -> str:
    """The same for all calls that one worker can serve as they would serve themselves: what is installed and
    configured, and what libraries read from the environment."""
    settings = config.config_file()
    names = (settings.name, "models.toml", "prompts.toml", "presets.toml", "translations.toml")
    seen: list[Any] = [__version__, *(_stamp(settings.with_name(name)) for name in names)]
    seen += [str(config.cache_dir()), *(_stamp(path.parents[1]) for path in (Path(typer.__file__), Path(__file__)))]
    seen += sorted(
        (name, value) for name, value in os.environ.items() if name.startswith(READ_BY_LIBRARIES) or name == "HOME"
    )
    return hashlib.sha256(json.dumps(seen).encode("utf-8", "backslashreplace")).hexdigest()


def _stamp(path: Path) -> tuple[str, int | None]:
    """A file or folder, and when it was changed."""
    try:
        return str(path), path.stat().st_mtime_ns
    except OSError:
        return str(path), None
