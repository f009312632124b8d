"""The TOML files of tasks: the package's own, and the user's next to config.toml."""

from collections.abc import Mapping
from pathlib import Path

from llmcli import config
from llmcli.errors import UsageError


def user_file(name: str) -> Path:
    """Return the path of the user's file of that name. It need not exist."""
    return config.config_file().with_name(name)


def read_package_file(name: str) -> dict[str, object]:
    """Return the tables of the file of that name in this package."""
    return config.read_toml(Path(__file__).with_name(name))


def read_user_file(name: str) -> dict[str, object]:
    """Return the tables of the user's file, or none if it does not exist. Raises UsageError if it is not TOML."""
    path = user_file(name)
    return config.read_toml(path) if path.exists() else {}


def check_table(table: object, types: Mapping[str, type], source: str) -> dict[str, object]:
    """Return a table of the user's. Raises UsageError if it is not a table, a key is unknown or a type is wrong."""
    if not isinstance(table, dict):
        raise UsageError(f"{source} is not a table")
    config.check_keys(table, types, source)
    for key, value in table.items():
        if not isinstance(value, types[key]) or isinstance(value, bool):
            raise UsageError(f"{source}: {key} must be of type {types[key].__name__}")
    return table
