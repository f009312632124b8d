"""One run by several processes, under torchrun: what comes out is what one process writes."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llmcli"]


@pytest.fixture(scope="module")
def lines(many_lines):
    return many_lines(501)


@pytest.fixture(scope="module")
def command(tiny):
    return ["generate", "-m", str(tiny), "--jsonl", "--temperature", "0", "--max-new-tokens", "8",
            "--dtype", "float32", "--batch-size", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(command, lines):
    """What one process writes."""
    ran = subprocess.run([sys.executable, "-m", "llmcli", *command, "-f", lines], capture_output=True)
    assert ran.returncode == 3
    return ran.stdout


def said(ran):
    """stderr without what torchrun says itself."""
    return [line for line in ran.stderr.decode().splitlines() if line.startswith("error: ")]


def test_the_results_of_all_come_together_in_order(command, lines, whole):
    ran = subprocess.run([*TORCHRUN, *command, "-f", lines], capture_output=True, timeout=120)
    assert ran.stdout == whole
    assert ran.returncode == 1  # torchrun's own, whichever of ours it sees
    assert said(ran)[-1] == "error: 11 of 501 records failed"
    assert len(said(ran)) == 12


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_records_from_a_pipe(command, lines, whole, count):
    data = b"".join(lines.read_bytes().splitlines(keepends=True)[1 : count + 1])
    ran = subprocess.run([*TORCHRUN, *command], input=data, capture_output=True, timeout=120)
    expected = [json.loads(line) for line in whole.splitlines()[1 : count + 1]]
    for record in expected:
        del record["file"]
    assert [json.loads(line) for line in ran.stdout.splitlines()] == expected
    assert (ran.returncode, said(ran)) == (0, [])


def test_a_reader_that_has_seen_enough_ends_all(command, lines, whole):
    running = subprocess.Popen([*TORCHRUN, *command, "-f", lines], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout.readline() == whole.splitlines(keepends=True)[0]
    running.stdout.close()
    assert running.wait(60) == 0


def test_the_first_failure_can_end_all(command, lines, whole):
    data = b"".join(lines.read_bytes().splitlines(keepends=True)[1:])
    ran = subprocess.run([*TORCHRUN, *command, "--on-error", "stop"], input=data, capture_output=True, timeout=120)
    assert (ran.returncode, len(ran.stdout.splitlines())) == (1, 50)
    assert said(ran) == ["error: line 50: no field 'text': fields there: id"]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_when_one_is_killed_the_run_ends_and_can_go_on(command, lines, whole, tmp_path, rank):
    path = tmp_path / "out.jsonl"
    args = [*TORCHRUN, *command, "-f", lines, "--output", path, "--resume"]
    running = subprocess.Popen(args, stderr=subprocess.DEVNULL)
    while not path.exists() or path.stat().st_size < len(whole) // 3:
        assert running.poll() is None
        time.sleep(0.01)
    (one,) = [each for each in psutil.Process(running.pid).children() if each.environ().get("RANK") == rank]
    one.send_signal(signal.SIGKILL)
    assert running.wait(60) != 0
    begun = path.read_bytes()
    assert whole.startswith(begun[: begun.rfind(b"\n") + 1])
    assert len(begun) < len(whole)
    alone = [sys.executable, "-m", "llmcli", *args[len(TORCHRUN) :]]
    ran = subprocess.run(args if rank == "0" else alone, capture_output=True, timeout=120)
    assert said(ran)[-1] == "error: 11 of 501 records failed"
    assert path.read_bytes() == whole


def test_a_whole_file_ends_all_at_once(command, lines, tmp_path):
    (tmp_path / "in").write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[1:4]))
    args = [*TORCHRUN, *command, "-f", tmp_path / "in", "--output", tmp_path / "out", "--resume"]
    for expected in ([], [f"note: '{tmp_path / 'out'}' is already complete"]):
        ran = subprocess.run(args, capture_output=True, timeout=60)
        assert (ran.returncode, said(ran)) == (0, expected)


def test_what_goes_wrong_in_another_process_is_said_once(command, lines, tmp_path):
    code = (
        "import os, sys\n"
        "from llmcli import cli, loader\n"
        "from llmcli.errors import ModelUnavailable\n"
        "def load(*_): raise ModelUnavailable('the disk is gone', hint='find it')\n"
        "if os.environ['RANK'] == '1': loading.load = load\n"
        "sys.exit(cli.main())\n"
    )
    program = tmp_path / "program.py"
    program.write_text(code)
    ran = subprocess.run([*TORCHRUN[:-2], program, *command, "-f", lines], capture_output=True, timeout=120)
    assert ran.returncode == 1
    assert [line for line in said(ran) if "lacks" not in line and "no field" not in line] == [
        "hint: process 1: the disk is gone",
        "hint: find it",
    ]
