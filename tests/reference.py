"""docs/reference.md, from the help of the commands: `python tests/reference.py` writes it."""

import re
from functools import cache
from pathlib import Path

from typer.testing import CliRunner

from llmcli.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
HEAD = """# Commands and options

The help of all commands, written by `make docs`. Options that several commands have in common are described once, under
[Common options](#common-options).
"""
COMMON_HEAD = """## Common options

The page of each command lists the common options that it has.
"""
COMMON = ("Input", "Generation", "Model", "Output")  # sections; `generate` has all their options


@cache
def help(command: tuple[str, ...]) -> str:
    """Return the help of `llmcli COMMAND`, at 80 columns."""
    return CliRunner().invoke(app, [*command, "--help"], prog_name="llmcli", env={"COLUMNS": "80"}).output


def commands(group: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the group, and all commands in it, as their help lists them."""
    listed = help(group).partition("\nCommands:\n")[2]
    names = re.findall(r"^  (\S+)", listed, re.MULTILINE)
    return [group, *(command for name in names for command in commands((*group, name)))]


def split(command: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """Return the help before the first section, and the text of each section by its title."""
    text, *sections = re.split(r"^(\w.*):\n(?=  )", help(command), flags=re.MULTILINE)
    return text, dict(zip(sections[::2], sections[1::2], strict=True))


def common_sections() -> dict[str, str]:
    """Return the text of the sections that commands have in common, by their titles."""
    sections = split(("generate",))[1]
    return {title: sections[title] for title in COMMON}


def options(section: str) -> dict[str, str]:
    """Return the options of a section by their names, each with its lines of help."""
    entries = re.findall(r"^  -.*\n(?:   .*\n)*", section, re.MULTILINE)
    return {re.findall(r"--[\w-]+", entry)[0]: entry for entry in entries}


def describe(command: tuple[str, ...]) -> str:
    """Return the part of the page about one command."""
    text, sections = split(command)
    links: list[str] = []
    for title, common_text in common_sections().items():
        if title not in sections:
            continue
        common, own = options(common_text), options(sections[title])
        same = [name for name in common if own.get(name, "").split() == common[name].split()]
        sections[title] = "".join(entry for name, entry in own.items() if name not in same)
        missing = [name for name in common if name not in same]
        link = f"[{title.lower()}](#{title.lower()})"
        if not missing:
            links.append(f"all {link} options")
        elif len(missing) < len(same):
            links.append(f"all {link} options except {', '.join(f'`{name}`' for name in missing)}")
        else:
            links.append(f"the {link} options {', '.join(f'`{name}`' for name in same)}")
    body = text + "\n".join(f"{title}:\n{section}" for title, section in sections.items() if section.strip())
    body = re.sub(r"\n{3,}", "\n\n", body)
    part = f"## `{' '.join(('llmcli', *command))}`\n\n```text\n{body.strip()}\n```\n"
    return part + (f"\nCommon options: {'; '.join(links)}.\n" if links else "")


def page() -> str:
    """Return the whole page."""
    common = [f"### {title}\n\n```text\n{text.rstrip()}\n```\n" for title, text in common_sections().items()]
    return "\n".join([HEAD, *map(describe, commands()), COMMON_HEAD, *common])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
