"""Constraints of answers: a JSON Schema, a regular expression, choices or a Lark grammar, compiled by llguidance.

llguidance cannot be interrupted, and a schema of 80 bytes can keep it busy for hours. So this module also runs as a
process that checks constraints, one a line of its input, and that can be ended.
"""

import json
import re
import sys
from contextlib import suppress
from functools import cache, lru_cache
from subprocess import DEVNULL, PIPE, Popen
from threading import Lock, Timer
from typing import Any

from llmcli.errors import LlmcliError
from llmcli.job import JsonObject

CHECK_TIMEOUT_S = 10.0
JSON_STYLE: Any = {"whitespace_flexible": False, "lenient": False, "item_separator": ",", "key_separator": ":"}
MAX_EXACT = 2**53  # llguidance reads larger numbers of a schema as float64
WALKED_BYTES = 8  # of an answer: a part of the work is left until then
NOISE = re.compile(r"^at \d+\(\d+\): |\. Enable .*|; following .*| and retrieving it failed: .*")
to_compact_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_lock = Lock()


def to_grammar(constraint: JsonObject) -> str:
    """Return a constraint as llguidance's grammar. JSON has no white space between its tokens."""
    from llguidance import LLMatcher

    ((kind, value),) = constraint.items()  # Raises ValueError for none.
    if kind == "schema":
        if not isinstance(value, dict) and value is not True:
            raise ValueError("expected a JSON object")
        schema = json.dumps({} if value is True else value)
        return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
    if kind == "choice":
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, value))}")
    return LLMatcher.grammar_from_regex(value) if kind == "regex" else LLMatcher.grammar_from_lark(value)


def check_constraint(constraint: JsonObject, timeout_s: float = CHECK_TIMEOUT_S) -> None:
    """Raise ValueError, with one line, for a constraint that is invalid, unsupported or too expensive to compile."""
    if error := _find_error(json.dumps(constraint), timeout_s):
        raise ValueError(error)


def accepts(constraint: JsonObject, text: str) -> bool:
    """Return whether a text is an answer that the constraint allows, white space in JSON aside."""
    from llguidance import LLMatcher, LLTokenizer

    data = (to_compact_json(parse_json(text)) if "schema" in constraint else text).encode()
    matcher = LLMatcher(LLTokenizer("byte"), to_grammar(constraint), log_level=0)
    return bool(matcher.try_consume_tokens([*data]) == len(data) and matcher.is_accepting())


def parse_json(text: str) -> Any:
    """Return the value of JSON text. Raises ValueError for what another program may read as another value."""

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"repeated key {max(keys, key=keys.count)!r}")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=make_object)
        to_compact_json(value)  # refuses what is no number of JSON
        return value
    except RecursionError:
        raise ValueError("nested too deep") from None


@cache
def _checker() -> "Popen[str]":
    """Return the process that checks constraints."""
    command = [sys.executable, "-P", "-m", __name__]
    process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True, encoding="utf-8")
    if not _exchange(process, "{}"):  # The time that it takes to start does not count.
        raise LlmcliError("cannot start the process that checks constraints")
    return process


def _exchange(process: "Popen[str]", line: str) -> str:
    """Send a line, and return the next one; an empty string if the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        print(line, file=process.stdin, flush=True)
    return process.stdout.readline()


@lru_cache(maxsize=4096)
def _find_error(constraint: str, timeout_s: float) -> str:
    """Return why a constraint, as JSON, cannot be used, or an empty string."""
    with _lock:
        process = _checker()
        timer = Timer(timeout_s, process.kill)
        timer.start()
        answer = ""
        try:
            answer = _exchange(process, constraint)
        finally:
            timer.cancel()
            if not answer:  # It has taken too long, or the user is interrupting this.
                process.kill()
                process.wait()
                _checker.cache_clear()
    return str(json.loads(answer)) if answer else f"requires more than {timeout_s:g} s to compile"


def _compile(constraint: JsonObject) -> str:
    """Return what llguidance finds wrong with a constraint, in one line, or an empty string."""
    from llguidance import LLMatcher, LLTokenizer

    try:
        matcher = LLMatcher(LLTokenizer("byte"), to_grammar(constraint), log_level=0)
        _check_numbers(constraint.get("schema"))
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


def _check_numbers(value: object) -> None:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _check_numbers(part)
    elif isinstance(value, int | float) and not abs(value) <= MAX_EXACT:
        raise ValueError("numbers beyond 2**53 are not supported")


if __name__ == "__main__":
    for request in sys.stdin:
        print(json.dumps(_compile(json.loads(request))), flush=True)
