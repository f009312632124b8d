"""docs/reference.md, from the commands themselves: `python tests/reference.py` writes it."""

import html
import re
from collections import Counter
from functools import cache
from pathlib import Path

from typer.testing import CliRunner

from llmcli.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
SHARED = ("Input", "Generation", "Model", "Output")  # sections of --help that commands share
MIN_COMMANDS = 4  # an option that so many commands have is a common one
HEAD = """# Commands

This page has what `llmcli COMMAND --help` and `llmcli help COMMAND` print. `make docs` writes it. Put options after the
command. Options that several commands share are listed once, under [Common options](#common-options).
"""

Options = dict[str, str]  # an option as help spells it -> what it does


@cache
def help(command: tuple[str, ...], columns: int = 80) -> str:
    """Return the help of `llmcli COMMAND`, at that width."""
    return CliRunner().invoke(app, [*command, "--help"], prog_name="llmcli", env={"COLUMNS": str(columns)}).output


def commands(group: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the group, and all commands in it, in the order of their help."""
    listed = help(group).partition("\nCommands:\n")[2]
    names = re.findall(r"^  (\S+)", listed, re.MULTILINE)
    return [group, *(command for name in names for command in commands((*group, name)))]


@cache
def sections(command: tuple[str, ...]) -> dict[str, Options]:
    """Return the sections of a command's help that hold options."""
    found: dict[str, Options] = {}
    for block in re.split(r"\n\n(?=\S)", help(command).rstrip()):
        title, _, rows = block.partition(":\n")
        rows = re.sub(r"\A(?:  [A-Z].*\n)+", "", rows)  # arguments
        if "\n" in title or not re.match(r"  -", rows):
            continue
        options = found.setdefault(title, {})
        for row in re.split(r"\n(?=  -)", rows):
            name, _, text = row.strip().partition("  ")
            if not text:
                name, _, text = row.strip().partition("\n")
            options[name.strip()] = " ".join(text.split())
        options.pop("-h, --help", None)
    return found


@cache
def common() -> dict[str, Options]:
    """Return the options that many commands share, by section."""
    counts = Counter(
        (title, name, text)
        for command in commands()
        for title in SHARED
        for name, text in sections(command).get(title, {}).items()
    )
    return {
        title: {name: text for (of, name, text), count in counts.items() if of == title and count >= MIN_COMMANDS}
        for title in SHARED
    }


def page() -> str:
    """Return the whole page."""
    parts = [HEAD, *(entry(command) for command in commands()), "## Common options\n"]
    for title, options in common().items():
        parts.append(f"### {title} options\n\n{table(options)}")
    return "\n".join(parts)


def entry(command: tuple[str, ...]) -> str:
    """Return the part of the page about one command."""
    usage = re.split(r"\n\n(?=Options:\n)", help(command).strip())[0]
    listed = help(command).partition("\nCommands:\n")[2].rstrip()
    usage += f"\n\nCommands:\n{listed}" if listed else ""
    own: Options = {}
    links = []
    for title, options in sections(command).items():
        shared = common().get(title, {})
        own |= {name: text for name, text in options.items() if shared.get(name) != text}
        if any(shared.get(name) == text for name, text in options.items()):
            missing = [f"`{re.findall('--[a-z-]+', name)[0]}`" for name in shared if name not in options]
            links.append(f"[{title}](#{title.lower()}-options)" + (f" except {', '.join(missing)}" if missing else ""))
    parts = [f"## `{' '.join(('llmcli', *command))}`\n\n```text\n{usage}\n```\n"]
    if own:
        parts.append(table(own))
    if links:
        parts.append(f"Common options: {'; '.join(links)}.\n")
    return "\n".join(parts)


def table(options: Options) -> str:
    """Return options as a Markdown table."""
    rows = (f"| {code(name)} | {text.replace('|', '&#124;')} |" for name, text in options.items())
    return "\n".join(["| option | description |", "|---|---|", *rows, ""])


def code(text: str) -> str:
    """Return the text in code font; Markdown dialects differ in how a table's code holds a `|`."""
    return f"`{text}`" if "|" not in text else f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
