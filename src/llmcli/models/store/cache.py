"""What all writes to the cache have in common: a lock, a staging folder, and one rename to the place."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmcli import config, console
from llmcli.errors import LlmcliError, ModelUnavailableError


def staging(key: str) -> Path:
    """Where what is to be `key` is made, and where it goes to die."""
    return config.cache_dir() / "staging" / key


def put(home: Path, make: Callable[[Path], Path]) -> None:
    """Have `make` write a folder somewhere in a staging folder, which it is given, and move it to `home`: the cache
    never shows half of it."""
    place = staging(home.name)
    shutil.rmtree(place, ignore_errors=True)  # what a killed process left behind
    place.mkdir(parents=True)
    try:
        made = make(place)
        _to_disk(made)
        home.parent.mkdir(parents=True, exist_ok=True)
        made.rename(home)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def drop(home: Path) -> None:
    """Delete the folder. Out of sight first: an interrupted removal must not leave half a model."""
    doomed = staging(home.name)
    shutil.rmtree(doomed, ignore_errors=True)
    doomed.parent.mkdir(parents=True, exist_ok=True)
    home.rename(doomed)
    shutil.rmtree(doomed)


@contextmanager
def lock(key: str, busy: str) -> Iterator[None]:
    """One process at a time; another is told `busy`, and waits."""
    from filelock import FileLock, Timeout

    folder = config.cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / f"{key}.lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        console.notice(f"{busy}: waiting for it")
        held.acquire()
    try:
        yield
    finally:
        held.release()


@contextmanager
def writing() -> Iterator[None]:
    """Where a full, closed or misplaced disk becomes an error that says so."""
    try:
        yield
    except LlmcliError:
        raise
    except Exception as exc:
        code = getattr(exc, "errno", None)
        # safetensors and others wrap the system's error in their own types
        if code in {errno.ENOSPC, errno.EDQUOT} or "No space left on device" in str(exc):
            raise ModelUnavailableError(
                f"no space left on the disk of {config.cache_dir()}", hint="free some, or set LLMCLI_CACHE (HF_HOME)"
            ) from exc
        if isinstance(exc, OSError) and code:
            raise ModelUnavailableError(
                f"cannot write to {exc.filename or config.cache_dir()}: {os.strerror(code).lower()}",
                hint="set LLMCLI_CACHE (HF_HOME)",
            ) from exc
        raise


def _to_disk(folder: Path) -> None:
    """fsync, so that a power cut after the rename does not leave empty files."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
