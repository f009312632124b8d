"""llmcli models: list, show, pull and delete models."""

from typing import Annotated, Any

from typer import Argument, Typer

from llmcli.config import settings
from llmcli.errors import ModelUnavailableError
from llmcli.io.output import print_lines, print_table, to_json
from llmcli.io.units import format_megabytes
from llmcli.models import registry, store
from llmcli.models.registry import FolderSource, GgufSource, HubSource, ModelSpec, WheelSource
from llmcli.options import AllowPickle, Json, Offline, Quiet, Verbose, completion, expand_options
from llmcli.options.expand import Command

app = Typer(help="Manage models.", no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str, Argument(metavar="NAME", show_default=False, autocompletion=completion.models)]


@app.command("list", cls=Command)
@expand_options
def list_models(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List model aliases.

    \b
    llmcli models list
    llmcli models list --json
    """
    models = registry.models().values()
    if json:
        print_lines(to_json(_describe(spec)) for spec in models)
        return
    rows = []
    for spec in models:
        is_cached = "yes" if store.find_or_none(spec) else "no"
        rows.append((spec.name, is_cached, format_megabytes(spec.size), " ".join(spec.tasks), spec.license or "-"))
    print_table(("NAME", "CACHED", "DOWNLOAD", "TASKS", "LICENSE"), rows)


@app.command(cls=Command)
@expand_options
def show(name: Name, json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Show the details of a model.

    \b
    llmcli models show smollm2
    """
    spec = registry.resolve(name)
    fields = _describe(spec)
    if json:
        print_lines([to_json(fields)])
        return
    sizes = {name: format_megabytes(fields[name]) for name in ("download", "on disk")}
    fields |= {"tasks": ", ".join(spec.tasks), **sizes}
    print_lines(f"{key:12} {value}" for key, value in fields.items() if value not in (None, "", "-"))


@app.command(cls=Command)
@expand_options
def pull(
    name: Name,
    offline: Offline = False, allow_pickle: AllowPickle = False, quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Download a model and print its path.

    A model that is cached is updated to its newest revision.

    \b
    llmcli models pull qwen3-4b
    """
    spec = registry.resolve(name)
    offline = offline or settings().offline
    if spec.adapter:
        store.pull(spec.adapter, offline=offline, refresh=True)
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


def _describe(spec: ModelSpec) -> dict[str, Any]:
    folder = store.find_or_none(spec)
    return {
        "name": spec.name, "description": spec.description, "source": _describe_source(spec), "license": spec.license,
        "adapter": _describe_source(spec.adapter) if spec.adapter else None, "download": spec.size,
        "tasks": list(spec.tasks), "path": str(folder) if folder else None,
        "on disk": sum(file.stat().st_size for file in folder.iterdir() if file.exists()) if folder else None,
    }  # fmt: skip


def _describe_source(spec: ModelSpec) -> str:
    match spec.source:
        case WheelSource(wheels=wheels):
            return f"package index: {' '.join(wheels)}"
        case HubSource(repo, revision):
            return f"hub: {repo}{f'@{revision}' if revision else ''}"
        case FolderSource(path) | GgufSource(path):
            return f"local: {path}"
