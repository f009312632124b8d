"""Prompt templates: text with names of fields in braces, such as "Classify: {text}"."""

import string

from llmcli.errors import UsageError
from llmcli.job import Job, JsonObject
from llmcli.tasks.fields import field_name, text_field


def check_template(template: str, source: str) -> None:
    """Check that a template can be filled. Errors name its `source`.

    Raises:
        UsageError: The template has no placeholder, or an invalid one.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as exc:
        raise UsageError(f"{source}: {str(exc).lower()}", hint="write {{ and }} for literal braces") from exc
    if not any(field for _, field, _, _ in parts):
        raise UsageError(f"{source} has no placeholder", hint='e.g. "Classify: {text}"')
    for _, field, spec, conversion in parts:
        if field is not None and (not field or spec or conversion):
            raise UsageError(
                f"{source}: invalid placeholder, expected {{name}}", hint="write {{ and }} for literal braces"
            )


def fill_template(template: str, fields: JsonObject) -> str:
    """Return a template with its placeholders replaced by fields. Numbers are allowed.

    Raises:
        RecordError: A field is missing or is not a string.
    """
    parts = string.Formatter().parse(template)
    return "".join(literal + ("" if name is None else _format_field(fields, name)) for literal, name, _, _ in parts)


def build_prompt_parameters(prompt: str | None) -> dict[str, str]:
    """Return the parameters of a job for `--prompt`. Raises UsageError if the template cannot be filled."""
    if prompt is None:
        return {}
    check_template(prompt, "--prompt")
    return {"prompt": prompt}


def read_prompt(job: Job, fields: JsonObject) -> str | None:
    """Return the text of a record, or the job's template filled with its fields; None if the text is empty.

    Raises:
        RecordError: A field is missing or is not a string.
    """
    name, template = field_name(job, "text"), job.parameters.get("prompt")
    if template is None:
        return text_field(fields, name) or None
    if name in fields:  # {text} is the text, whatever name its field has.
        fields = {"text": fields[name], **fields}
    placeholders = {field for _, field, _, _ in string.Formatter().parse(template)}
    if fields.get(name) == "" and {name, "text"} & placeholders:
        return None
    return fill_template(template, fields) or None


def _format_field(fields: JsonObject, name: str) -> str:
    value = fields.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return text_field(fields, name)
