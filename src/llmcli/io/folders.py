"""Find the files in directories, without hidden files and symbolic links. `.gitignore` is not read."""

import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain

from llmcli import console
from llmcli.errors import UsageError, reason

WILDCARDS = re.compile(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])")
REGEXES = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
START_BYTES = 1 << 13  # of a file: a NUL among them tells that it is binary


def find_files(directory: str, globs: Sequence[str]) -> Iterator[str]:
    """Yield the paths of the regular files in a directory and below, "" being the working directory.

    The last of the `globs` that matches a path decides. With `!`, it leaves out a file, or a directory with its files.
    `*.md` and `docs/*.md` match the end of a path; `**` matches any directories.
    """
    directories = [directory]
    while directories:
        directory = directories.pop()
        try:
            with os.scandir(directory or ".") as entries:
                visible = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
        except OSError as exc:
            console.warning(f"skipped {directory!r}: {reason(exc)}")
            continue
        below = []
        for entry in visible:
            path, is_directory = os.path.join(directory, entry.name), entry.is_dir(follow_symlinks=False)
            if _is_selected(path, globs, is_directory):
                below += [path] * is_directory
                if entry.is_file(follow_symlinks=False):
                    yield path
        directories += reversed(below)


def is_binary(path: str) -> bool:
    with open(path, "rb") as file:
        return b"\0" in file.read(START_BYTES)


def _is_selected(path: str, globs: Sequence[str], is_directory: bool) -> bool:
    for glob in reversed(globs):
        pattern = glob.removeprefix("!").removesuffix("/")
        if (is_directory or not glob.endswith("/")) and _matches(path, pattern):
            return not glob.startswith("!")
    return is_directory or all(glob.startswith("!") for glob in globs)


def _matches(path: str, pattern: str) -> bool:
    """Return whether the end of a path, from the beginning of a name on, matches a pattern."""
    return _compile(pattern).fullmatch(path) is not None


@cache
def _compile(pattern: str) -> re.Pattern[str]:
    parts = WILDCARDS.split(pattern)
    known = (
        REGEXES.get(part) or re.sub(r"^\[!", "[^", re.sub(r"(?<!^)[\[\\]", r"\\\g<0>", part)) for part in parts[1::2]
    )
    regex = "".join(chain.from_iterable(zip(map(re.escape, parts[::2]), [*known, ""], strict=True)))
    try:
        return re.compile(f"(?:.*/)?{regex}", re.DOTALL)
    except re.error as exc:
        raise UsageError(f"invalid --glob {pattern!r}: {exc}") from exc
