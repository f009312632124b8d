"""Workers of the tests' own: where they live, what they do, and their end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from llmcli.engines.worker import client
from llmcli.errors import LlmcliError

LONG = ("--max-new-tokens", 1900, "--min-new-tokens", 1900, "--temperature", 0)


def settle(folder, monkeypatch):
    """The environment of the calls that a worker serves."""
    (folder / "run").mkdir(exist_ok=True)
    for name, place in (
        ("LLMCLI_CACHE", "cache"),
        ("XDG_CONFIG_HOME", "config"),
        ("HF_HOME", "huggingface"),
        ("XDG_RUNTIME_DIR", "run"),
    ):
        monkeypatch.setenv(name, str(folder / place))


def end():
    """The worker that is there, however it feels."""
    try:
        number = client.status()["process"]
    except LlmcliError:
        return
    os.kill(number, signal.SIGKILL)
    wait_until(lambda: not is_running(number))


def start(*args, **settings):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings
    return subprocess.Popen([sys.executable, "-m", "llmcli", *map(str, args)], **pipes)


def wait_until(is_so, seconds=20):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def is_running(number):
    """Whether that process is there, and no zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def jobs():
    return client.status()["jobs"]
