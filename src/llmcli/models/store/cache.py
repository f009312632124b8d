"""Writes to the cache: under a lock, in a staging directory, and with one rename into place."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmcli import config, console
from llmcli.errors import LlmcliError, ModelUnavailableError


def staging(key: str) -> Path:
    """Return the directory in which `key` is made, and from which it is deleted."""
    return config.cache_dir() / "staging" / key


def publish(home: Path, make: Callable[[Path], Path]) -> None:
    """Move the directory that `make` writes to `home`, so that the cache never shows half of it.

    `make` gets a staging directory, and returns the directory that it has written in there.
    """
    place = staging(home.name)
    shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
    place.mkdir(parents=True)
    try:
        made = make(place)
        _to_disk(made)
        home.parent.mkdir(parents=True, exist_ok=True)
        made.rename(home)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def remove(home: Path) -> None:
    """Delete a directory. It is moved away first: an interrupted removal must not leave half a model."""
    doomed = staging(home.name)
    shutil.rmtree(doomed, ignore_errors=True)
    doomed.parent.mkdir(parents=True, exist_ok=True)
    home.rename(doomed)
    shutil.rmtree(doomed)


@contextmanager
def lock(key: str, busy: str) -> Iterator[None]:
    """Let one process in at a time; another prints `busy`, and waits."""
    from filelock import FileLock, Timeout

    folder = config.cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / f"{key}.lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        console.notice(f"{busy}; waiting")
        held.acquire()
    try:
        yield
    finally:
        held.release()


@contextmanager
def writing() -> Iterator[None]:
    """Turn the errors of a disk that is full or not writable into errors of ours."""
    try:
        yield
    except LlmcliError:
        raise
    except Exception as exc:
        code = getattr(exc, "errno", None)
        # safetensors and others wrap the system's error in their own types
        if code in {errno.ENOSPC, errno.EDQUOT} or "No space left on device" in str(exc):
            raise ModelUnavailableError(
                f"no space left on the disk of {config.cache_dir()}",
                hint="free some space, or set LLMCLI_CACHE (HF_HOME)",
            ) from exc
        if isinstance(exc, OSError) and code:
            raise ModelUnavailableError(
                f"cannot write to {exc.filename or config.cache_dir()}: {os.strerror(code).lower()}",
                hint="set LLMCLI_CACHE (HF_HOME)",
            ) from exc
        raise


def _to_disk(folder: Path) -> None:
    """Call fsync, so that a power failure after the rename does not leave empty files."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
