"""What a process owes its shell: pipes that close, signals, exit codes, clean streams."""

import resource
import signal
import subprocess
import sys
import time

import pytest
from processes import check_line_by_line, start

pytestmark = pytest.mark.slow

GREEDY = ("--temperature", "0")


def test_a_reader_that_goes_away_is_no_failure(tiny):
    llmcli = start("generate", "-m", tiny, "--lines", *GREEDY)
    head = subprocess.Popen(["head", "-c", "5"], stdin=llmcli.stdout, stdout=subprocess.PIPE)
    llmcli.stdout.close()
    llmcli.stdin.write(b"the quick brown fox\n" * 200)
    llmcli.stdin.close()
    assert head.communicate()[0] == b"the q"
    assert llmcli.wait(60) == 0
    assert llmcli.stderr.read() == b""


def test_a_full_disk_behind_stdout_is_one_line(process, tiny):
    with open("/dev/full", "wb") as full:
        done = start("generate", "the", "-m", tiny, stdout=full)
        _, stderr = done.communicate(timeout=60)
    assert done.returncode == 1
    assert stderr == b"error: cannot write to stdout: No space left on device\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("seconds", [0.3, 0.8, 1.5, 2.5, None])
def test_a_signal_ends_it_at_any_moment(tiny, number, status, seconds):
    """While importing, while loading, and, once the first result is out, while generating."""
    llmcli = start("generate", "-m", tiny, "--lines", "--max-new-tokens", 50, "--batch-size", 1)
    if seconds is None:
        llmcli.stdin.write(b"the quick brown fox\n" * 2000)
        llmcli.stdin.flush()
        llmcli.stdout.readline()
    else:
        time.sleep(seconds)
    llmcli.send_signal(number)
    _, stderr = llmcli.communicate(timeout=20)
    if seconds == 0.3 and llmcli.returncode == -number:
        return  # Python had not yet begun on a busy machine: a shell reports the same status.
    assert llmcli.returncode == status
    assert stderr == b""


def test_a_slow_input_is_answered_line_by_line(tiny):
    check_line_by_line(start("generate", "-m", tiny, "--lines", "--max-new-tokens", 3, *GREEDY))


def test_a_seed_does_not_delay_a_greedy_answer(tiny):
    llmcli = start("generate", "-m", tiny, "--lines", "--max-new-tokens", 3, "--seed", 1, *GREEDY)
    llmcli.stdin.write(b"the quick\n")
    llmcli.stdin.flush()
    assert llmcli.stdout.readline().startswith(b"the quick")
    llmcli.stdin.close()
    assert llmcli.wait(20) == 0


def test_a_full_disk_behind_output_is_one_line(tiny, tmp_path):
    path = tmp_path / "out.txt"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))  # noqa: E731
    llmcli = start("generate", "the quick brown", "-m", tiny, "--output", path, preexec_fn=limit)
    _, stderr = llmcli.communicate(timeout=60)
    assert llmcli.returncode == 1
    assert stderr == f"error: cannot write to {path}: File too large\n".encode()


def test_errors_do_not_go_to_stdout_where_stderr_is_closed(tiny):
    command = [sys.executable, "-m", "llmcli", "generate", "--jsonl", "-m", str(tiny), "--stats"]
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    done = subprocess.run(closed, input=b'{"id": 1}\n', stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert done.stdout.count(b"\n") == 1


def test_stdout_is_utf8_whatever_the_locale(process, tiny):
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "HOME": "/nonexistent"}
    done = process("generate", "é", "-m", tiny, "--json", env=environment)
    assert done.returncode == 0, done.stderr
    assert '"text": "é"' in done.stdout.decode("utf-8")


def test_nothing_but_results_on_stdout_and_nothing_on_stderr(process, tiny):
    done = process("generate", "the quick", "-m", tiny, "--no-full-text", "--json", *GREEDY)
    assert done.stdout.count(b"\n") == 1
    assert done.stderr == b""


def test_python_m_llmcli_without_stdin(process, tiny):
    done = process("generate", "the quick", "-m", tiny, stdin=subprocess.DEVNULL)
    assert done.returncode == 0
