"""llmcli models: what models there are, where they lie, and what may be done about it."""

from typing import Annotated, Any

import typer

from llmcli.config import settings
from llmcli.errors import ModelUnavailableError
from llmcli.io.output import megabytes, print_lines, print_table, to_json
from llmcli.models import registry, store
from llmcli.models.registry import FolderSource, GgufSource, HubSource, ModelSpec, WheelSource
from llmcli.options import AllowPickle, Json, Offline, Quiet, Verbose, completion
from llmcli.options.expand import Command, expand_options

app = typer.Typer(help="Models: list, show, pull, rm, path.", no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False, autocompletion=completion.models)]


@app.command("list", cls=Command)
@expand_options
def list_models(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List the models that have a short name.

    \b
    llmcli models list
    llmcli models list --json
    """
    rows = [_about(spec) for spec in registry.models().values()]
    if json:
        print_lines(map(to_json, rows))
        return
    print_table(
        ("NAME", "CACHED", "DOWNLOAD", "TASKS", "LICENSE"),
        [
            (row["name"], "yes" if row["path"] else "no", megabytes(row["download"]), " ".join(row["tasks"]),
             row["license"] or "-")
            for row in rows
        ],
    )  # fmt: skip


@app.command(cls=Command)
@expand_options
def show(name: Name, json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Show all that is known of one model.

    \b
    llmcli models show smollm2
    """
    about = _about(registry.resolve(name))
    if json:
        print_lines([to_json(about)])
        return
    about |= {"tasks": ", ".join(about["tasks"]) or None, "download": megabytes(about["download"])}
    about["on disk"] = megabytes(about["on disk"])
    print_lines(f"{key:12} {value}" for key, value in about.items() if value not in (None, "", "-"))


@app.command(cls=Command)
@expand_options
def pull(
    name: Name,
    offline: Offline = False,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fetch a model now, or a newer revision of it, and print its folder.

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
    """Print the folder of ready weights; exit 4 when they are not there.

    \b
    llmcli models path smollm2
    """
    if not (folder := store.find(registry.resolve(name), allow_pickle=allow_pickle)):
        raise ModelUnavailableError(f"{name} is not cached", hint=f"`llmcli models pull {name}` fetches it")
    print_lines([str(folder)])


def _about(spec: ModelSpec) -> dict[str, Any]:
    folder = store.find_or_none(spec)
    return {
        "name": spec.name,
        "description": spec.description,
        "source": _source(spec),
        "license": spec.license,
        "download": spec.size,
        "tasks": list(spec.tasks),
        "path": str(folder) if folder else None,
        "on disk": sum(file.stat().st_size for file in folder.iterdir()) if folder else None,
    }


def _source(spec: ModelSpec) -> str:
    match spec.source:
        case WheelSource(wheels=wheels):
            return f"package index: {' '.join(wheels)}"
        case HubSource(repo, revision):
            return f"hub: {repo}{f'@{revision}' if revision else ''}"
        case FolderSource(path) | GgufSource(path):
            return f"local: {path}"
