"""--output with --resume: what was interrupted goes on, and ends as if it had never been."""

import fcntl
import json
import os
import random
import sys
import threading

import pytest

from llmcli.errors import LlmcliError, TerminatedError
from llmcli.io.run_log import ENTRY_BYTES

WORDS = ["the", "quick", "brown", "fox", "a", "lazy", "dog", "sleeps"]


@pytest.fixture
def lines(tmp_path):
    """300 records of mixed length, of which one in 50 lacks its text; the first needs a model, which a run then seeks
    before it writes anything."""
    choose = random.Random(1)
    records = [{"id": i, "text": " ".join(choose.choices(WORDS, k=choose.randint(1, 30)))} for i in range(300)]
    for record in records[25::50]:
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
    assert ran.stderr.endswith("error: 6 of 300 records failed\n")
    assert (tmp_path / "whole.jsonl").read_bytes() == whole


@pytest.mark.parametrize("kept", [0, 1, 700, 0.3, 0.999])
def test_a_file_cut_anywhere_is_completed(llmcli, command, whole, tmp_path, kept):
    path = tmp_path / "whole.jsonl"
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    ran = llmcli(*command, path)
    assert ran.exit_status == 3
    assert ran.stderr.endswith("error: 6 of 300 records failed\n")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("kept", [0.999, 0.9, 0.5, 0.1])
def test_a_state_cut_anywhere_costs_no_more_than_time(llmcli, command, whole, tmp_path, kept):
    path = tmp_path / "whole.jsonl"
    state = path.with_name("whole.jsonl.state")
    log = state.read_bytes()
    state.write_bytes(log[: int(len(log) * kept)])
    ran = llmcli(*command, path)
    assert (ran.exit_status, path.read_bytes()) == (3, whole)
    assert state.read_bytes() == log


def test_a_state_that_a_power_cut_filled_with_zeros(llmcli, command, whole, tmp_path):
    path = tmp_path / "whole.jsonl"
    state = path.with_name("whole.jsonl.state")
    log = state.read_bytes()
    state.write_bytes(log[:5000] + b"\0" * 500 + log[5500:])
    ran = llmcli(*command, path)
    assert (ran.exit_status, path.read_bytes(), state.read_bytes()) == (3, whole, log)


def test_what_was_run_twice_counts_once(llmcli, command, whole, tmp_path):
    """The output is cut, the run goes on and dies, and the output is cut again: the state knows of all of it."""
    path = tmp_path / "whole.jsonl"
    state = path.with_name("whole.jsonl.state")
    path.write_bytes(whole[:3000])
    assert llmcli(*command, path).exit_status == 3
    cut = len(state.read_bytes()) - 200
    state.write_bytes(state.read_bytes()[:cut])
    path.write_bytes(whole[:2000])
    assert llmcli(*command, path).exit_status == 3
    assert path.read_bytes() == whole
    assert llmcli(*command, path).stderr == f"note: '{path}' is already complete\nerror: 6 of 300 records failed\n"


def test_what_has_changed_is_refused(llmcli, command, whole, lines, tmp_path):
    path = tmp_path / "whole.jsonl"
    for args in ([*command, path, "--seed", 3], [*command, path, "--dtype", "bfloat16"]):
        ran = llmcli(*args)
        assert (ran.exit_status, "the command has changed" in ran.stderr) == (2, True)
    lines.write_text(lines.read_text().replace("fox", "dog"))
    ran = llmcli(*command, path)
    assert (ran.exit_status, "the input has changed" in ran.stderr) == (2, True)
    assert path.read_bytes() == whole


def test_a_pipe_that_brings_something_else_is_noticed(llmcli, command, lines, tmp_path):
    args = [part for part in command if part not in ("-f", lines)]
    path = tmp_path / "piped.jsonl"
    assert llmcli(*args, path, stdin=lines.read_bytes()).exit_status == 3
    begun = b"".join(path.read_bytes().splitlines(keepends=True)[:100])
    path.write_bytes(begun)
    data = lines.read_bytes()
    for changed in (data.replace(b"fox", b"dog", 1), data[:2000], b""):
        ran = llmcli(*args, path, stdin=changed)
        assert (ran.exit_status, "the input has changed" in ran.stderr) == (2, True)
        assert path.read_bytes() == begun


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
            assert llmcli(*args, path).exit_status == 0
            assert path.read_bytes() == whole, (flag, end)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--resume", "--lines"), "--resume requires --output"),
        (("--resume", "--output", "out"), "--resume requires a structured format"),
    ],
)
def test_what_does_not_go_together(llmcli, tiny, args, said):
    ran = llmcli("generate", "the fox", "-m", tiny, *args)
    assert (ran.exit_status, said in ran.stderr) == (2, True)


def test_a_file_without_a_state_is_not_touched(llmcli, command, tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    ran = llmcli(*command, tmp_path / "mine.jsonl")
    assert (ran.exit_status, (tmp_path / "mine.jsonl").read_text()) == (2, "{}\n")
    assert not (tmp_path / "mine.jsonl.state").exists()


def test_a_run_that_never_began_binds_nobody(llmcli, command, whole, tmp_path):
    path = tmp_path / "out.jsonl"
    assert llmcli(*command, path, "-m", "no/such", "--offline").exit_status == 4
    assert llmcli(*command, path).exit_status == 3
    assert path.read_bytes() == whole


def test_two_runs_at_a_time_are_one_too_many(llmcli, command, whole, tmp_path):
    path = tmp_path / "whole.jsonl"
    with path.with_name("whole.jsonl.state").open("rb") as state:
        fcntl.flock(state, fcntl.LOCK_EX)
        ran = llmcli(*command, path)
    assert (ran.exit_status, "is being written by another run" in ran.stderr) == (2, True)
    assert path.read_bytes() == whole


def test_log_has_a_fixed_size_per_record(command, whole, tmp_path):
    identity, _, entries = (tmp_path / "whole.jsonl.state").read_bytes().partition(b"\n")
    assert json.loads(identity)["format"] == "json"
    assert len(entries) == 301 * ENTRY_BYTES  # the last one says that the run is complete
    assert ENTRY_BYTES < 32


@pytest.fixture
def plain(command):
    """The command without --resume."""
    return [part for part in command if part != "--resume"]


@pytest.fixture
def interrupted(llmcli, plain, tmp_path, monkeypatch):
    """`interrupted(exception, path)` runs without --resume; the exception arrives after 100 results."""
    from llmcli.io.resume import Journal

    def run(exc, path):
        write, count = Journal.write, []

        def failing(*args):
            if len(count) == 100:
                raise exc
            count.append(write(*args))

        with monkeypatch.context() as patched:
            patched.setattr(Journal, "write", failing)
            return llmcli(*plain, path)

    return run


@pytest.mark.parametrize(
    ("exc", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "hint: HINT"),
        (TerminatedError(), 143, "hint: HINT"),
        (LlmcliError("disk full"), 1, "error: disk full\nhint: HINT"),
        (LlmcliError("no worker", "run again"), 1, "error: no worker\nhint: run again; HINT"),
        (ValueError("odd"), 1, "hint: HINT\nerror: unexpected ValueError: odd\nhint: this is a bug; please report it "
         "with the output of -v and `llmcli env`"),
    ],
)  # fmt: skip
def test_run_without_resume_can_be_resumed(llmcli, command, interrupted, whole, tmp_path, exc, status, said):
    path = tmp_path / "out.jsonl"
    ran = interrupted(exc, path)
    assert ran.exit_status == status
    assert ran.stderr.endswith("\n" + said.replace("HINT", "to continue: rerun with --resume") + "\n")
    assert path.read_bytes().count(b"\n") == 100
    assert llmcli(*command, path).exit_status == 3
    assert path.read_bytes() == whole


def test_state_is_removed_when_the_run_ends_whole(llmcli, plain, whole, tmp_path):
    path = tmp_path / "out.jsonl"
    assert llmcli(*plain, path).exit_status == 3
    assert path.read_bytes() == whole
    assert not path.with_name("out.jsonl.state").exists()


def test_run_that_wrote_nothing_leaves_no_file(llmcli, plain, tmp_path):
    path = tmp_path / "out.jsonl"
    ran = llmcli(*plain, path, "-m", "no/such", "--offline")
    assert (ran.exit_status, "--resume" in ran.stderr) == (4, False)
    assert not list(tmp_path.glob("out*"))


def test_output_that_exists_is_refused_with_its_state(llmcli, plain, interrupted, tmp_path):
    path = tmp_path / "out.jsonl"
    interrupted(KeyboardInterrupt(), path)
    before = [file.read_bytes() for file in sorted(tmp_path.glob("out*"))]
    ran = llmcli(*plain, path)
    assert (ran.exit_status, f"error: '{path}' already exists" in ran.stderr) == (2, True)
    assert [file.read_bytes() for file in sorted(tmp_path.glob("out*"))] == before


def test_state_of_a_deleted_output_is_not_used(llmcli, plain, interrupted, whole, tmp_path):
    path = tmp_path / "out.jsonl"
    interrupted(KeyboardInterrupt(), path)
    path.unlink()
    assert llmcli(*plain, path).exit_status == 3
    assert path.read_bytes() == whole


def test_on_error_stop_says_how_to_continue(llmcli, plain, command, whole, tmp_path):
    path = tmp_path / "out.jsonl"
    ran = llmcli(*plain, path, "--on-error", "stop")
    assert ran.exit_status == 1
    assert ran.stderr.splitlines()[-1] == "hint: to continue: rerun with --resume"
    assert llmcli(*command, path).exit_status == 3
    assert path.read_bytes() == whole


@pytest.mark.parametrize("flag", ["--lines", "--null", "--csv", "--json"])
def test_every_separated_format_keeps_its_state(llmcli, tiny, tmp_path, flag, monkeypatch):
    from llmcli.io.resume import Journal

    source = tmp_path / "in"
    source.write_text("text\nthe fox\n")
    args = ("generate", "-m", tiny, flag, "-f", source, "--temperature", 0, "--max-new-tokens", 4, "--output")
    assert llmcli(*args, tmp_path / "whole").exit_status == 0
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "mark_complete", lambda *_: sys.exit(9))
        ran = llmcli(*args, tmp_path / "out")
    assert (ran.exit_status, ran.stderr) == (9, "hint: to continue: rerun with --resume\n")
    assert llmcli(*args, tmp_path / "out", "--resume").exit_status == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_output_dash_is_stdout(llmcli, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ("generate", "the fox", "-m", tiny, "--temperature", 0, "--max-new-tokens", 4)
    assert llmcli(*args, "--output", "-").stdout == llmcli(*args).stdout != ""
    assert llmcli(*args, "--json", "--output", "-").records[0]["text"] == "the fox"
    assert llmcli(*args, "--json", "--output", "-", "--resume").exit_status == 2
    assert not list(tmp_path.glob("-*"))


def test_fifo_is_not_opened_before_its_turn(llmcli, tiny, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(b"the fox\n",))
    writer.start()
    ran = llmcli("generate", "-m", tiny, "--lines", "-f", fifo, "--max-new-tokens", 4, "--output", tmp_path / "out")
    writer.join()
    assert ran.exit_status == 0
    assert (tmp_path / "out").read_text().startswith("the fox")


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize("path", ["", ".", "..", "/", "/dev/null", "fifo"])
def test_output_that_is_no_regular_file_is_refused(llmcli, tiny, path, resume, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    ran = llmcli("generate", "the fox", "-m", tiny, "--json", "--output", path, *resume)
    assert (ran.exit_status, "exists and is not a regular file" in ran.stderr) == (2, True)
    assert sorted(os.listdir()) == ["fifo", "home"]


@pytest.mark.parametrize("content", [b"my notes\n", b'{"a": 1}\n', b"[1]\n", b"[" * 100_000, b"\0" * 10])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_state_that_is_no_state_is_not_touched(llmcli, plain, resume, content, tmp_path):
    path, state = tmp_path / "out.jsonl", tmp_path / "out.jsonl.state"
    state.write_bytes(content)
    ran = llmcli(*plain, path, *resume)
    assert (ran.exit_status, "is not the state of a run" in ran.stderr) == (2, True)
    assert (state.read_bytes(), path.exists()) == (content, False)
