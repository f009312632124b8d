"""Options for the form of answers, and for settings that records bring along."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from typer import Option

from llmcli.errors import UsageError, first_line
from llmcli.options.generation import CommonGenerationOptions
from llmcli.options.input_output import InputOptions
from llmcli.text.constraints import check_constraint, parse_json


@dataclass
class StructureOptions:
    """Structured output"""

    # fmt: off
    schema: Annotated[str | None, Option(metavar="FILE|JSON", help="JSON Schema for the answer.")] = None
    regex: Annotated[str | None, Option(metavar="PATTERN", help="Regular expression for the whole answer.")] = None
    choice: Annotated[list[str], Option(metavar="TEXT", help="One of the possible answers; repeatable.")] = field(
        default_factory=list)
    grammar: Annotated[str | None, Option(metavar="FILE", help="Lark grammar for the answer.")] = None
    schema_field: Annotated[str | None, Option(metavar="NAME",
        help="Input field with a JSON Schema for its record.")] = None
    settings_field: Annotated[str | None, Option(metavar="NAME",
        help="Input field with generation settings for its record.")] = None
    # fmt: on

    def job_fields(self, input: InputOptions, generation: CommonGenerationOptions) -> dict[str, object]:
        """Return the fields of a job that the options set. Raises UsageError if they are invalid or conflict."""
        values = {name: self._read(name) for name in ("schema", "regex", "choice", "grammar")}
        constraint = {name: value for name, value in values.items() if value is not None}
        fields = {name: getattr(self, name) for name in ("schema_field", "settings_field")}
        options = [f"--{name.replace('_', '-')}" for name in [*constraint, *filter(fields.get, fields)]]
        if len(constraint) > 1:
            raise UsageError(f"{options[0]} cannot be used with {options[1]}")
        if any(fields.values()) and not input.format().has_fields:
            raise UsageError(f"{options[-1]} requires records with fields", hint="use --jsonl, --csv or --parquet")
        if options and options[0] != "--settings-field" and generation.config().get("stop_strings"):
            raise UsageError(f"--stop cannot be used with {options[0]}")
        if constraint:
            try:
                check_constraint(constraint)
            except ValueError as exc:
                raise UsageError(f"{options[0]}: {exc}") from None
        return {**fields, "constraint": constraint or None}

    def _read(self, name: str) -> object:
        """Return the value of a constraint, which may be in a file; None if it is not given."""
        value = getattr(self, name)
        texts = value if name == "choice" else [value]
        if not all(text is None or text.strip() for text in texts):
            raise UsageError(f"--{name} must not be empty")
        if len(set(texts)) < len(texts):
            raise UsageError("--choice: the same text is given twice")
        if not value or name in ("regex", "choice"):
            return value or None
        try:
            if name == "grammar" or not (value.lstrip().startswith("{") or value in ("true", "false")):
                value = Path(value).read_text(encoding="utf-8-sig")
            return parse_json(value) if name == "schema" else value
        except OSError as exc:
            hint = """JSON begins with "{", e.g. '{"type": "object"}'""" if name == "schema" else None
            raise UsageError(f"--{name}: {value}: {(exc.strerror or str(exc)).lower()}", hint) from exc
        except ValueError as exc:
            raise UsageError(f"--{name}: invalid: {first_line(exc)}") from exc


@dataclass
class AnswerOptions(StructureOptions):
    """Structured output"""

    logprobs: Annotated[int | None, Option(metavar="[N]", min=0, max=20,
        help="Return log-probabilities of tokens, and N alternatives.")] = None  # fmt: skip

    def job_fields(self, input: InputOptions, generation: CommonGenerationOptions) -> dict[str, object]:
        if self.logprobs is not None and (generation.config().get("num_beams") or 1) > 1:
            raise UsageError("--logprobs cannot be used with --num-beams")
        return {**super().job_fields(input, generation), "logprobs": self.logprobs}
