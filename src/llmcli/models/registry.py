"""Names -> models: models.toml, overlaid by the user's own, read into frozen specs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from llmcli import config
from llmcli.errors import ModelUnavailableError, UsageError

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class WheelSource:
    """Weights published in one or more wheels: the pieces of a GGUF file in order, or a `folder` as
    `save_pretrained` writes it. `sha256` is of the GGUF file, or of the folder's model.safetensors."""

    wheels: tuple[str, ...]
    sha256: str
    files: tuple[str, ...] = ()
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository on the Hugging Face hub. `revision` is a branch, tag or commit."""

    repo: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder as `save_pretrained` writes it."""

    path: Path


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A GGUF file of the user's own."""

    path: Path


Source = WheelSource | HubSource | FolderSource | GgufSource


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What is known of a model before it is loaded. `name` is the alias, or what the user wrote."""

    name: str
    source: Source
    description: str = ""
    license: str | None = None
    size: int | None = None  # bytes to download
    tasks: tuple[str, ...] = ()


def resolve(name: str) -> ModelSpec:
    """The model of that name: a registry alias, else an existing folder or .gguf file, else a hub id.

    Raises ModelUnavailable where it can be none of these.
    """
    if spec := models().get(name) or _patterned(name):
        return spec
    path = Path(name).expanduser()
    if name and path.is_dir():
        return ModelSpec(name, FolderSource(path.resolve()))
    if path.suffix == ".gguf" and path.is_file():
        return ModelSpec(name, GgufSource(path.resolve()))
    looks_like_path = name.startswith((".", "/", "~")) or path.suffix == ".gguf" or (name and path.exists())
    if not looks_like_path and (source := _hub_source(name)):
        return ModelSpec(name, source)
    if looks_like_path:
        what = "is neither a model folder nor a .gguf file" if path.exists() else "does not exist"
        raise ModelUnavailableError(f"model {name!r} {what}")
    raise ModelUnavailableError(
        f"unknown model {name!r}{config.did_you_mean(name, models())}",
        hint="`llmcli models list` shows the aliases; or give a folder, a .gguf file, or a hub id: org/name",
    )


def default_names(task: str, source: str | None = None, target: str | None = None) -> list[str]:
    """The models of a task where --model does not say, the preferred one first. Names with {from} and {to} in them
    are for two languages, and left out where one is not known."""
    defaults, own = config.read_toml(HERE / "defaults.toml"), config.settings().defaults
    config.check_keys(own, defaults, f"{config.config_file()}: [defaults]")
    chosen = {**defaults, **own}.get(task)
    if chosen is None:
        raise UsageError(
            f"{task} has no default model", hint=f"give one: -m NAME; or name it in {HERE / 'defaults.toml'}"
        )
    languages = {key: tag.split("-")[0] for key, tag in (("{from}", source), ("{to}", target)) if tag}
    names = []
    for name in [chosen] if isinstance(chosen, str) else chosen:
        for key, language in languages.items():
            name = name.replace(key, language)
        names += [name] if "{" not in name else []
    if not names:
        raise UsageError(f"the default models of {task} need to know the language", hint="say it: --from LANG")
    return names


@cache
def models() -> Mapping[str, ModelSpec]:
    """Alias -> spec. Raises UsageError for a table of the user's that makes no sense."""
    own = config.config_file().with_name("models.toml")
    paths = [HERE / "models.toml", *([own] if own.exists() else [])]
    return {alias: _spec(alias, table, path) for path in paths for alias, table in config.read_toml(path).items()}


def _patterned(name: str) -> ModelSpec | None:
    """The model of an alias with {from} and {to} in it."""
    for alias, spec in models().items():
        if "{" in alias and isinstance(spec.source, HubSource):
            form = re.escape(alias).replace(r"\{from\}", "(?P<f>[a-z]{2,3})").replace(r"\{to\}", "(?P<t>[a-z]{2,3})")
            if found := re.fullmatch(form, name):
                repo = spec.source.repo.replace("{from}", found["f"]).replace("{to}", found["t"])
                return replace(spec, name=name, source=HubSource(repo, spec.source.revision))
    return None


def _spec(alias: str, table: Any, path: Path) -> ModelSpec:
    where = f"{path}: [{alias}]"
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {alias!r} is not a table", hint=f"write [{alias}], then its keys")
    common = {"description": str, "license": str, "size": int, "tasks": list}
    kinds = {"hub": ("hub",), "wheels": ("wheels", "sha256"), "path": ("path",)}
    config.check_keys(table, [*common, *(key for keys in kinds.values() for key in keys), "files", "folder"], where)
    chosen = [kind for kind in kinds if kind in table]
    if len(chosen) != 1:
        raise UsageError(f"{where}: needs exactly one of {', '.join(kinds)}")
    needed = kinds[chosen[0]]
    if chosen == ["wheels"]:
        needed += ("folder" if "folder" in table else "files",)
    types = common | {"hub": str, "wheels": list, "files": list, "folder": str, "sha256": str, "path": str}
    for key in {*needed, *table}:
        if key not in table or (key not in common and key not in needed):
            raise UsageError(f"{where}: {key!r} {'does not go' if key in table else 'has to go'} with {chosen[0]!r}")
        if not isinstance(table[key], types[key]):
            raise UsageError(f"{where}: {key!r} must be of type {types[key].__name__}")
        if isinstance(table[key], list) and not all(isinstance(item, str) for item in table[key]):
            raise UsageError(f"{where}: {key!r} must be a list of texts")
    about = {key: table[key] for key in ("description", "license", "size") if key in table}
    return ModelSpec(alias, _source(table, path.parent, where), tasks=tuple(table.get("tasks", ())), **about)


def _source(table: Mapping[str, Any], folder: Path, where: str) -> Source:
    if "wheels" in table:
        return WheelSource(tuple(table["wheels"]), table["sha256"], tuple(table.get("files", ())), table.get("folder"))
    if "path" in table:
        path = folder / Path(table["path"]).expanduser()
        return GgufSource(path) if path.suffix == ".gguf" else FolderSource(path)
    if source := _hub_source(table["hub"]):
        return source
    raise UsageError(f"{where}: {table['hub']!r} is not a hub id", hint="write org/name or org/name@revision")


def _hub_source(name: str) -> HubSource | None:
    match = re.fullmatch(r"([\w.-]+/[\w.{}-]+)(?:@([\w./-]+))?", name)
    return HubSource(match[1], match[2]) if match else None
