"""llmcli in processes that a test watches and interrupts."""

import subprocess
import sys
import time
from pathlib import Path


def start(*args: object, **settings) -> subprocess.Popen:
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


def check_line_by_line(call):
    """It answers each line of a slow input before the next is there."""
    for text in (b"the quick", b"dog", b"once upon a time"):
        call.stdin.write(text + b"\n")
        call.stdin.flush()
        assert call.stdout.readline().startswith(text)
    call.stdin.close()
    assert call.wait(20) == 0
