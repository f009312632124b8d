"""Reads the fields of a record, and fills prompt templates such as "Classify: {text}" with them."""

import string
from collections.abc import Sequence
from types import MappingProxyType

from llmcli.errors import RecordError, UsageError
from llmcli.job import Job, JsonObject

parse_template = string.Formatter().parse


def field_name(job: Job, role: str) -> str:
    """Return the name of the field with a role, such as "text": the one that --field names, else the role itself."""
    name: str = job.parameters.get("fields", {}).get(role, role)
    return name


def text_field(fields: JsonObject, name: str) -> str:
    """Return the string in a field of a record. Raises RecordError if it is missing, not a string or not Unicode."""
    if name not in fields:
        available = ", ".join(fields)[:200].encode("utf-8", "backslashreplace").decode() or "none"
        raise RecordError("missing_field", f"missing field {name!r}", hint=f"available fields: {available}")
    value = fields[name]
    if type(value) is not str:
        raise RecordError("wrong_type", f"field {name!r} must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise RecordError("invalid_text", f"field {name!r}: lone surrogate at character {exc.start}") from None
    return value


def read_text(job: Job, fields: JsonObject) -> str:
    """Return the text of a record, which may be empty."""
    return text_field(fields, field_name(job, "text"))


def read_text_record(job: Job, fields: JsonObject) -> JsonObject | None:
    """Return the fields of a record with its text as `text`, or None if the text is blank."""
    text = read_text(job, fields)
    return {**fields, "text": text} if text.strip() else None


def read_prompt(job: Job, fields: JsonObject, own: JsonObject = MappingProxyType({})) -> str | None:
    """Return the text of a record, or the job's template filled with its and the task's `own` fields; None if blank."""
    name, template = field_name(job, "text"), job.parameters.get("prompt")
    if template is None:
        text = text_field(fields, name)
        return text if text.strip() else None
    if name in fields and "text" not in fields:  # {text} is the text, whatever name its field has.
        own = {"text": fields[name], **own}
    prompt = fill_template(template, fields, own)
    used = _placeholders(template)
    texts = used & {name, "text"} or used - own.keys() or used
    return None if all(is_blank(own.get(field, fields.get(field))) for field in texts) else prompt


def is_blank(value: object) -> bool:
    """Return whether a value is a text of white space alone."""
    return isinstance(value, str) and not value.strip()


def reads_error(parameters: JsonObject) -> bool:
    """Return whether a job reads the field `error` itself, which is then no error of an earlier run."""
    names = {*parameters.get("fields", {}).values(), parameters.get("condition")}
    return "error" in names | _placeholders(parameters.get("prompt") or "")


def _placeholders(template: str) -> set[str]:
    return {name for _, name, _, _ in parse_template(template) if name is not None}


class FilledTemplate(str):
    """A prompt template filled with fields. `pieces` are its own text and fields in turn: fields are data."""

    pieces: Sequence[str]

    def __new__(cls, pieces: Sequence[str]) -> "FilledTemplate":
        filled = super().__new__(cls, "".join(pieces))
        filled.pieces = pieces
        return filled


def fill_template(template: str, fields: JsonObject, own: JsonObject = MappingProxyType({})) -> FilledTemplate:
    """Return a template with its placeholders replaced by fields, strings or numbers; first by the task's `own`."""
    pieces = list[str]()
    for literal, name, _, _ in parse_template(template):
        known = own if name in own else fields
        value = known.get(name) if name is not None else ""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        pieces += literal, str(value) if name is None or is_number else text_field(known, name)
    return FilledTemplate(pieces)


def check_template(template: str, source: str) -> None:
    """Raise UsageError, which names the `source`, if a template has no placeholder or an invalid one."""
    braces = "write {{ and }} for literal braces"
    try:
        parts = list(parse_template(template))
    except ValueError as exc:
        raise UsageError(f"{source}: {str(exc).lower()}", hint=braces) from exc
    if not any(field for _, field, _, _ in parts):
        raise UsageError(f"{source} has no placeholder", hint='e.g. "Classify: {text}"')
    if any(field is not None and (not field or spec or conversion) for _, field, spec, conversion in parts):
        raise UsageError(f"{source}: invalid placeholder, expected {{name}}", hint=braces)


def build_prompt_parameters(prompt: str | None) -> dict[str, str]:
    """Return the parameters of a job for `--prompt`. Raises UsageError if the template cannot be filled."""
    if prompt is None:
        return {}
    check_template(prompt, "--prompt")
    return {"prompt": prompt}
