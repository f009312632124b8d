"""Paths, the user's configuration file, and the LLMCLI_* variables."""

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from llmcli.errors import UsageError

DType = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(DType)


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration file, with the environment laid over it."""

    device: str = "auto"
    dtype: str = "auto"
    offline: bool = False
    keep_alive: str = ""  # as --keep-alive is written; nothing: not said
    defaults: Mapping[str, Any] = field(default_factory=dict)  # task -> model, or models in order


def world_size() -> int:
    """Return the number of processes of this run, as torchrun and accelerate launch start them."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Return the number of this process. Rank 0 reads the input and writes the results."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def cache_dir() -> Path:
    """Where models made ready by llmcli live; `LLMCLI_CACHE`, or the platform's cache folder."""
    if path := os.environ.get("LLMCLI_CACHE"):
        return Path(path).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("llmcli", appauthor=False)


def config_file() -> Path:
    """The configuration file, `LLMCLI_CONFIG` or `config.toml` in the platform's folder. The user's
    `models.toml` lies beside it. Neither need exist."""
    if path := os.environ.get("LLMCLI_CONFIG"):
        return Path(path).expanduser()
    import platformdirs

    return platformdirs.user_config_path("llmcli", appauthor=False) / "config.toml"


@cache
def settings() -> Settings:
    """Read once a process. Raises UsageError for a file that does not parse or a key it should not have."""
    path = config_file()
    if not path.exists() and "LLMCLI_CONFIG" in os.environ:
        raise UsageError(f"{path}: no such file", hint="LLMCLI_CONFIG names it")
    table = read_toml(path) if path.exists() else {}
    check_keys(table, (f.name for f in fields(Settings)), str(path))
    for variable, key in (("LLMCLI_DEVICE", "device"), ("LLMCLI_DTYPE", "dtype"), ("LLMCLI_KEEP_ALIVE", "keep_alive")):
        if value := os.environ.get(variable):
            table[key] = value
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        table["offline"] = True
    found = Settings(**table)
    for key, kind in (("device", str), ("dtype", str), ("offline", bool), ("keep_alive", str), ("defaults", dict)):
        if not isinstance(getattr(found, key), kind):
            raise UsageError(f"{path}: {key} must be of type {kind.__name__}")
    for task, model in found.defaults.items():
        names = model if isinstance(model, list) else [model]
        if not names or not all(isinstance(name, str) for name in names):
            raise UsageError(f"{path}: the default of {task!r} must be the name of a model, or a list of names")
    if found.dtype not in DTYPES:
        place = "LLMCLI_DTYPE" if "LLMCLI_DTYPE" in os.environ else path
        raise UsageError(f"{place}: unknown dtype {found.dtype!r}", hint=f"dtypes: {', '.join(DTYPES)}")
    return found


def checked_device(name: str) -> str:
    """The name of a device, whether or not it is here. Raises UsageError for what can be none."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", name):
        raise UsageError(f"unknown device {name!r}", hint="devices: auto, cpu, cuda, cuda:N, mps, xpu")
    return name


def seconds(duration: str) -> float:
    """`90`, `90s`, `10m`, `1h`, `1d` -> seconds. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", duration.strip())
    if not found:
        raise UsageError(f"not a duration: {duration!r}", hint="write it like 30s, 10m or 2h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def size_in_bytes(text: str) -> int:
    """`8GB`, `500MB`, `2GiB` -> bytes."""
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    units |= {f"{unit}I": 1024**power for power, unit in enumerate(("K", "M", "G", "T"), start=1)}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip(), re.IGNORECASE)
    if not match or match[2].upper() not in units:
        raise UsageError(f"not a size: {text!r}", hint="write it like 8GB, 500MB or 2GiB")
    return int(float(match[1]) * units[match[2].upper()])


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables. Raises UsageError that names the file and the place."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise UsageError(f"{path}: {exc}") from exc


def check_keys(table: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    """Refuse a key that nothing reads: it is a typing error, and silence would hide it."""
    allowed = list(allowed)
    for key in table:
        if key not in allowed:
            raise UsageError(
                f"{where}: unknown key {key!r}{did_you_mean(key, allowed)}",
                hint=f"known keys: {', '.join(allowed)}",
            )


def check_table(table: Mapping[str, object], types: Mapping[str, type], where: str) -> None:
    """Raise UsageError for an unknown key, or a value that is not of its key's type. Lists hold strings."""
    check_keys(table, types, where)
    for key, value in table.items():
        if not isinstance(value, types[key]):
            raise UsageError(f"{where}: {key!r} must be of type {types[key].__name__}")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise UsageError(f"{where}: {key!r} must be a list of strings")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
