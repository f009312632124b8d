"""--output with --resume: what was interrupted goes on, and ends as if it had never been."""

import fcntl
import json
import random

import pytest

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
