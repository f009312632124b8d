"""Writes to the cache: under a lock, in a staging directory, and with one rename into place."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmcli import config, console
from llmcli.errors import LlmcliError, ModelUnavailableError


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def publish(home: Path, make: Callable[[Path], Path]) -> None:
    """Move the directory that `make` writes, in the staging directory that it gets, to `home`."""
    place = _empty_staging(home)
    place.mkdir()
    try:
        made = make(place)
        _to_disk(made)
        home.parent.mkdir(parents=True, exist_ok=True)
        made.rename(home)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def remove(home: Path) -> None:
    """Delete a directory. It is moved away first: an interrupted removal must not leave half a model."""
    doomed = _empty_staging(home)
    home.rename(doomed)
    shutil.rmtree(doomed)


def remove_older(home: Path) -> None:
    """Delete the directories whose names differ from that of `home` only after the last hyphen."""
    for folder in home.parent.glob(f"{home.name.rpartition('-')[0]}-*"):
        if folder != home:
            with suppress(OSError):
                remove(folder)


def _empty_staging(home: Path) -> Path:
    place = config.cache_dir() / "staging" / home.name
    shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


@contextmanager
def lock(key: str, busy: str) -> Iterator[None]:
    """Let one process in at a time; another prints `busy`, and waits."""
    from filelock import FileLock, Timeout

    folder = config.cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / f"{key}.lock")
    try:
        acquired = held.acquire(timeout=0)
    except Timeout:
        console.notice(f"{busy}; waiting")
        acquired = held.acquire()
    with acquired:
        yield


@contextmanager
def writing() -> Iterator[None]:
    """Turn the errors of a disk that is full or not writable into errors of ours."""
    try:
        yield
    except LlmcliError:
        raise
    except Exception as exc:
        code, where = getattr(exc, "errno", None), config.cache_dir()
        # safetensors and others wrap the system's error in their own types
        if code in {errno.ENOSPC, errno.EDQUOT} or "No space left on device" in str(exc):
            message, hint = f"no space left on the disk of {where}", "free some space, or set LLMCLI_CACHE (HF_HOME)"
        elif isinstance(exc, OSError) and code:
            where = exc.filename or where
            message, hint = f"cannot write to {where}: {os.strerror(code).lower()}", "set LLMCLI_CACHE (HF_HOME)"
        else:
            raise
        raise ModelUnavailableError(message, hint=hint) from exc


def _to_disk(folder: Path) -> None:
    """Call fsync, so that a power failure after the rename does not leave empty files."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
