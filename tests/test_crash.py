"""Runs of 2,000 records that are killed, interrupted, or find the disk full: what comes of them in the end is what an
undisturbed run writes, byte for byte."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

COUNT = "error: 40 of 2000 records failed"
RESUME = "hint: to continue: rerun with --resume"


@pytest.fixture(scope="module")
def lines(many_lines):
    return many_lines(2000)


@pytest.fixture(scope="module")
def command(tiny, lines):
    """Slow enough to be killed on the way."""
    return ["generate", "-m", tiny, "--jsonl", "-f", lines, "--temperature", 0, "--max-new-tokens", 8,
            "--dtype", "float32", "--batch-size", 4, "--resume", "--output"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """What a run that is never interrupted writes."""
    path = tmp_path_factory.mktemp("whole") / "whole.jsonl"
    said = run([sys.executable, "-m", "llmcli", *command, path])
    assert len(said) == 41
    return path.read_bytes()


def run(program):
    """A run to its end; what it says."""
    done = subprocess.run([*map(str, program)], capture_output=True, text=True)
    said = done.stderr.splitlines()
    assert (done.returncode, said[-1]) == (3, COUNT)
    return said


def size(path):
    return path.stat().st_size if path.exists() else 0


def disturbed(program, path, signals, grows, points, choose):
    """Start the program again and again, each time until `grows` has grown beyond the next of the points, or already
    has and some time of its start has gone by. Yields the exit codes."""
    for number, point in zip(signals, points, strict=True):
        running = subprocess.Popen([*map(str, program), str(path)], stderr=subprocess.DEVNULL)
        if size(grows) >= point:
            time.sleep(choose.random() * 3)
        while size(grows) < point and running.poll() is None:
            time.sleep(0.001)
        running.send_signal(number)
        yield running.wait(60)


@pytest.mark.parametrize("signals", [[signal.SIGKILL] * 20, [signal.SIGINT, signal.SIGTERM] * 2])
def test_killed_at_random_moments(command, whole, tmp_path, signals):
    path = tmp_path / "killed.jsonl"
    choose = random.Random(len(signals))
    points = sorted(choose.randrange(1, int(len(whole) * 0.95)) for _ in signals)
    program = [sys.executable, "-m", "llmcli", *command]
    done, codes = 0, []
    for code in disturbed(program, path, signals, path, points, choose):
        codes.append(code)
        there = path.read_bytes()
        assert whole.startswith(there)
        assert there.count(b"\n") >= done  # nothing that was done is lost
        done = there.count(b"\n")
    ended = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
    assert codes == [ended[number] for number in signals]
    run([*program, path])
    assert path.read_bytes() == whole


FLAKY = """
import os
import sys
from llmcli.cli import main
from llmcli.pipelines.causal import CausalPipeline
whole = CausalPipeline.preprocess
def preprocess(pipeline, prompt, **settings):
    if "fox" in prompt and os.environ["FLAKY"] == "yes":
        raise RuntimeError("no foxes")
    return whole(pipeline, prompt, **settings)
CausalPipeline.preprocess = preprocess
sys.exit(main())
"""


def test_killed_while_it_tries_again(command, whole, tmp_path, monkeypatch):
    path, log = tmp_path / "retried.jsonl", tmp_path / "retried.jsonl.state.retry"
    program = [sys.executable, "-c", FLAKY, *command]
    again = [*program[:-1], "--retry-errors", program[-1]]
    monkeypatch.setenv("FLAKY", "yes")
    assert subprocess.run([*map(str, program), path], stderr=subprocess.DEVNULL).returncode == 3
    failed = path.read_bytes().count(b"no foxes")
    assert failed > 1000
    monkeypatch.setenv("FLAKY", "no")
    choose = random.Random(7)
    complete = size(path.with_name("retried.jsonl.state"))
    points = sorted(choose.randrange(1, int(complete * 0.9)) for _ in range(3))
    codes = list(disturbed(again, path, [signal.SIGKILL] * 3, log, points, choose))
    assert codes == [-9] * 3
    run([*again, path])
    assert path.read_bytes() == whole


@pytest.fixture
def disk(tmp_path):
    """A disk of a few pages, whose size can be set: `disk(kilobytes)` gives its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk of one's own here: {mounted.stderr.decode().strip()}")

    def resized(kilobytes):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", folder], check=True)
        return folder

    yield resized
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_again_and_again(llmcli, command, whole, disk):
    path = disk(4) / "out.jsonl"
    said = [f"error: cannot write to {name}: No space left on device" for name in (path, f"{path}.state")]
    seen, done = set(), 0
    for kilobytes in (4, 8, *range(12, 1000, 36)):
        disk(kilobytes)
        ran = llmcli(*command, path)
        if ran.exit_status == 3:
            break
        assert ran.exit_status == 1
        *others, last = [line for line in ran.stderr.splitlines() if line != RESUME]
        assert last in said
        assert not set(others) & set(said)
        seen.add(last)
        there = path.read_bytes()
        assert whole.startswith(there)
        assert there.count(b"\n") >= done
        done = there.count(b"\n")
    assert path.read_bytes() == whole
    assert ran.stderr.splitlines()[-1] == COUNT
    assert said[0] in seen  # Whether the state is ever the first to fill the disk depends on the length of the paths.
    assert seen <= set(said)
    again = llmcli(*command, path)
    assert (again.exit_status, again.stderr.splitlines()[-1]) == (3, COUNT)


def test_a_disk_that_is_full_from_the_start(llmcli, command, whole, disk):
    path = disk(2000) / "out.jsonl"
    filler = path.with_name("filler")
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(b"x" * 3_000_000)
    for _ in range(2):
        ran = llmcli(*command, path)
        assert (ran.exit_status, ran.stderr) == (
            1, f"error: cannot write to {path}.state: No space left on device\n"
        )  # fmt: skip
    filler.unlink()
    assert llmcli(*command, path).exit_status == 3
    assert path.read_bytes() == whole


def test_a_disk_without_room_for_results_that_are_tried_again(llmcli, command, whole, disk, monkeypatch):
    from llmcli.pipelines.causal import CausalPipeline

    path = disk(1200) / "out.jsonl"

    def fails(*args, **settings):
        raise RuntimeError("no words")

    with monkeypatch.context() as patched:
        patched.setattr(CausalPipeline, "preprocess", fails)
        assert llmcli(*command, path).exit_status == 3
    either = list(zip(path.read_bytes().splitlines(), whole.splitlines(), strict=True))
    seen = set()
    for kilobytes in range(size(path) // 1024 + size(path.with_name("out.jsonl.state")) // 1024 + 8, 4000, 100):
        disk(kilobytes)
        ran = llmcli(*command, path, "--retry-errors")
        if ran.exit_status == 3:
            break
        assert ran.exit_status == 1
        *_, last = [line for line in ran.stderr.splitlines() if line != RESUME]
        seen.add(last.split(":")[1].split("out.jsonl")[-1])
        assert all(line in pair for line, pair in zip(path.read_bytes().splitlines(), either, strict=True))
    assert ".state.new" in seen
    assert seen <= {".state.new", ".state.retry"}
    assert ran.stderr.splitlines()[-1] == COUNT
    assert path.read_bytes() == whole
    assert sorted(os.listdir(path.parent)) == ["out.jsonl", "out.jsonl.state"]
