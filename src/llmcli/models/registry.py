"""Names -> models: models.toml, overlaid by the user's own, read into frozen specs."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from llmcli import config
from llmcli.errors import ModelUnavailableError, UsageError

HERE = Path(__file__).parent
ABOUT = {"description": str, "license": str, "size": int, "tasks": list[str], "adapter": str}  # keys, and their types
SOURCES = {"hub": str, "wheels": list[str], "files": list[str], "folder": str, "sha256": str, "path": str}


@dataclass(frozen=True, slots=True)
class WheelSource:
    """Weights published in wheels: the pieces of a GGUF file in order, or a directory with a model.safetensors."""

    wheels: tuple[str, ...]
    sha256: str  # of the GGUF file, or of model.safetensors
    files: tuple[str, ...] = ()
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class HubSource:
    repo: str
    revision: str | None = None  # branch, tag or commit


@dataclass(frozen=True, slots=True)
class FolderSource:
    path: Path


@dataclass(frozen=True, slots=True)
class GgufSource:
    path: Path


Source = WheelSource | HubSource | FolderSource | GgufSource


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What is known about a model before it is loaded."""

    name: str  # the alias, or what the user wrote
    source: Source
    description: str = ""
    license: str | None = None
    size: int | None = None  # bytes to download
    tasks: tuple[str, ...] = ()
    adapter: "ModelSpec | None" = None  # that is merged into the weights
    is_adapter: bool = False


def resolve(name: str) -> ModelSpec:
    """Return the model of that name: an alias, or else an existing directory or .gguf file, or else a Hub ID."""
    if spec := models().get(name) or _patterned(name):
        return spec
    path = Path(name).expanduser()
    if name and path.is_dir():
        return ModelSpec(name, FolderSource(path.resolve()))
    if path.suffix.lower() == ".gguf" and path.is_file():
        return ModelSpec(name, GgufSource(path.resolve()))
    looks_like_path = name.startswith((".", "/", "~")) or path.suffix.lower() == ".gguf" or (name and path.exists())
    if looks_like_path:
        reason = "is neither a model directory nor a .gguf file" if path.exists() else "does not exist"
        raise ModelUnavailableError(f"model {name!r} {reason}")
    if source := _hub_source(name):
        return ModelSpec(name, source)
    raise ModelUnavailableError(
        f"unknown model {name!r}{config.did_you_mean(name, models())}",
        hint="run `llmcli models list` for the aliases, or pass a directory, a .gguf file or a Hub ID: org/name",
    )


def resolve_adapter(name: str, home: Path = Path()) -> ModelSpec:
    """Return the adapter of that name: a path from the directory `home`, or else a Hub ID. It may not exist."""
    path = home / Path(name).expanduser()
    source = None if path.exists() or name.startswith((".", "/", "~")) else _hub_source(name)
    return ModelSpec(name if source else str(path.resolve()), source or FolderSource(path.resolve()), is_adapter=True)


def is_model(word: str) -> bool:
    """Return whether a word, which may be a text or a file, most likely names a model."""
    # Those of os.path return False for a name that is too long.
    is_known = word in models() or os.path.isfile(os.path.join(word, "config.json"))
    return is_known or bool(_hub_source(word) and not os.path.exists(word))


def default_names(task: str, source: str | None = None, target: str | None = None) -> list[str]:
    """Return the models of a task without --model, the preferred one first.

    Names with {from} and {to} are for two languages, and left out if one is not known.
    """
    defaults, own = config.read_toml(HERE / "defaults.toml"), config.settings().defaults
    config.check_keys(own, defaults, f"{config.config_file()}: [defaults]")
    chosen = {**defaults, **own}.get(task)
    if not chosen:
        example = next((alias for alias, spec in models().items() if task in spec.tasks), "NAME")
        raise UsageError(f"{task} has no default model", hint=f"pass one: -m {example}")
    languages = {key: tag.split("-")[0] for key, tag in (("{from}", source), ("{to}", target)) if tag}
    names = []
    for name in [chosen] if isinstance(chosen, str) else chosen:
        for key, language in languages.items():
            name = name.replace(key, language)
        names += [name] if "{" not in name else []
    if not names:
        raise UsageError(f"the default models of {task} require a language", hint="pass --from LANG")
    return names


@cache
def models() -> Mapping[str, ModelSpec]:
    """Return specs by alias, the user's own included."""
    own = config.config_file().with_name("models.toml")
    paths = [HERE / "models.toml", *([own] if own.exists() else [])]
    return {alias: _spec(alias, table, path) for path in paths for alias, table in config.read_toml(path).items()}


def _patterned(name: str) -> ModelSpec | None:
    """Return the model of an alias with {from} and {to} in it."""
    for alias, spec in models().items():
        if "{" in alias and isinstance(spec.source, HubSource):
            pattern = re.escape(alias).replace(r"\{from\}", "(?P<f>[a-z]{2,3})").replace(r"\{to\}", "(?P<t>[a-z]{2,3})")
            if match := re.fullmatch(pattern, name):
                repo = spec.source.repo.replace("{from}", match["f"]).replace("{to}", match["t"])
                return replace(spec, name=name, source=HubSource(repo, spec.source.revision))
    return None


def _spec(alias: str, table: object, path: Path) -> ModelSpec:
    where = f"{path}: [{alias}]"
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {alias!r} is not a table", hint=f"write [{alias}], then its keys")
    config.check_table(table, ABOUT | SOURCES, where)
    kinds = [kind for kind in ("hub", "wheels", "path") if kind in table]
    if len(kinds) != 1:
        raise UsageError(f"{where}: needs exactly one of hub, wheels, path")
    required = set(kinds) if kinds != ["wheels"] else {"wheels", "sha256", "folder" if "folder" in table else "files"}
    for key in sorted(required ^ (table.keys() - ABOUT.keys())):
        raise UsageError(f"{where}: {key!r} {'cannot be used with' if key in table else 'is required by'} {kinds[0]!r}")
    about = {key: value for key, value in table.items() if key in ABOUT} | {"tasks": tuple(table.get("tasks", ()))}
    if "adapter" in table:
        about["adapter"] = resolve_adapter(table["adapter"], path.parent)
    if kinds == ["wheels"]:
        files, folder = tuple(table.get("files", ())), table.get("folder")
        return ModelSpec(alias, WheelSource(tuple(table["wheels"]), table["sha256"], files, folder), **about)
    if kinds == ["path"]:
        file = path.parent / Path(table["path"]).expanduser()
        return ModelSpec(alias, GgufSource(file) if file.suffix.lower() == ".gguf" else FolderSource(file), **about)
    if source := _hub_source(table["hub"]):
        return ModelSpec(alias, source, **about)
    raise UsageError(f"{where}: {table['hub']!r} is not a Hub ID", hint="write org/name or org/name@revision")


def _hub_source(name: str) -> HubSource | None:
    match = re.fullmatch(r"([\w.-]+/[\w.{}-]+)(?:@([\w./-]+))?", name)
    return HubSource(match[1], match[2]) if match else None
