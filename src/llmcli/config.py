"""Paths, the user's configuration file, and the LLMCLI_* environment variables."""

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from llmcli.errors import UsageError

DType = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(DType)
SETTINGS = {"device": str, "dtype": str, "offline": bool, "keep_alive": str, "defaults": dict}  # and their types
VARIABLES = {"LLMCLI_DEVICE": "device", "LLMCLI_DTYPE": "dtype", "LLMCLI_KEEP_ALIVE": "keep_alive"}


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration file; environment variables take precedence."""

    device: str = "auto"
    dtype: str = "auto"
    offline: bool = False
    keep_alive: str = ""  # a duration as --keep-alive reads it; empty if not set
    defaults: Mapping[str, str | list[str]] = field(default_factory=dict)  # task -> model, or models in order


def world_size() -> int:
    """Return the number of processes of this run, which torchrun or accelerate launch starts."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return max(1, int(size)) if rank.isdecimal() and size.isdecimal() else 1


def rank() -> int:
    """Return the number of this process. Rank 0 reads the input and writes the results."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def cache_dir() -> Path:
    """Return the directory of the models that llmcli caches: LLMCLI_CACHE, or the platform's cache directory."""
    if path := os.environ.get("LLMCLI_CACHE"):
        return Path(path).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("llmcli", appauthor=False)


def config_file() -> Path:
    """Return the path of the configuration file, which may not exist. The user's models.toml is beside it."""
    if path := os.environ.get("LLMCLI_CONFIG"):
        return Path(path).expanduser()
    import platformdirs

    return platformdirs.user_config_path("llmcli", appauthor=False) / "config.toml"


@cache
def settings() -> Settings:
    path = config_file()
    if not path.exists() and "LLMCLI_CONFIG" in os.environ:
        raise UsageError(f"{path}: no such file", hint="LLMCLI_CONFIG names it")
    table = check_table(read_toml(path) if path.exists() else {}, SETTINGS, str(path))
    table |= {key: os.environ[variable] for variable, key in VARIABLES.items() if os.environ.get(variable)}
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        table["offline"] = True
    settings = Settings(**table)
    for task, model in settings.defaults.items():
        names = model if isinstance(model, list) else [model]
        if not names or not all(isinstance(name, str) for name in names):
            raise UsageError(f"{path}: the default of {task!r} must be the name of a model, or a list of names")
    if settings.dtype not in DTYPES:
        source = "LLMCLI_DTYPE" if "LLMCLI_DTYPE" in os.environ else path
        raise UsageError(f"{source}: unknown dtype {settings.dtype!r}", hint=f"dtypes: {', '.join(DTYPES)}")
    return settings


def validate_device(name: str) -> str:
    """Return the name of a device, whether or not this machine has the device."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", name):
        raise UsageError(f"unknown device {name!r}", hint="devices: auto, cpu, cuda, cuda:N, mps, xpu")
    return name


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise UsageError(f"{path}: {exc}") from exc


def check_keys(table: Mapping[str, object], allowed: Iterable[str], where: str) -> None:
    """Raise UsageError for an unknown key: it is a typing error."""
    allowed = list(allowed)
    for key in table:
        if key not in allowed:
            message = f"{where}: unknown key {key!r}{did_you_mean(key, allowed)}"
            raise UsageError(message, hint=f"known keys: {', '.join(allowed)}")


def check_table(table: object, types: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a table. Raises UsageError for an unknown key, or a value that is not of its key's type."""
    if not isinstance(table, dict):
        raise UsageError(f"{where} is not a table")
    check_keys(table, types, where)
    for key, value in table.items():
        if type(value) is not (get_origin(types[key]) or types[key]):
            raise UsageError(f"{where}: {key!r} must be of type {types[key].__name__}")
        if types[key] == list[str] and not all(isinstance(item, str) for item in value):
            raise UsageError(f"{where}: {key!r} must be a list of strings")
    return table


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the most similar known name, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
