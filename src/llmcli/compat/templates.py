"""Chat templates are programs of strangers, which transformers compiles with jinja2: limits them."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

POLL_S = 0.05
MAX_PRODUCT = 10**7  # characters or items that a template may make by one multiplication
MAX_EXPONENT = 64
MAX_MEMORY = 2**30  # bytes by which the process may grow meanwhile


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of chat templates, without products such as `"x" * 10**9`, which nothing could interrupt."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) if hasattr(value, "__len__") else value for value in (left, right)]
        if sizes[0] * sizes[1] > MAX_PRODUCT if operator == "*" else abs(right) > MAX_EXPONENT:
            raise SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment


def response_marks(tokenizer: Any) -> list[tuple[str, str]]:
    """Return begin and end of thoughts that a tokenizer's response template names, which transformers 5.16 introduced.

    Its `parse_response` would also take marks in the middle of an answer for thoughts.
    """
    with suppress(AttributeError, KeyError, StopIteration, TypeError):  # It may be anything.
        fields = tokenizer.init_kwargs["response_template"]["fields"]
        thoughts = next(fields[name] for name in ("reasoning_content", "thinking", "reasoning") if name in fields)
        marks = thoughts["open"].strip(), thoughts["close"].strip()
        return [marks] if all(marks) else []
    return []


_lock = threading.Lock()
_deadlines: dict[int, float] = {}  # by thread
_watcher: threading.Thread | None = None


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError or MemoryError in this thread, whichever it is, if the block takes too much of either.

    A single call of a C function ends first. One thread watches all blocks, and ends when there is none.
    """
    global _watcher
    thread = threading.get_ident()
    with _lock:
        _deadlines[thread] = time.monotonic() + seconds
        if _watcher is None:
            _watcher = threading.Thread(target=_watch, daemon=True)
            _watcher.start()
    try:
        yield
    finally:
        with _lock:
            del _deadlines[thread]
            _raise_in(thread, None)  # An exception that came too late is taken back.


def _watch() -> None:
    global _watcher
    memory = psutil.Process().memory_info
    usual = memory().rss
    while True:
        time.sleep(POLL_S)
        with _lock:
            if not _deadlines:
                _watcher = None
                return
            is_too_large = memory().rss - usual > MAX_MEMORY
            for thread, deadline in _deadlines.items():
                if is_too_large or time.monotonic() > deadline:
                    _raise_in(thread, MemoryError if is_too_large else TimeoutError)


def _raise_in(thread: int, exception: type[Exception] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if exception is None else ctypes.py_object(exception)
    )
