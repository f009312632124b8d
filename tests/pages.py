"""The project's pages, followed as a reader follows them: a block's commands run in one shell, in a folder that has the
files they name, on a terminal of 80 columns. `python tests/pages.py README.md ...` writes what they print anew."""

import math
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import tty
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^(?:<!-- (varies) -->\n)?^```(console|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FRACTION = re.compile(r"-?\d+\.\d+")
COLOURS = re.compile(r"\x1b\[[\d;]*m")
MARK = "\x1e end \x1e"  # which no model writes


@dataclass
class Command:
    """A command line, and the lines shown below it."""

    line: str
    shown: list[str] = field(default_factory=list)


@dataclass
class Ran:
    stdout: str
    stderr: str
    status: int

    @property
    def lines(self) -> list[str]:
        """As a page shows them: results, then what stderr has to say."""
        return [line.rstrip() for text in (self.stdout, self.stderr) for line in COLOURS.sub("", text).splitlines()]


@dataclass
class Block:
    """`varies`: what it prints differs from run to run. `console`: what it prints is shown."""

    page: str
    number: int
    console: bool
    varies: bool
    commands: list[Command]

    def __str__(self) -> str:
        return f"{self.page}:{self.number}"


def pages() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]


def blocks(path: Path) -> list[Block]:
    """Those of a page that hold command lines."""
    found, text = [], path.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        lines = match[3].splitlines()
        if match[2] == "sh":
            commands = [Command("\n".join(["(set -eo pipefail", *lines, ")"]))]
        else:
            commands = []
            for line in lines:
                if line.startswith("$ "):
                    commands.append(Command(line[2:]))
                else:
                    commands[-1].shown.append(line)
        number = text.count("\n", 0, match.start(3))
        name = str(path.relative_to(ROOT))
        found.append(Block(name, number, match[2] == "console", bool(match[1]), commands))
    return found


def follow(commands: list[Command], folder: Path, environment: dict[str, str], timeout: float = 300) -> list[Ran]:
    """What each prints, and how it ends; one shell runs them all, its stdout a terminal."""
    end = f"""__=$?; printf '{MARK}%d{MARK}' $__; printf '{MARK}' >&2; (exit $__)\n"""
    script = "".join(f"{command.line}\n{end}" for command in commands)
    ours, theirs = pty.openpty()
    tty.setraw(theirs, termios.TCSANOW)
    shell = subprocess.Popen(
        ["bash", "-c", script], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=theirs,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    out, err = bytearray(), bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 65536):
                out.extend(data)
        except OSError:  # the terminal's other end is gone
            pass

    readers = [threading.Thread(target=read), threading.Thread(target=lambda: err.extend(shell.stderr.read()))]
    for reader in readers:
        reader.start()
    try:
        shell.wait(timeout)
    finally:
        if shell.returncode is None:
            os.killpg(shell.pid, signal.SIGKILL)
    for reader in readers:
        reader.join(20)
    os.close(ours)
    said, statuses = out.decode().split(MARK), err.decode().split(MARK)
    return [Ran(said[2 * i], statuses[i], int(said[2 * i + 1])) for i in range(len(commands))]


def agrees(shown: list[str], printed: list[str]) -> bool:
    """Whether a page tells the truth; a line `...` stands for any."""
    if not shown:
        return not printed
    if shown[0] == "...":
        return any(agrees(shown[1:], printed[i:]) for i in range(len(printed) + 1))
    return bool(printed) and _is_same(shown[0].rstrip(), printed[0]) and agrees(shown[1:], printed[1:])


def _is_same(shown: str, printed: str) -> bool:
    """Letter by letter; but the last digits of what was computed in float32 differ from run to run."""
    if FRACTION.split(shown) != FRACTION.split(printed):
        return False
    return all(
        math.isclose(float(a), float(b), rel_tol=2e-4, abs_tol=1.01 * 0.1 ** len(a.partition(".")[2]))
        for a, b in zip(FRACTION.findall(shown), FRACTION.findall(printed), strict=True)
    )


def write(path: Path, folder: Path, environment: dict[str, str]) -> None:
    """The page with what its blocks print now, where that does not vary and nothing is left out."""
    text, done = path.read_text(encoding="utf-8"), 0
    matches = list(FENCE.finditer(text))
    parts = []
    for match, block in zip(matches, blocks(path), strict=True):
        parts.append(text[done : match.start(3)])
        done = match.end(3)
        if not block.console or block.varies or any("..." in command.shown for command in block.commands):
            parts.append(match[3])
            continue
        for command, ran in zip(block.commands, follow(block.commands, folder, environment), strict=True):
            parts.append("".join(f"{line}\n" for line in [f"$ {command.line}", *ran.lines]))
    path.write_text("".join(parts) + text[done:], encoding="utf-8")


def main() -> None:
    import tempfile

    import sandbox

    with tempfile.TemporaryDirectory(prefix="llmcli") as scratch, sandbox.real(Path(scratch)) as (folder, environment):
        for name in sys.argv[1:]:
            write(ROOT / name, folder, environment)


if __name__ == "__main__":
    main()
