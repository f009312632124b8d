"""Reads the fields of a record, under the names that the job gives them."""

from llmcli.errors import RecordError
from llmcli.job import Job, JsonObject


def field_name(job: Job, role: str) -> str:
    """Return the name of the field with a role, such as "text": the one that --field names, else the role itself."""
    name: str = job.parameters.get("fields", {}).get(role, role)
    return name


def text_field(fields: JsonObject, name: str) -> str:
    """Return the string in a field of a record.

    Raises:
        RecordError: The field is missing, is not a string, or cannot be encoded as UTF-8.
    """
    if name not in fields:
        available = ", ".join(map(str, fields))[:200] or "none"
        raise RecordError("missing_field", f"missing field {name!r}", hint=f"available fields: {available}")
    value = fields[name]
    if not isinstance(value, str):
        raise RecordError("wrong_type", f"field {name!r} must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise RecordError("invalid_text", f"field {name!r}: lone surrogate at character {exc.start}") from None
    return value


def read_text(job: Job, fields: JsonObject) -> str:
    """Return the text of a record, which may be empty. Raises RecordError if the text is missing or invalid."""
    return text_field(fields, field_name(job, "text"))


def read_text_record(job: Job, fields: JsonObject) -> JsonObject | None:
    """Return the fields of a record with its text as `text`, or None if the text is blank."""
    text = read_text(job, fields)
    return {**fields, "text": text} if text.strip() else None
