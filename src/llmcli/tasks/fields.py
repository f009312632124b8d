"""Reading a record's fields: roles, templates, and what is wrong with them."""

import string
from collections.abc import Mapping
from typing import Any

from llmcli.errors import RecordError, UsageError
from llmcli.job import Job


def text_field(fields: Mapping[str, Any], name: str) -> str:
    """The text in that field. Raises RecordError where it is missing, no text, or holds half a character."""
    if name not in fields:
        there = ", ".join(map(str, fields))[:200] or "none"
        raise RecordError("missing_field", f"no field {name!r}", hint=f"fields there: {there}")
    value = fields[name]
    if not isinstance(value, str):
        raise RecordError("wrong_type", f"field {name!r} is not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise RecordError("invalid_text", f"field {name!r}: lone surrogate at character {exc.start}") from None
    return value


def prompt_text(job: Job, fields: Mapping[str, Any]) -> str:
    """The record's text, or the job's template filled with its fields; empty where the text is empty."""
    name = job.parameters.get("fields", {}).get("text", "text")
    template = job.parameters.get("prompt")
    if template is None:
        return text_field(fields, name)
    names = [field for _, field, _, _ in string.Formatter().parse(template)]
    if name in fields:  # {text} is the text, whatever its field is called
        fields = {"text": fields[name], **fields}
    return "" if fields.get(name) == "" and {name, "text"} & set(names) else fill(template, fields)


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """The template with the fields that it names. Raises RecordError where one is missing or no text."""
    parts = string.Formatter().parse(template)
    return "".join(literal + ("" if field is None else _filled(fields, field)) for literal, field, _, _ in parts)


def template(prompt: str | None) -> dict[str, str]:
    """`--prompt` as a job's parameter. Raises UsageError where it could never be filled."""
    if prompt is None:
        return {}
    check(prompt, "--prompt")
    return {"prompt": prompt}


def check(template: str, where: str) -> None:
    """Raises UsageError for a template that could never be filled, which names where it stands."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as exc:
        raise UsageError(f"{where}: {exc}", hint="write {{ and }} for braces of the text itself") from exc
    if not any(field for _, field, _, _ in parts):
        raise UsageError(f"{where} names no field of the record", hint='like "Classify this review: {text}"')
    for _, field, spec, conversion in parts:
        if field is not None and (not field or spec or conversion):
            raise UsageError(
                f"{where}: a field is written {{name}}, and no more", hint="braces of the text itself: {{ }}"
            )


def _filled(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else text_field(fields, name)
