"""Plugins: commands and tasks of other packages, by the entry points `llmcli.commands` and `llmcli.tasks`."""

import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

from llmcli import console
from llmcli.errors import UsageError, first_line


@cache
def find_plugins(group: str) -> dict[str, Any]:
    """Return the entry points of a group, commands or tasks, by name. No code of their packages runs."""
    from importlib.metadata import distributions

    built_in = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parents[1] / group)])}
    found: dict[str, Any] = {}
    for package in distributions():
        try:
            points = package.entry_points.select(group=f"llmcli.{group}")
        except Exception as exc:  # a file that somebody has edited
            console.warning(f"plugins of {package.name} cannot be read: {first_line(exc)}")
            continue
        for point in points:
            first = found.setdefault(point.name, point)
            if point.name in built_in or first.dist.name != package.name:
                console.warning(f"{point.name!r} of {package.name} is ignored: llmcli or another package has one")
    return {name: found[name] for name in sorted(found.keys() - built_in)}


def load_plugin(group: str, name: str, expected: Any) -> Any:
    """Import a plugin, and return its object. Raises UsageError if it cannot be imported or is of another type."""
    if not (point := find_plugins(group).get(name)):
        raise UsageError(f"{name!r} not found among the {group}")
    try:
        if isinstance(loaded := point.load(), expected):
            return loaded
        raise TypeError(f"expected {expected.__name__}, got {loaded!r}")
    except Exception as exc:
        message = f"{name!r} of the package {point.dist.name} cannot be loaded: {first_line(exc)}"
        raise UsageError(message, hint=f"update or uninstall {point.dist.name}; for the traceback, pass -v") from exc
