"""--output with --resume: what was interrupted goes on, and ends as if it had never been."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

WORDS = ["the", "quick", "brown", "fox", "a", "lazy", "dog", "sleeps"]


@pytest.fixture
def lines(tmp_path):
    """300 records of mixed length, of which every 50th lacks its text."""
    choose = random.Random(1)
    records = [{"id": i, "text": " ".join(choose.choices(WORDS, k=choose.randint(1, 30)))} for i in range(300)]
    for record in records[::50]:
        del record["text"]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def command(tiny, lines, tmp_path):
    return ["generate", "-m", tiny, "--jsonl", "-f", lines, "--temperature", 0, "--max-new-tokens", 8,
            "--dtype", "float32", "--resume", "--output"]  # fmt: skip


@pytest.fixture
def whole(llmcli, command, tmp_path):
    """What a run that is never interrupted writes."""
    path = tmp_path / "whole.jsonl"
    ran = llmcli(*command, path)
    assert ran.exit_status == 3
    return path.read_bytes()


def test_a_whole_file_stays_and_the_exit_code_too(llmcli, command, whole, tmp_path):
    ran = llmcli(*command, tmp_path / "whole.jsonl")
    assert ran.exit_status == 3
    assert (tmp_path / "whole.jsonl").read_bytes() == whole


@pytest.mark.parametrize("kept", [0, 1, 700, 0.3, 0.999])
def test_a_file_cut_anywhere_is_completed(llmcli, command, whole, tmp_path, kept):
    path = tmp_path / "whole.jsonl"
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    state = path.with_name("whole.jsonl.state")
    state.write_text("".join(line for line in state.read_text().splitlines(keepends=True) if "status" not in line))
    ran = llmcli(*command, path)
    assert ran.exit_status == 3
    assert path.read_bytes() == whole


def test_what_has_changed_is_refused(llmcli, command, whole, lines, tmp_path):
    path = tmp_path / "whole.jsonl"
    for args in ([*command, path, "--seed", 3], [*command, path, "--dtype", "bfloat16"]):
        ran = llmcli(*args)
        assert (ran.exit_status, "the command has changed" in ran.stderr) == (2, True)
    lines.write_text(lines.read_text().replace("fox", "dog"))
    ran = llmcli(*command, path)
    assert (ran.exit_status, "the input has changed" in ran.stderr) == (2, True)
    assert path.read_bytes() == whole


def test_a_pipe_that_brings_something_else_is_noticed(llmcli, command, whole, lines, tmp_path, monkeypatch):
    from llmcli import resume

    monkeypatch.setattr(resume, "CHECK_EVERY", 0)
    args = [part for part in command if part not in ("-f", lines)]
    path = tmp_path / "piped.jsonl"
    assert llmcli(*args, path, stdin=lines.read_bytes()).exit_status == 3
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:100]))
    state = path.with_name("piped.jsonl.state")
    state.write_text("".join(line for line in state.read_text().splitlines(keepends=True) if "status" not in line))
    ran = llmcli(*args, path, stdin=lines.read_bytes().replace(b"fox", b"dog"))
    assert (ran.exit_status, "the input has changed" in ran.stderr) == (2, True)


def test_csv_and_lines(llmcli, tiny, tmp_path):
    (tmp_path / "in.csv").write_text('id,text\n1,"the fox\nsleeps"\n2,the dog\n3,a fox\n')
    for flag, source in (("--csv", "in.csv"), ("--lines", "in.csv"), ("--null", "in.csv")):
        args = ("generate", "-m", tiny, flag, "-f", tmp_path / source, "--temperature", 0, "--max-new-tokens", 4,
                "--resume", "--output")  # fmt: skip
        path = tmp_path / f"out{flag}"
        assert llmcli(*args, path).exit_status == 0
        whole = path.read_bytes()
        for end in range(0, len(whole), 17):
            path.write_bytes(whole[:end])
            state = path.with_name(path.name + ".state")
            state.write_text(
                "".join(line for line in state.read_text().splitlines(keepends=True) if "status" not in line)
            )
            assert llmcli(*args, path).exit_status == 0
            assert path.read_bytes() == whole, (flag, end)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--resume", "--lines"), "--resume goes with --output"),
        (("--resume", "--output", "out"), "tell records apart"),
    ],
)
def test_what_does_not_go_together(llmcli, tiny, args, said):
    ran = llmcli("generate", "the fox", "-m", tiny, *args)
    assert (ran.exit_status, said in ran.stderr) == (2, True)


def test_a_file_without_a_state_is_not_touched(llmcli, command, tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    ran = llmcli(*command, tmp_path / "mine.jsonl")
    assert (ran.exit_status, (tmp_path / "mine.jsonl").read_text()) == (2, "{}\n")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_interrupted_again_and_again(command, whole, tmp_path, how):
    path = tmp_path / "killed.jsonl"
    args = [sys.executable, "-m", "llmcli", *map(str, command), str(path)]
    choose = random.Random(int(how))
    statuses = []
    for turn in range(5):
        running = subprocess.Popen(args, stderr=subprocess.PIPE)
        before = path.stat().st_size if path.exists() else 0
        while turn < 4 and running.poll() is None:
            if path.exists() and path.stat().st_size > before:
                time.sleep(choose.random() * 0.2)
                os.kill(running.pid, how)
                break
            time.sleep(0.005)
        running.communicate(timeout=120)
        statuses.append(running.returncode)
    assert statuses[-1] == 3
    assert {-how, 128 + how} & set(statuses)
    assert path.read_bytes() == whole
