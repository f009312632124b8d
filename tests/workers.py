"""Workers of the tests' own: where they live, what they do, and their end."""

import os
import signal

from processes import is_running, wait_until

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


def jobs():
    return client.status()["jobs"]
