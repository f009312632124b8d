"""What reaches a terminal: text, and no control characters but llmcli's own. Pipes and files get the exact bytes."""

import contextlib
import io
import json
import logging
import os
import pty
import random
import re
import sys
import termios
import threading
import tty
from collections.abc import Callable
from pathlib import Path

import pytest
from weights import register

from llmcli import console
from llmcli.io.output import Output, OutputFormat, print_table
from llmcli.job import Record, Result
from llmcli.text.terminal import MAX_SEQUENCE, Sanitizer, sanitize

SEED = 15
MARK = "\ufffd"
ONE = [  # a terminal shows nothing of them, and each becomes one mark
    "\x1b[31m", "\x1b[2J", "\x1b[1;1H", "\x1b[?1049h", "\x1b[6n", "\x1b[>c", "\x1b[c", "\x1b[!p", "\x1b[ q",
    "\x1b[38:2::1:2:3m", "\x9b31m", "\x9b2J", "\x9b?25l", "\x1b]0;title\x07", "\x1b]0;title\x1b\\",
    "\x1b]0;title\x9c", "\x9d2;title\x07", "\x9d2;title\x9c", "\x1b]52;c;cm0gLXJmIH4=\x07",
    "\x1b]8;;https://example.org\x1b\\", "\x1b]4;1;?\x07", "\x1b]50;?\x07",
    "\x1b]1337;File=inline=1:AAAA\x07", "\x1b]133;C\x1b\\", "\x1bP$q q\x1b\\", "\x1bP+q544e\x1b\\",
    "\x90q#0\x9c", "\x1b_Gf=100;AAAA\x1b\\", "\x9fG\x9c", "\x1b^private\x1b\\", "\x9eprivate\x9c",
    "\x1bXstart\x1b\\", "\x98start\x9c", "\x1bc", "\x1b7", "\x1b8", "\x1bM", "\x1bD", "\x1bE", "\x1bH",
    "\x1bN", "\x1bZ", "\x1b=", "\x1b>", "\x1b(0", "\x1b#8", "\x1b%G", "\x1b F", "\x1b\\", "\x84", "\x85",
    "\x8d", "\x9c", "\r", "\x00", "\x05", "\x07", "\x08", "\x0b", "\x0c", "\x0e", "\x0f", "\x11", "\x13",
    "\x18", "\x1a", "\x1b", "\x7f", "\u202a", "\u202b", "\u202c", "\u202d", "\u202e", "\u2066", "\u2067",
    "\u2068", "\u2069", "\u200e", "\u200f", "\u061c", "\u2028", "\u2029",
]  # fmt: skip
CUT = [  # sequences without an end, or with another sequence or a control character in the middle
    "\x1b]0;title", "\x1b]0;title\nnext", "\x1bPdata", "\x1b_data", "\x9dtitle", "\x1b[", "\x1b[31", "\x9b",
    "\x1b[3\r1m", "\x1b]0;a\x1b[31mb\x07", "\x1b]0;a\x9bb\x07", "\x1b\x1b[31m", "\x1b[\x1b]0;x\x07",
    "\x1b]\x18x\x07", "\x1b\r\n", "\r\r\n", "\x1b(", "\x1b]0;" + "a" * 2 * MAX_SEQUENCE + "\x07",
    "\x1b[" + "1;" * MAX_SEQUENCE + "m", "\x1b" * 50, "\x9d" * 50, "\udc9b31m", "\x1b[31\u0300m", "\x1b[31字m",
]  # fmt: skip
CORPUS = ONE + CUT
PLAIN = [
    "the quick brown fox\n\tsleeps\n", "你好，世界", "مرحبا", "שלום", "👩‍👩‍👧 🇫🇷 ☕️", "e\u0301\u0323", "█▓░─│",
    "\ue0b0", "a\u00a0b", "",
]  # fmt: skip
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
COLORS = re.compile(r"\x1b\[[\d;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A|\r")  # of rich, whose texts are checked without


def is_safe(screen: str) -> bool:
    return not FORBIDDEN.search(screen)


class Screen:
    """A pseudo-terminal in raw mode: what comes is what was written. It is stdout and stderr once it is opened."""

    def open(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.descriptor, slave = pty.openpty()
        tty.setraw(slave, termios.TCSANOW)
        file = open(slave, "wb")  # noqa: SIM115  # `text` closes it
        self.stream = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        self.data = b""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stdout", self.stream)
        monkeypatch.setattr(sys, "stderr", self.stream)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the end, on Linux
            while chunk := os.read(self.descriptor, 65536):
                self.data += chunk

    def text(self) -> str:
        """Close the terminal, and return what was written to it."""
        self.stream.close()
        self.reader.join(20)
        os.close(self.descriptor)
        return self.data.decode()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Screen]:
    """`screen()` opens a terminal for stdout and stderr."""

    def open_screen() -> Screen:
        opened = Screen()
        opened.open(monkeypatch)
        return opened

    return open_screen


def run(*args: object) -> int:
    from llmcli import cli

    return cli.main([str(arg) for arg in args])


def test_corpus_has_enough_sequences():
    assert len(ONE) >= 40


@pytest.mark.parametrize("sequence", CORPUS, ids=ascii)
def test_sequence_split_anywhere_becomes_marks(sequence):
    text = f"前{sequence}後 after\n"
    whole = sanitize(text)
    assert is_safe(whole)
    assert whole.startswith("前")
    assert whole.endswith("後 after\n")  # also after an OSC that never ends
    if sequence in ONE:
        assert whole == f"前{MARK}後 after\n"
    for i in range(len(text) + 1):
        sanitizer = Sanitizer()
        pieces = [sanitizer.feed(text[:i]), sanitizer.feed(text[i:]), sanitizer.flush()]
        assert "".join(pieces) == whole
        assert all(map(is_safe, pieces))
    sanitizer = Sanitizer()
    assert "".join([*map(sanitizer.feed, text), sanitizer.flush()]) == whole


def test_random_splits_give_the_same_text():
    rng = random.Random(SEED)
    alphabet = [*"\x1b\x9b\x9d\x9c\x07\r\n[]P\\;1m a字", "\u202e", "\udc9b"]
    for _ in range(3000):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 30)))
        sanitizer, pieces, rest = Sanitizer(), [], text
        while rest:
            size = rng.randint(1, 5)
            pieces.append(sanitizer.feed(rest[:size]))
            rest = rest[size:]
        pieces.append(sanitizer.flush())
        assert "".join(pieces) == sanitize(text), ascii(text)
        assert is_safe("".join(pieces))


def test_unfinished_string_is_shown_soon():
    sanitizer = Sanitizer()
    shown = sanitizer.feed("\x1b]0;") + "".join(sanitizer.feed("word ") for _ in range(MAX_SEQUENCE))
    assert len(shown) > 4 * MAX_SEQUENCE


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_stays_as_it_is(text):
    assert sanitize(text) == text
    sanitizer = Sanitizer()
    assert "".join([*map(sanitizer.feed, text)]) == text


def test_line_end_of_windows_is_a_line_end():
    assert sanitize("one\r\ntwo\r\n") == "one\ntwo\n"


# ---- stdout


def test_stream_of_sequences_split_anywhere(screen):
    terminal = screen()
    for sequence in CORPUS:
        for i in range(len(sequence) + 1) if len(sequence) < 99 else (0, 1, 99):
            output = Output(OutputFormat.TEXT, model="m")
            output.stream(f"a{sequence[:i]}")
            output.stream(sequence[i:])
            output.write(Result(Record({}), {}, f"a{sequence}b"))
    shown = terminal.text()
    assert is_safe(shown)
    assert shown.count("a") >= len(CORPUS)


@pytest.mark.parametrize(
    "format", [form for form in OutputFormat if form not in (OutputFormat.NULL, OutputFormat.PARQUET)]
)
def test_results_in_every_format(screen, format):
    terminal = screen()
    for sequence in CORPUS:
        output = Output(format, model=sequence, names={name: name for name in ("generated_text", "model", "file")})
        output.write(
            Result(Record({"text": sequence, sequence: "x"}, sequence), {"generated_text": sequence}, sequence)
        )
    assert is_safe(terminal.text())


def test_nul_that_ends_a_result_stays(screen):
    terminal = screen()
    Output(OutputFormat.NULL, model="m").write(Result(Record({}), {}, "a\x1b[31mb"))
    assert terminal.text() == f"a{MARK}b\0"


def test_interrupted_stream_ends_its_line(screen):
    terminal = screen()
    with contextlib.suppress(KeyboardInterrupt), Output(OutputFormat.TEXT, model="m") as output:
        output.stream("a\x1b]0;b")
        raise KeyboardInterrupt
    assert terminal.text() == f"a{MARK}0;b\n"


def test_pipe_and_file_get_exact_bytes(tmp_path, monkeypatch):
    pipe = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", pipe)
    text = "".join(CORPUS)
    for path in (None, tmp_path / "out"):
        output = Output(OutputFormat.TEXT, model="m", path=path)
        for character in text:
            output.stream(character)
        output.write(Result(Record({}), {}, text))
    expected = text.encode("utf-8", "backslashreplace") + b"\n"
    assert pipe.buffer.getvalue() == (tmp_path / "out").read_bytes() == expected


def test_errors_in_a_pipe_are_exact(llmcli, tiny, tmp_path):
    name = tmp_path / "\x1b[31m.jsonl"
    name.write_text('{"\x9b31m": 1}\n')
    assert "\x1b[31m.jsonl" in llmcli("generate", "-m", tiny, "--jsonl", "-f", name).stderr


def test_table_shows_markup_as_text(screen):
    terminal = screen()
    print_table(
        ("MODEL", "LICENSE"), [("[red]a", "[link=https://example.org]MIT[/link]"), ("\x1b]0;t\x07", "\x9b1m\r")]
    )
    shown = COLORS.sub("", terminal.text())
    assert is_safe(shown)
    assert "[red]a" in shown
    assert "[link=https://example.org]MIT[/link]" in shown


@pytest.mark.parametrize("sequence", ["\x1b]0;title\x07", "\x9b31m", "\r", "\u202e"], ids=ascii)
def test_registry_and_worker_tables_are_safe(screen, sequence, monkeypatch):
    terminal = screen()
    from llmcli.engines.worker import client

    model = {"model": sequence, "device": sequence, "dtype": sequence, "bytes": 1, "jobs": 0, "idle_seconds": None}
    status = {"models": [{**model, "expires_in_seconds": None}], "pid": sequence, "memory": 1, "jobs": 0}
    monkeypatch.setattr(client, "status", lambda: status)
    path = Path(os.environ["XDG_CONFIG_HOME"], "llmcli", "models.toml")
    register("mine", hub="org/name", license=sequence, description=sequence)
    assert path.exists()
    for command in (["models", "list"], ["models", "show", "mine"], ["ps"]):
        assert run(*command) == 0
    assert is_safe(COLORS.sub("", terminal.text().replace("\r\n", "\n")))


def test_search_shows_no_sequence_of_files(screen, encoder, tmp_path):
    terminal = screen()
    for i, sequence in enumerate(CORPUS):
        with contextlib.suppress(OSError, ValueError):  # names that a file cannot have
            (tmp_path / f"{i}{sequence.replace('/', '')}.txt").write_bytes(
                f"dog {sequence} fox".encode(errors="ignore")
            )
        (tmp_path / f"{i}.txt").write_bytes(f"fox {sequence} dog".encode(errors="ignore"))
    files = sorted(tmp_path.glob("*.txt"))
    bad = tmp_path / "\x1b]0;bad\x07.txt"
    bad.write_bytes(b"\xff")
    assert run("search", "fox", *files, bad, "-m", encoder, "-n", 1000) == 3
    shown = terminal.text()
    assert shown.count("fox") >= len(CORPUS)
    assert "cannot decode byte" in shown
    assert is_safe(COLORS.sub("", shown))


# ---- stderr


@pytest.mark.parametrize("verbose", [False, True])
def test_errors_show_no_sequence_of_records(screen, tiny, tmp_path, verbose):
    terminal = screen()
    lines = [json.dumps({sequence: 1}) for sequence in CORPUS]
    lines += [f'{{"text": {sequence}'.replace("\n", "") for sequence in CORPUS]
    path = tmp_path / "\x1b[2J.jsonl"
    path.write_text("\n".join(lines), errors="ignore")
    assert run("generate", "-m", tiny, "--jsonl", "-f", path, *["-v"] * verbose) == 3
    shown = terminal.text()
    assert shown.count("error: ") >= 2 * len(CORPUS)
    assert is_safe(COLORS.sub("", shown))


@pytest.mark.parametrize(
    "args",
    [
        ("generate", "--\x1b]0;x\x07"),
        ("generate", "-m", "\x1b[2J", "x"),
        ("generate", "-m", "org/\x9b2J", "x"),
        ("\x1b[2J",),
        ("chat", "x", "\x9d0;x\x9c"),
        ("generate", "-f", "\x1b[2J\r\u202e"),
        ("translate", "--to", "\x1b[2J", "x"),
        ("generate", "-o", "\x1b[2J=1", "x"),
    ],
)
def test_usage_errors_show_no_sequence_of_arguments(screen, args):
    terminal = screen()
    assert run(*args) in (2, 4)
    shown = terminal.text()
    assert MARK in shown or re.search(r"\\x(1b|9)", shown)
    assert is_safe(shown)


def test_usage_error_in_ascii_shows_no_sequence(screen, monkeypatch):
    terminal = screen()
    ascii_stream = io.TextIOWrapper(terminal.stream.buffer, encoding="ascii", errors="backslashreplace", newline="")
    monkeypatch.setattr(sys, "stderr", ascii_stream)
    assert run("generate", "--\x1b]0;x\x07") == 2
    ascii_stream.detach()
    shown = terminal.text()
    assert "No such option" in shown
    assert is_safe(shown)


def test_traceback_shows_no_sequence(screen, monkeypatch, tiny):
    terminal = screen()
    from llmcli.models import loading

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("\x1b]0;x\x07 \x9b31m \r")

    monkeypatch.setattr(loading, "load", fail)
    assert run("generate", "-m", tiny, "-v", "x") == 4
    shown = terminal.text()
    assert "Traceback" in shown
    assert is_safe(COLORS.sub("", shown))


def test_library_messages_are_safe_beside_the_live_line(screen):
    terminal = screen()
    with console.sanitized(), console.working("loading \x1b]0;x\x07\x9b31m"):
        print("printed \x1b]0;x\x07\x9b31m\x1b]8;;https://example.org\x1b\\", file=sys.stderr)
        logging.StreamHandler().emit(logging.makeLogRecord({"msg": "logged \x1b[2J\x9b31m"}))
        console.notice("noted \x1b]8;;https://example.org\x1b\\ \x9b31m")
        with console.without_live_line():
            sys.stderr.writelines(["\rline \x1b[A \x1b]0;x\x07\x9b31m"])
        with console.progress("pulling [red] \x1b]0;x\x07\x9b31m", 10) as advance:
            advance(5)
    shown = terminal.text()
    for word in ("loading", "printed", "logged", "noted", "line", "pulling [red]"):
        assert word in shown
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown
    assert is_safe(COLORS.sub("", shown.replace("\x1b[A", "")))
    assert sys.stderr is terminal.stream


def test_figures_keep_their_colors_and_nothing_else(screen, tiny, monkeypatch):
    terminal = screen()
    monkeypatch.setenv("COLORTERM", "truecolor")
    text = "the \x1b]0;x\x07 \x9b31m fox \u202e"
    for command in (["inspect", "tokens"], ["inspect", "next"], ["inspect", "attention"], ["score", "--tokens"]):
        assert run(*command, "-m", tiny, text) == 0
    shown = terminal.text()
    assert "\x1b[48;2;" in shown or "\x1b[30;48;2;" in shown
    assert is_safe(COLORS.sub("", shown))
