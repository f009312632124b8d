"""docs/reference.md, from the commands themselves: `python tests/reference.py` writes it."""

import re
from functools import cache
from pathlib import Path

from typer.testing import CliRunner

from llmcli.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
HEAD = """# Commands and options

What `llmcli COMMAND --help` says, of all commands. Written by `make docs`.
"""


@cache
def help(command: tuple[str, ...]) -> str:
    """Of `llmcli COMMAND`, at 80 columns."""
    return CliRunner().invoke(app, [*command, "--help"], prog_name="llmcli", env={"COLUMNS": "80"}).output


def commands(group: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The group, and all that is in it, as their help lists them."""
    listed = help(group).partition("\nCommands:\n")[2]
    names = re.findall(r"^  (\S+)", listed, re.MULTILINE)
    return [group, *(command for name in names for command in commands((*group, name)))]


def page() -> str:
    """All of it."""
    parts = [
        f"## `{' '.join(('llmcli', *command))}`\n\n```text\n{help(command).strip()}\n```\n" for command in commands()
    ]
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
