"""Reads what a record asks for itself, in fields that the job names: a schema, and generation settings."""

import json
from typing import Any

from llmcli import config
from llmcli.engines.requests import RequestSettings
from llmcli.errors import RecordError
from llmcli.job import Job, JsonObject, Record
from llmcli.models import generation
from llmcli.text.constraints import check_constraint, parse_json

MAX_CHARACTERS = 2**16  # of a constraint, as JSON
CHECK_TIMEOUT_S = 2.0  # for a constraint
ALIASES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "min_tokens": "min_new_tokens",
           "stop": "stop_strings"}  # fmt: skip
CONSTRAINTS = "schema", "regex", "choice"  # and no Lark grammar: it may take long in each step
BOUNDS: dict[str, tuple[type, float, float]] = {
    "seed": (int, 0, 2**32 - 1),
    "max_new_tokens": (int, 1, 2**31),
    **dict.fromkeys(("min_new_tokens", "top_k", "no_repeat_ngram_size"), (int, 0, 2**31)),
    **dict.fromkeys(("top_p", "min_p", "epsilon_cutoff", "eta_cutoff"), (float, 0, 1)),
    **dict.fromkeys(("typical_p", "top_h"), (float, 1e-6, 1)),
    "temperature": (float, 0, 10**6),
    "repetition_penalty": (float, 1e-6, 10**6),
}
KNOWN = (*BOUNDS, "do_sample", "stop_strings", *ALIASES, *CONSTRAINTS)


def read_settings(job: Job, record: Record) -> RequestSettings:
    """Return the settings of a record, over those of the job. Raises RecordError for invalid ones."""
    name, kind = job.settings_field, "invalid_settings"
    try:
        given = {ALIASES.get(key, key): _check(key, value) for key, value in (_read_object(record, name) or {}).items()}
        given = {key: value for key, value in given.items() if value is not None}
        constraint: JsonObject = {key: given.pop(key) for key in CONSTRAINTS if key in given}
        if not constraint:
            name, kind = job.schema_field, "invalid_schema"
            constraint = {} if (schema := _read_object(record, name)) is None else {"schema": schema}
        _check_constraint(constraint)
        constraint = constraint or job.constraint or {}
        if constraint and (given.get("stop_strings") or job.generation.get("stop_strings")):
            raise ValueError(f"stop cannot be used with {next(iter(constraint))}")
    except ValueError as exc:
        raise RecordError(kind, f"field {name!r}: {exc}") from None
    seed: Any = given.pop("seed", None)
    given = generation.greedy(given)
    if not given.keys().isdisjoint(generation.SAMPLING):
        given.setdefault("do_sample", True)
    return RequestSettings(given, seed, constraint or None)


def _read_object(record: Record, name: str | None) -> JsonObject | None:
    """Return the JSON object in a field of a record, None if there is none."""
    value = record.fields.get(name) if name else None
    if record.is_row and name and name not in record.fields:
        raise RecordError("missing_field", f"missing field {name!r}")
    if isinstance(value, str):
        value = parse_json(value if value.strip() else "null")
    if value is not None and not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _check(name: str, value: object) -> object:
    """Return the value of a setting. Raises ValueError for an unknown name or an invalid value."""
    expected = None
    if name not in KNOWN:
        raise ValueError(f"unknown setting {name!r}{config.did_you_mean(name, KNOWN)}")
    if value is None:
        return None
    json.dumps(value, ensure_ascii=False).encode()  # raises ValueError for half a character
    if bounds := BOUNDS.get(ALIASES.get(name, name)):
        kind, low, high = bounds
        is_number = isinstance(value, int | kind) and not isinstance(value, bool)
        if not (is_number and low <= value <= high):  # type: ignore[operator]
            expected = f"{'an integer' if kind is int else 'a number'} from {low} to {high}"
    elif name in ("choice", "stop", "stop_strings"):
        value = [value] if isinstance(value, str) else value
        if not (isinstance(value, list) and value and all(text and isinstance(text, str) for text in value)):
            expected = "texts that are not empty"
    elif not isinstance(value, {"schema": dict, "regex": str}.get(name, bool)) or value == "":
        expected = {"schema": "a JSON object", "regex": "a pattern"}.get(name, "true or false")
    if expected:
        raise ValueError(f"invalid {name} {value!r:.60}: expected {expected}")
    return value


def _check_constraint(constraint: JsonObject) -> None:
    if len(constraint) > 1:
        raise ValueError(f"{' and '.join(constraint)} cannot be used together")
    if constraint:
        if (length := len(json.dumps(constraint))) > MAX_CHARACTERS:
            raise ValueError(f"constraint has {length} characters, which exceeds the maximum {MAX_CHARACTERS}")
        check_constraint(constraint, CHECK_TIMEOUT_S)
