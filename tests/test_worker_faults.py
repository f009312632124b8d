"""The worker against what can befall it: kills, full disks, strangers, garbage, silence."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
from contextlib import suppress

import pytest
from processes import start, wait_until
from workers import LONG, jobs

from llmcli.engines.worker import client, protocol
from llmcli.engines.worker.protocol import ConnectionClosedError
from llmcli.engines.worker.server import MAX_HANDSHAKE_BYTES

pytestmark = pytest.mark.slow


@pytest.fixture
def call(process, chatty):
    """`call()` is a short one that asks for a worker."""

    def run(*args):
        more = args or ("generate", "dog", "-m", chatty, "--max-new-tokens", 3, "--temperature", 0)
        return process(*more, "--keep-alive", "10m", "-v")

    return run


@pytest.fixture
def at(place):
    """The folder of the socket."""
    return place / "run" / "llmcli"


def connected(at):
    mine = socket.socket(socket.AF_UNIX)
    mine.settimeout(20)
    mine.connect(str(at / "worker.sock"))
    return mine


def test_call_reports_killed_worker(place, call, chatty):
    call()
    first = client.status()["pid"]
    long = start("generate", "the quick", "-m", chatty, *LONG)
    wait_until(lambda: jobs() == 1)
    os.kill(first, signal.SIGKILL)
    _, said = long.communicate(timeout=20)
    assert long.returncode == 1
    assert said.decode().splitlines() == [
        "error: worker exited unexpectedly",
        "hint: run the command again, or pass --keep-alive 0",
    ]
    assert call().returncode == 0
    assert client.status()["pid"] != first


def test_resume_completes_after_repeated_worker_kills(place, process, chatty, many_lines, tmp_path):
    """Nothing is lost, and nothing is there twice."""
    args = ["generate", "--jsonl", "-m", chatty, "-f", many_lines(300), "--dtype", "float32", "--temperature", 0,
            "--max-new-tokens", 8, "--batch-size", 4, "--resume", "--output"]  # fmt: skip
    process(*args, tmp_path / "whole", "--keep-alive", 0)
    for at_line in (1, 60, 150):
        run = start(*args, tmp_path / "out", "--keep-alive", "10m")
        lines = tmp_path / "out"
        wait_until(lambda n=at_line, f=lines: f.exists() and f.read_bytes().count(b"\n") > n, seconds=60)
        os.kill(client.status()["pid"], signal.SIGKILL)
        assert run.wait(20) == 1
    assert process(*args, tmp_path / "out", "--keep-alive", "10m").returncode == 3  # every fiftieth has no text
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_worker_replaces_stale_socket(at, call):
    at.mkdir(mode=0o700)
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(at / "worker.sock"))
    left.close()
    assert call().returncode == 0
    assert client.status()["pid"]


@pytest.mark.parametrize("what", ["a file", "a link", "open to others"])
def test_worker_rejects_unsafe_directory(at, call, tmp_path, what):
    if what == "a file":
        at.write_text("")
    elif what == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        at.symlink_to(tmp_path / "theirs")
    else:
        at.mkdir()
        at.chmod(0o755)
    ran = call()
    assert ran.returncode == 0
    assert f"note: {at} is not a private directory; this process runs the model" in ran.stderr.decode()
    assert not (tmp_path / "theirs" / "worker.sock").exists()


def test_worker_socket_is_private(at, call):
    call()
    assert stat.S_IMODE(at.stat().st_mode) == 0o700
    assert stat.S_IMODE((at / "worker.sock").stat().st_mode) == 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_worker_rejects_other_user(at, call):
    call()
    for path, mode in ((at.parent.parent, 0o755), (at.parent, 0o755), (at, 0o755), (at / "worker.sock", 0o666)):
        path.chmod(mode)  # the doors that keep others out are opened: the worker looks who comes
    code = f"""
import os, socket
os.setuid(65534)
mine = socket.socket(socket.AF_UNIX)
mine.connect({str(at / "worker.sock")!r})
try:
    mine.sendall(b'{{"do": "status"}}\\n')
    print(mine.recv(1000))
except (BrokenPipeError, ConnectionResetError):
    print(b"")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert (ran.stdout, ran.stderr) == ("b''\n", "")
    at.chmod(0o700)
    assert client.status()["pid"]


def test_call_runs_locally_when_disk_is_full(at, call):
    at.parent.rmdir()
    at.parent.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=2", "tmpfs", at.parent], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk of one's own here: {mounted.stderr.decode().strip()}")
    try:
        ran = call()
        assert ran.returncode == 0
        assert b"o space left on device; this process runs the model" in ran.stderr
    finally:
        subprocess.run(["umount", "--lazy", at.parent], check=True)


def test_worker_survives_thousand_silent_clients(at, call):
    call()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        silent = [connected(at) for _ in range(1000)]
        assert call().returncode == 0
        for each in silent:
            assert each.recv(1) == b""  # after a while, they are sent away
            each.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wait_until(lambda: jobs() == 0)


def test_worker_drops_client_without_job(at, call):
    call()
    mine = connected(at)
    mine.sendall(json.dumps({"do": "run", "environment": protocol.environment_fingerprint()}).encode() + b"\n")
    assert json.loads(mine.recv(1000)) == {"worker": client.status()["pid"]}
    assert jobs() == 1
    wait_until(lambda: jobs() == 0)


def test_stopped_reader_blocks_no_other_job(place, call, chatty, tmp_path):
    """It holds up nobody but itself."""
    call()
    lines = tmp_path / "in"
    lines.write_bytes(b"the quick brown fox and the lazy dog\n" * 3000)
    long = start("generate", "-m", chatty, "--lines", "-f", lines, "--max-new-tokens", 100, "--temperature", 0)
    wait_until(lambda: jobs() == 1)
    os.kill(long.pid, signal.SIGSTOP)
    for _ in range(3):
        assert call().returncode == 0
    os.kill(long.pid, signal.SIGCONT)
    long.kill()
    long.wait()
    wait_until(lambda: jobs() == 0)


def garbage():
    choose = random.Random(4)
    yield b"\n"
    yield b"null\n"
    yield b"[1, 2]\n"
    yield b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    yield b'{"do": "fly"}\n'
    yield b'{"do": ["run"]}\n'
    yield b'{"do": "run"}\n'
    yield b'{"do": "run", "environment": 5, "replace": "no"\n'
    yield b"[" * 4000 + b"\n"
    yield b'{"do": "' + b"x" * (MAX_HANDSHAKE_BYTES * 3)
    yield b"\xff\xfe\x00\n"
    for _ in range(200):
        yield choose.randbytes(choose.randint(1, 3000)) + choose.choice([b"", b"\n"])


def test_worker_survives_garbage(at, call):
    call()
    number = client.status()["pid"]
    for data in garbage():
        mine = connected(at)
        try:
            mine.sendall(data)
            mine.shutdown(socket.SHUT_WR)
            answer = mine.recv(1000)
            assert answer == b"" or "refused" in json.loads(answer)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it would not hear more
        mine.close()
    wait_until(lambda: jobs() == 0)
    assert client.status()["pid"] == number
    assert call().returncode == 0


JOBS = [
    {},
    {"job": None},
    {"job": {"task": "generate"}},
    {"job": {"task": "fly", "model": "x", "load_options": {}}},
    {"job": {"task": "../serve", "model": "x", "load_options": {}}},
    {"job": {"task": "generate", "model": 5, "load_options": {}}},
    {"job": {"task": "generate", "model": "x", "load_options": {"colour": "red"}}},
    {"job": {"task": "generate", "model": "x", "generation": [1], "load_options": {}}},
    {"job": {"task": "generate", "model": "x", "load_options": {}, "keep_alive": "long"}},
]


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_worker_rejects_invalid_job(place, call, job):
    call()
    reached = client.connect("run")
    reached.send(**job)
    with suppress(ConnectionClosedError):  # it may have hung up already
        reached.send(record=[{"text": "dog"}, None, False])
        reached.send(end=True)
    assert "error" in reached.receive()
    reached.close()
    wait_until(lambda: jobs() == 0)
    assert call().returncode == 0


@pytest.mark.parametrize("record", [5, [], ["dog", None], [{"text": "dog"}, 5], [{"text": "dog"}, {"colour": "red"}]])
def test_worker_rejects_invalid_record(place, call, chatty, record):
    call()
    reached = client.connect("run")
    reached.send(job={"task": "generate", "model": str(chatty), "load_options": {}})
    reached.send(record=record)
    assert "error" in reached.receive()
    reached.close()
    wait_until(lambda: jobs() == 0)


def test_worker_rejects_message_over_limit(at, call, chatty):
    """It is not read to its end, and the memory that it would have taken is not taken."""
    call()
    reached = client.connect("run")
    reached.send(job={"task": "generate", "model": str(chatty), "load_options": {}})
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        reached.socket.sendall(b"x" * (2 * protocol.MAX_MESSAGE_BYTES))
    wait_until(lambda: jobs() == 0)
    assert call().returncode == 0


def test_record_over_limit_fails_alone(place, process, chatty, monkeypatch):
    process("generate", "dog", "-m", chatty, "--max-new-tokens", 2, "--keep-alive", "10m")
    lines = [json.dumps({"text": text}) for text in ("dog", "x" * protocol.MAX_MESSAGE_BYTES, "fox")]
    args = ["generate", "--jsonl", "-m", chatty, "--max-new-tokens", 2]
    ran = process(*args, input="\n".join(lines).encode())
    assert ran.returncode == 3
    kinds = [json.loads(line).get("error", {}).get("type") for line in ran.stdout.splitlines()]
    assert kinds == [None, "too_large", None]


def test_worker_survives_deleted_model(place, call, chatty, tmp_path):
    folder = shutil.copytree(chatty, tmp_path / "model")
    args = ("generate", "dog", "-m", folder, "--max-new-tokens", 3)
    assert call(*args).returncode == 0
    number = client.status()["pid"]
    shutil.rmtree(folder)
    ran = call(*args)
    assert (ran.returncode, ran.stderr.splitlines()[0].decode()) == (4, f"error: model '{folder}' does not exist")
    assert call().returncode == 0
    assert client.status()["pid"] == number


def test_worker_reloads_changed_model(place, call, chatty, base, tmp_path):
    folder = shutil.copytree(chatty, tmp_path / "model")
    args = ("generate", "dog", "-m", folder, "--max-new-tokens", 3)
    call(*args)
    shutil.rmtree(folder)
    shutil.copytree(base, folder)
    assert call(*args).returncode == 0
    assert len(client.status()["models"]) == 2


def test_unresponsive_worker_is_not_used(at, call, monkeypatch):
    at.mkdir(mode=0o700)
    deaf = socket.socket(socket.AF_UNIX)
    deaf.bind(str(at / "worker.sock"))
    deaf.listen()
    monkeypatch.setattr(client, "HANDSHAKE_TIMEOUT_S", 0.5)
    assert client.connect_or_start("run", None) is None
    deaf.close()
