"""llmcli models: list, show, pull and delete models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llmcli.config import settings
from llmcli.errors import ModelUnavailableError
from llmcli.io.output import print_lines, print_table, to_json
from llmcli.io.units import format_megabytes
from llmcli.models import registry, store
from llmcli.models.registry import FolderSource, GgufSource, HubSource, ModelSpec, WheelSource
from llmcli.options import AllowPickle, Json, Offline, Quiet, Verbose, completion
from llmcli.options.expand import Command, expand_options

app = typer.Typer(help="Manage models.", no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False, autocompletion=completion.models)]


@app.command("list", cls=Command)
@expand_options
def list_models(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List model aliases.

    \b
    llmcli models list
    llmcli models list --json
    """
    models = [ModelInfo(spec) for spec in registry.models().values()]
    if json:
        print_lines(to_json(model.to_json()) for model in models)
        return
    print_table(
        ("NAME", "CACHED", "DOWNLOAD", "TASKS", "LICENSE"),
        [
            (model.spec.name, "yes" if model.folder else "no", format_megabytes(model.spec.size),
             " ".join(model.spec.tasks), model.spec.license or "-")
            for model in models
        ],
    )  # fmt: skip


@app.command(cls=Command)
@expand_options
def show(name: Name, json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Show the details of a model.

    \b
    llmcli models show smollm2
    """
    model = ModelInfo(registry.resolve(name))
    fields = model.to_json()
    if json:
        print_lines([to_json(fields)])
        return
    fields |= {
        "tasks": ", ".join(model.spec.tasks),
        "download": format_megabytes(model.spec.size),
        "on disk": format_megabytes(model.disk_bytes),
    }
    print_lines(f"{key:12} {value}" for key, value in fields.items() if value not in (None, "", "-"))


@app.command(cls=Command)
@expand_options
def pull(
    name: Name,
    offline: Offline = False,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Download a model and print its path.

    A model that is cached is updated to its newest revision.

    \b
    llmcli models pull qwen3-4b
    """
    spec = registry.resolve(name)
    offline = offline or settings().offline
    print_lines([str(store.pull(spec, offline=offline, allow_pickle=allow_pickle, refresh=True))])


@app.command(cls=Command)
@expand_options
def rm(name: Name, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Delete a model from the cache.

    \b
    llmcli models rm smollm2-360m
    """
    if not store.remove(registry.resolve(name)):
        raise ModelUnavailableError(f"{name} is not cached")


@app.command(cls=Command)
@expand_options
def path(name: Name, allow_pickle: AllowPickle = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Print the path of a cached model.

    The exit code is 4 if the model is not cached.

    \b
    llmcli models path smollm2
    """
    if not (folder := store.find(registry.resolve(name), allow_pickle=allow_pickle)):
        raise ModelUnavailableError(f"{name} is not cached", hint=f"run `llmcli models pull {name}`")
    print_lines([str(folder)])


@dataclass
class ModelInfo:
    """A model, and where it is cached."""

    spec: ModelSpec

    def __post_init__(self) -> None:
        self.folder: Path | None = store.listed(self.spec)
        self.disk_bytes = sum(file.stat().st_size for file in self.folder.iterdir()) if self.folder else None

    def to_json(self) -> dict[str, object]:
        """Return the fields for --json."""
        return {
            "name": self.spec.name,
            "description": self.spec.description,
            "source": self.source,
            "license": self.spec.license,
            "download": self.spec.size,
            "tasks": list(self.spec.tasks),
            "path": str(self.folder) if self.folder else None,
            "on disk": self.disk_bytes,
        }

    @property
    def source(self) -> str:
        """Where the model comes from."""
        match self.spec.source:
            case WheelSource(wheels=wheels):
                return f"package index: {' '.join(wheels)}"
            case HubSource(repo, revision):
                return f"hub: {repo}{f'@{revision}' if revision else ''}"
            case FolderSource(path) | GgufSource(path):
                return f"local: {path}"
