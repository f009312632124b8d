"""Constraints of answers: a JSON Schema, a regular expression, choices or a Lark grammar, compiled by llguidance.

`python -m llmcli.text.constraints` checks those that it reads, one a line. llguidance cannot be interrupted, and a short
schema can keep it busy for hours, so a process that can be ended checks a constraint before this process compiles it.
"""

import json
import re
import sys
from functools import lru_cache
from subprocess import DEVNULL, PIPE, Popen
from threading import Lock, Timer
from typing import Any

from llmcli.errors import LlmcliError
from llmcli.job import JsonObject

KINDS = ("schema", "regex", "choice", "grammar")
CHECK_TIMEOUT_S = 30.0
MAX_EXACT = 2**53  # llguidance reads larger numbers of a schema as float64
COMPACT = {"whitespace_flexible": False, "lenient": False}
WALKED_BYTES = 8  # of an answer: a part of the work is left until then
NOISE = re.compile(r"^at \d+\(\d+\): |\. Enable .*|; following .*| and retrieving it failed: .*")


def to_grammar(constraint: JsonObject) -> str:
    """Return a constraint as llguidance's grammar. JSON has no white space between its tokens."""
    from llguidance import LLMatcher

    ((kind, value),) = constraint.items()
    if kind == "schema":
        if not isinstance(value, dict) and value is not True:
            raise ValueError("expected a JSON object")
        return LLMatcher.grammar_from_json_schema(json.dumps({} if value is True else value), overrides=COMPACT)
    if kind == "choice":
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, value))}")
    return LLMatcher.grammar_from_regex(value) if kind == "regex" else LLMatcher.grammar_from_lark(value)


def check_constraint(constraint: JsonObject, timeout_s: float = CHECK_TIMEOUT_S) -> None:
    """Raise ValueError, with one line, for a constraint that is invalid, unsupported or too expensive to compile."""
    if error := _find_error(json.dumps(constraint), timeout_s):
        raise ValueError(error)


def accepts(constraint: JsonObject, text: str) -> bool:
    """Return whether a text is an answer that the constraint allows, white space around JSON aside."""
    from llguidance import LLMatcher, LLTokenizer

    if "schema" in constraint:
        text = json.dumps(parse_json(text), ensure_ascii=False, separators=(",", ":"))
    data = text.encode()
    matcher = LLMatcher(LLTokenizer("byte"), to_grammar(constraint), log_level=0)
    return matcher.try_consume_tokens([*data]) == len(data) and matcher.is_accepting()


def parse_json(text: str) -> Any:
    """Return the value of JSON text. Raises ValueError for what another program might read as another value."""

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(fields := dict(pairs)) < len(pairs):
            raise ValueError(f"repeated key {max(fields, key=[key for key, _ in pairs].count)!r}")
        return fields

    def make_float(text: str) -> float:
        if (number := float(text)) in (float("inf"), float("-inf")):
            raise ValueError(f"number {text} is out of range")
        return number

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=make_object, parse_float=make_float, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None


@lru_cache(maxsize=4096)
def _find_error(constraint: str, timeout_s: float) -> str:
    """Return why a constraint, as JSON, cannot be used, or an empty string."""
    return _checker.ask(constraint, timeout_s)


class _Checker:
    """The process that checks constraints, started at the first one."""

    def __init__(self) -> None:
        self._process: Popen[str] | None = None
        self._lock = Lock()

    def ask(self, constraint: str, timeout_s: float) -> str:
        with self._lock:
            if self._process is None:
                command = [sys.executable, "-P", "-m", __name__]
                self._process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True, encoding="utf-8")
                if not self._exchange():  # The time that it takes to start does not count.
                    raise LlmcliError("cannot start the process that checks constraints")
            timer = Timer(timeout_s, self._process.kill)
            timer.start()
            answer = self._exchange(constraint)
            timer.cancel()
            if not answer:
                self._process.kill()
                self._process.wait()
                self._process = None
        return str(json.loads(answer)) if answer else f"requires more than {timeout_s:g} s to compile"

    def _exchange(self, line: str = "") -> str:
        """Send a line, and return the next one; an empty string if the process has ended."""
        assert self._process and self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return ""
        return self._process.stdout.readline()


_checker = _Checker()


def _compile(constraint: JsonObject) -> str:
    """Return what llguidance finds wrong with a constraint, in one line, or an empty string."""
    from llguidance import LLMatcher, LLTokenizer

    if _has_large_number(constraint.get("schema")):
        return "numbers beyond 2**53 are not supported"
    try:
        matcher = LLMatcher(LLTokenizer("byte"), to_grammar(constraint), log_level=0)
    except ValueError as exc:
        return str(exc)
    for _ in range(WALKED_BYTES):
        token = -1 if matcher.is_stopped() else matcher.compute_logit_bias().find(200)
        if not 0 <= token < 256:
            break
        matcher.consume_token(token)
    lines = (matcher.get_error() or "\n".join(matcher.get_grammar_warnings())).splitlines() or [""]
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    line = NOISE.sub("", line.replace("Unimplemented keys", "unsupported keywords"))
    return "matches no text" if line.startswith("NoExtension") else line[:1].lower() + line[1:]


def _has_large_number(value: object) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_large_number, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and not abs(value) <= MAX_EXACT


if __name__ == "__main__":
    for request in sys.stdin:
        print(json.dumps(_compile(json.loads(request))) if request.strip() else "", flush=True)
