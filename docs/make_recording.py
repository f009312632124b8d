"""Record docs/pictures/demo.svg: real commands in a terminal, interrupted and resumed.

`python docs/make_recording.py` needs the `docs` extra, jq, and llmcli with its default model. The SVG is animated with
SMIL, has no script and loads nothing, so it works in an <img>. Without animation, it shows the last frame.
"""

import fcntl
import html
import json
import os
import pty
import re
import select
import signal
import struct
import tempfile
import termios
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyte

DOCS = Path(__file__).parent
COLUMNS, ROWS = 92, 16
CELL_WIDTH, LINE_HEIGHT, FONT_SIZE = 8.4, 19, 14
PADDING, BAR_HEIGHT = 16, 32
KEY_S = 0.035  # seconds between typed characters
FRAME_S = 0.12  # seconds between frames, at least
IDLE_S = 0.5  # longer gaps between frames are cut to this
WORK_S = 7.0  # a longer run of llmcli plays faster, so that it takes this long
END_S = 4.0  # seconds that the last frame stays
COLORS = {
    "default": "#d4d7dd", "black": "#6b7280", "red": "#f28b82", "green": "#9ad17b", "brown": "#e5c07b",
    "blue": "#7fb3f5", "magenta": "#d6a6f0", "cyan": "#78d0cf", "white": "#ffffff",
}  # fmt: skip
BACKGROUND, BAR, BORDER = "#1b1f27", "#2a303b", "#454d5b"

TOPICS = {
    "clock": "The harbor clock of Port Ellery stopped in a storm in 1938. In 1951 Ada Finch, an apprentice, "
    "found a bird's nest in the case and repaired the clock.",
    "bridge": "The town of Halden opened a new footbridge over the Tista river on Saturday, two years after a flood "
    "destroyed the old one.",
    "ferry": "The ferry to Lund leaves at nine in the morning. From June on, a second boat leaves at noon.",
}
COUNT = 48


@dataclass
class Frame:
    """What the screen shows from `time` on: per row, a list of (column, text, color, is_bold)."""

    time: float
    rows: list[list[tuple[int, str, str, bool]]] = field(default_factory=list)


class Terminal:
    """A shell in a pseudo-terminal, whose screen is recorded."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.screen = pyte.Screen(COLUMNS, ROWS)
        self.stream = pyte.ByteStream(self.screen)
        self.frames: list[Frame] = []
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.clock, self.last = 0.0, time.monotonic()
        self.wait_for_prompt()

    def type(self, line: str) -> None:
        """Type a line as a person does, and press Enter."""
        for key in line:
            os.write(self.terminal, key.encode())
            self.read(KEY_S)
        self.read(0.3)
        os.write(self.terminal, b"\r")

    def read(self, seconds: float) -> None:
        """Take what the shell prints for that long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([self.terminal], [], [], left)
            if ready:
                self.stream.feed(os.read(self.terminal, 65536))
                self.record()

    def wait_for_records(self, count: int, timeout: float = 400) -> None:
        """Read until the progress line counts that many records."""
        end = time.monotonic() + timeout
        while not any(int(n) >= count for n in re.findall(r"(\d+) of \d+ records", "\n".join(self.screen.display))):
            if time.monotonic() > end:
                raise TimeoutError("no such progress line:\n" + "\n".join(self.screen.display))
            self.read(0.05)

    def wait_for_prompt(self, timeout: float = 400) -> None:
        """Read until the cursor is after an empty prompt."""
        end = time.monotonic() + timeout
        self.read(0.2)
        while self.screen.display[self.screen.cursor.y].rstrip() != "$" or self.screen.cursor.x != 2:
            if time.monotonic() > end:
                raise TimeoutError("no prompt:\n" + "\n".join(self.screen.display))
            self.read(0.05)

    def record(self) -> None:
        """Add a frame if the screen has changed."""
        now = time.monotonic()
        rows = [self.row(y) for y in range(ROWS)]
        if self.frames and rows == self.frames[-1].rows:
            return
        self.clock += min(now - self.last, IDLE_S)
        self.last = now
        if self.frames and self.clock - self.frames[-1].time < FRAME_S and len(self.frames) > 1:
            self.frames[-1].rows = rows
        else:
            self.frames.append(Frame(self.clock, rows))

    def row(self, y: int) -> list[tuple[int, str, str, bool]]:
        """Return the runs of equal style of a row."""
        runs: list[tuple[int, str, str, bool]] = []
        for x in range(COLUMNS):
            cell = self.screen.buffer[y][x]
            color = cell.fg if cell.fg in COLORS or len(cell.fg) == 6 else "default"
            if runs and runs[-1][2:] == (color, cell.bold):
                runs[-1] = (runs[-1][0], runs[-1][1] + cell.data, color, cell.bold)
            else:
                runs.append((x, cell.data, color, cell.bold))
        return [(x, text.rstrip(), color, bold) for x, text, color, bold in runs if text.strip()]

    def speed_up(self, first: int) -> None:
        """Play the frames from number `first` on in at most WORK_S seconds, and leave out those that come too fast."""
        start = self.frames[first].time
        factor = min(1, WORK_S / (self.clock - start))
        kept = self.frames[:first]
        for frame in self.frames[first:]:
            frame.time = start + (frame.time - start) * factor
            if frame.time - kept[-1].time < FRAME_S:
                kept[-1].rows = frame.rows
            else:
                kept.append(frame)
        self.frames, self.clock = kept, start + (self.clock - start) * factor

    def close(self) -> None:
        """End the shell."""
        os.close(self.terminal)
        os.kill(self.pid, signal.SIGHUP)
        os.waitpid(self.pid, 0)


def draw(frames: list[Frame]) -> str:
    """Return the SVG. Each row of text is there once for the time that it stays on the screen."""
    total = frames[-1].time + END_S
    width, height = 2 * PADDING + COLUMNS * CELL_WIDTH, BAR_HEIGHT + 2 * PADDING + ROWS * LINE_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        'aria-label="llmcli in a terminal">',
        f"<style>text{{font:{FONT_SIZE}px ui-monospace,'Cascadia Mono','SF Mono',Menlo,Consolas,'DejaVu Sans Mono',"
        "monospace;white-space:pre}</style>",
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="{BACKGROUND}"/>',
        f'<path d="M0 {BAR_HEIGHT}V10a10 10 0 0 1 10-10H{width - 10:.0f}a10 10 0 0 1 10 10V{BAR_HEIGHT}z" '
        f'fill="{BAR}"/>',
        *(f'<circle cx="{x}" cy="16" r="5.5" fill="{color}"/>'
          for x, color in ((20, "#f2766b"), (40, "#f0bd4f"), (60, "#5fc454"))),
    ]  # fmt: skip
    for y in range(ROWS):
        start = 0
        for i in range(1, len(frames) + 1):
            if i < len(frames) and frames[i].rows[y] == frames[start].rows[y]:
                continue
            if frames[start].rows[y]:
                begin, end = frames[start].time, frames[i].time if i < len(frames) else total
                parts.append(line(frames[start].rows[y], y, begin / total, end / total, total))
            start = i
    border = (
        f'<rect x=".5" y=".5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="10" fill="none" stroke="{BORDER}"/>'
    )
    return "\n".join([*parts, border, "</svg>", ""])


def line(runs: list[tuple[int, str, str, bool]], y: int, begin: float, end: float, total: float) -> str:
    """Return a row of text that is visible from `begin` to `end`, fractions of the `total` seconds."""
    baseline = BAR_HEIGHT + PADDING + y * LINE_HEIGHT + FONT_SIZE
    spans = "".join(
        f'<tspan x="{PADDING + x * CELL_WIDTH:.1f}" textLength="{len(text) * CELL_WIDTH:.1f}" '
        f'fill="{COLORS.get(color, f"#{color}")}"{" font-weight=" + chr(34) + "bold" + chr(34) if bold else ""}>'
        f"{html.escape(text)}</tspan>"
        for x, text, color, bold in runs
    )
    stays = end >= 1
    times = [(0, begin == 0), (begin, True)] if begin else [(0, True)]
    if not stays:
        times.append((end, False))
    key_times = ";".join(f"{at:.4f}" for at, _ in times)
    values = ";".join("visible" if shown else "hidden" for _, shown in times)
    animation = (
        f'<animate attributeName="visibility" dur="{total:.2f}s" repeatCount="indefinite" calcMode="discrete" '
        f'keyTimes="{key_times}" values="{values}"/>'
    )
    return f'<text y="{baseline}" visibility="{"visible" if stays else "hidden"}">{animation}{spans}</text>'


def main() -> None:
    """Record the session."""
    with tempfile.TemporaryDirectory(prefix="llmcli") as scratch:
        folder = Path(scratch)
        topics = list(TOPICS.values())
        records = (
            {"id": number, "text": f"Report {number}. {topics[(number - 1) * len(topics) // COUNT]}"}
            for number in range(1, COUNT + 1)
        )
        (folder / "articles.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "run").mkdir()
        environment = {
            **os.environ, "PS1": r"\[\e[32m\]$\[\e[0m\] ", "TERM": "xterm-256color",
            "COLUMNS": str(COLUMNS), "LINES": str(ROWS), "XDG_RUNTIME_DIR": str(folder / "run"),
            "HISTFILE": "/dev/null", "BASH_SILENCE_DEPRECATION_WARNING": "1",
        }  # fmt: skip
        terminal = Terminal(folder, environment)
        try:
            terminal.type("wc -l articles.jsonl")
            terminal.wait_for_prompt()
            run = "llmcli summarize --jsonl --max-new-tokens 60 --output out.jsonl --resume < articles.jsonl"
            terminal.type(run)
            first = len(terminal.frames)
            terminal.wait_for_records(COUNT // 3)
            terminal.read(1.5)
            os.write(terminal.terminal, b"\x03")
            terminal.wait_for_prompt()
            terminal.speed_up(first)
            terminal.type("wc -l out.jsonl")
            terminal.wait_for_prompt()
            terminal.read(1)
            terminal.type("# interrupted with Ctrl-C; the same command continues:")
            terminal.wait_for_prompt()
            terminal.type(run)
            first = len(terminal.frames)
            terminal.wait_for_prompt()
            terminal.speed_up(first)
            terminal.type("wc -l out.jsonl")
            terminal.wait_for_prompt()
            terminal.type("jq -r '[.id, .summary_text] | @tsv' out.jsonl | sed -n '1p;48p'")
            terminal.wait_for_prompt()
        finally:
            terminal.close()
    (DOCS / "pictures" / "demo.svg").write_text(draw(terminal.frames), encoding="utf-8")


if __name__ == "__main__":
    main()
