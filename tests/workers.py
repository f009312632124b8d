"""Workers of the tests' own: where they live, what they do, and their end."""

import os
import signal

from processes import is_running, wait_until

from llmcli.engines.worker import client
from llmcli.errors import LlmcliError

# More texts for a call, and options that make each take seconds.
LONG = ("fox", "lazy dog", "warm sun", "--batch-size", 1, "--max-new-tokens", 1900, "--min-new-tokens", 1900,
        "--temperature", 0)  # fmt: skip


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
        status = client.status()
    except LlmcliError:
        return
    if status:
        os.kill(status["pid"], signal.SIGKILL)
        wait_until(lambda: not is_running(status["pid"]))


def jobs():
    """Jobs that the worker runs; None if there is no worker."""
    status = client.status()
    return status["jobs"] if status else None
