"""What a person sees while records are run, and the summary of --stats."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios

import pytest

from llmcli import console
from llmcli.io import progress as progress_module
from llmcli.io.progress import Progress, RunCounts
from llmcli.job import Failure, Record, Result
from llmcli.models import memory

GREEDY = ("--temperature", 0, "--batch-size", 1, "--max-new-tokens", 8)
LONG_NAME = "a field with a name that is longer than many a terminal is wide, which is no reason to break it"
ERROR = f"error: {{path}}:2: missing field 'text': available fields: {LONG_NAME}\n"
COUNT = "error: 1 of 40 records failed\n"


@pytest.fixture(autouse=True)
def xterm(monkeypatch):
    """A terminal that can do what most can, looked at often."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "REFRESH", 200)


@pytest.fixture
def lines(tmp_path):
    """40 records, of which the second lacks its text."""
    records = [{"text": f"the quick brown fox {i}"} for i in range(40)]
    records[1] = {LONG_NAME: 1}
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def run(llmcli, tiny, lines, tmp_path, monkeypatch):
    """All lines into a file, in a terminal of so many columns where `columns` is given."""

    def run(*args, columns=None):
        monkeypatch.setenv("COLUMNS", str(columns))
        args = ("generate", "-m", tiny, "--jsonl", "-f", lines, *GREEDY, "--output", tmp_path / "out", *args)
        return llmcli(*args, is_terminal=columns is not None)

    return run


def shown(stderr):
    """What stood on the screen's last line, one after another, and the lines that stayed above it."""
    texts = re.sub(r"\x1b\[\??\d*[A-Za-z]", "", stderr)
    frames = re.findall(rf"[{console.SPINNER}] ([^\r\n]*)", texts)
    return frames, re.sub(rf"\r?[{console.SPINNER}] [^\r\n]*", "", texts)


def summary(stderr):
    return json.loads(stderr.splitlines()[-1])


def test_a_person_sees_how_far_it_is(run, lines):
    frames, lasting = shown(run(columns=120).stderr)
    pattern = r"\d+ of 40 records, 1 failed, 0:0\d:\d\d left, \S+ records/s, \d+ tokens/s"
    assert [frame for frame in frames if re.fullmatch(pattern, frame)]
    done = [int(frame.split()[0]) for frame in frames if frame]
    assert done == sorted(done)
    assert any("loading" in frame for frame in frames)
    assert [line for line in lasting.replace("\r", "").splitlines() if line] == [
        *(ERROR.format(path=lines) + COUNT).splitlines()
    ]


def test_a_narrow_terminal_has_one_narrow_line(run, lines):
    frames, lasting = shown(run(columns=40).stderr)
    assert max(map(len, frames)) == 38
    assert any(frame.endswith("…") for frame in frames)
    assert ERROR.format(path=lines) in lasting


@pytest.mark.parametrize(
    ("args", "columns", "term"),
    [((), None, "xterm"), (("-q",), 80, "xterm"), ((), 80, "dumb")],
    ids=["no terminal", "quiet", "dumb"],
)
def test_errors_alone_where_a_line_cannot_be_rewritten_or_is_not_wanted(run, lines, monkeypatch, args, columns, term):
    monkeypatch.setenv("TERM", term)
    assert run(*args, columns=columns).stderr.replace("\r", "") == ERROR.format(path=lines) + COUNT


def test_results_that_scroll_by_are_progress_enough(llmcli, tiny, lines):
    ran = llmcli("generate", "-m", tiny, "--jsonl", "-f", lines, *GREEDY, is_terminal=True)
    assert {frame for frame in shown(ran.stderr)[0] if frame} == {f"loading {tiny}"}


def test_a_single_record_is_not_counted(llmcli, tiny, tmp_path):
    ran = llmcli("generate", "the", "-m", tiny, *GREEDY, "--output", tmp_path / "out", is_terminal=True)
    assert {frame for frame in shown(ran.stderr)[0] if frame} == {f"loading {tiny}"}


def test_what_is_done_within_stands_on_the_same_line(llmcli, encoder, tmp_path):
    (tmp_path / "notes").write_text("the fox")
    frames, _ = shown(llmcli("search", "a dog", tmp_path / "notes", "-m", encoder, is_terminal=True).stderr)
    assert f"embedding passages of file 1 of 1, loading {encoder}"[:77] in {frame[:77] for frame in frames}


@pytest.mark.slow
def test_rich_is_not_imported_where_nobody_is_watching(tiny, lines):
    args = ["generate", "-m", str(tiny), "--jsonl", "-f", str(lines), *map(str, GREEDY)]
    # The httpx of huggingface_hub 1 imports rich, too.
    code = (
        "import sys; import huggingface_hub.errors; known = 'rich' in sys.modules;"
        f"from llmcli.cli import main; main({args}); sys.exit(not known and 'rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_rate_knows_nothing_of_loading_and_of_an_earlier_run(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: now)
    progress = Progress(RunCounts(records=100, failed=2))
    records = [Record({}, input_fraction=i / 1000) for i in range(1, 201)]
    result = Result(records[0], {"usage": {"prompt_tokens": 5, "completion_tokens": 8}})

    def line(seconds, done):
        nonlocal now
        now = seconds
        for _ in range(done):
            progress.done.add(result)
        return progress.line()

    reading = progress.track(records)
    for _ in records:
        next(reading)
    progress.done.add(Result(records[0], failure=Failure("x", "y")))
    assert line(0, 0) == "101 of ~1000 records, 3 failed"
    assert line(60, 10) == "111 of ~1000 records, 3 failed"
    assert line(70, 20) == "131 of ~1000 records, 3 failed, 0:07:14 left, 2 records/s, 16 tokens/s"
    assert line(80, 0) == "131 of ~1000 records, 3 failed, 0:07:04 left, 2 records/s, 16 tokens/s"
    assert list(reading) == []
    assert line(80, 69) == "200 of 200 records, 3 failed, 0:00:00 left, 4.5 records/s, 36 tokens/s"


def test_stats(run):
    ran = run("--stats", "-q")
    assert ran.exit_status == 3
    about = summary(ran.stderr)
    assert about["model"].endswith("tiny-llama")
    assert [about[name] for name in ("records", "failed", "carried_over")] == [40, 1, 0]
    assert about["prompt_tokens"] > 39
    assert about["completion_tokens"] == 39 * 8
    assert about["records_per_second"] == pytest.approx(40 / about["seconds"], rel=0.01)
    assert about["tokens_per_second"] == pytest.approx(39 * 8 / about["seconds"], rel=0.01)
    assert about["peak_memory_bytes"] > 10**8


def test_stats_have_the_peak_before_the_batches(run):
    peak = len(bytearray(b"x") * (memory.peak_memory() + 10**8))
    assert summary(run("--stats", "-q", "--batch-size", 8).stderr)["peak_memory_bytes"] >= peak


def test_stats_of_what_went_before(run, llmcli, tiny, tmp_path):
    assert "seconds" not in run("--resume").stderr
    again = summary(run("--resume", "--stats").stderr)
    assert (again["records"], again["failed"], again["records_per_second"]) == (40, 1, 0)
    rows = (tmp_path / "out").read_bytes()
    ran = llmcli("generate", "-m", tiny, "--jsonl", "--field", "generated_text", *GREEDY, "--stats", stdin=rows)
    about = summary(ran.stderr)
    assert (about["records"], about["failed"], about["carried_over"], ran.exit_status) == (40, 0, 1, 0)


def test_stats_where_it_stops(run):
    ran = run("--stats", "--on-error", "stop")
    assert ran.exit_status == 1
    about = next(json.loads(line) for line in ran.stderr.splitlines() if line.startswith("{"))
    assert (about["records"], about["failed"]) == (2, 1)


def test_stats_where_nothing_is_generated(llmcli, encoder, tmp_path):
    about = summary(llmcli("embed", "the fox", "-m", encoder, "--stats").stderr)
    assert (about["records"], about["completion_tokens"], about["tokens_per_second"]) == (1, None, None)
    assert about["prompt_tokens"] > 0
    (tmp_path / "notes").write_text("the fox")
    about = summary(llmcli("search", "a dog", tmp_path / "notes", "-m", encoder, "--stats").stderr)
    assert (about["records"], about["prompt_tokens"]) == (1, None)


def test_a_conversation_has_no_stats(llmcli, tiny):
    assert llmcli("chat", "-m", tiny, "--stats").exit_status == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_the_screen_in_order_and_its_stats(tiny, lines, tmp_path, number):
    terminal, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 40))
    lines.write_text("".join(f'{{"text": "the fox {i}"}}\n' for i in range(4000)))
    command = [sys.executable, "-m", "llmcli", "generate", "-m", tiny, "--jsonl", "-f", lines, *GREEDY, "--stats"]
    with open(tmp_path / "out", "wb") as out:
        process = subprocess.Popen([str(word) for word in command], stdin=theirs, stdout=out, stderr=theirs)
    os.close(theirs)
    screen = b""
    while b" left" not in screen:
        screen += os.read(terminal, 4096)
    process.send_signal(number)
    with contextlib.suppress(OSError):  # its end, on Linux
        while chunk := os.read(terminal, 4096):
            screen += chunk
    os.close(terminal)
    assert process.wait() == 128 + number
    frames, lasting = shown(screen.decode())
    assert max(map(len, frames)) <= 38
    assert re.search(r"\d+ of ~\d{4} records", frames[-1] or frames[-2])
    about = summary(lasting)
    written = len((tmp_path / "out").read_text().splitlines())
    assert written - 1 <= about["records"] <= written  # the signal may come between a result and its count
    assert about["records"] > 0
    assert screen.rindex(b"\x1b[?25h") < screen.rindex(b"{")  # the cursor is back


@pytest.mark.slow
def test_a_terminal_that_goes_away_is_no_failure(tiny, lines, tmp_path):
    terminal, theirs = pty.openpty()
    command = [sys.executable, "-m", "llmcli", "generate", "-m", tiny, "--jsonl", "-f", lines, *GREEDY]
    with open(tmp_path / "out", "wb") as out:
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=theirs)
    os.close(theirs)
    os.read(terminal, 1)
    os.close(terminal)
    assert process.wait() == 3
    assert len((tmp_path / "out").read_text().splitlines()) == 40
