"""How a command is declared: options come in groups, each a dataclass, and a group is a section of --help.

    @spread
    def generate(texts: Texts, generation: GenerationOptions, output: OutputOptions) -> ExitStatus: ...

The fields of the dataclasses become the command's options; the function gets the filled-in groups.
"""

import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from llmcli.errors import ExitStatus

DASHED = re.compile(r"--?[^\s=]*\s|-\d")  # rather a text than an option


class Command(TyperCommand):
    """A command whose plain-text help keeps its options in their groups."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        fail = ctx.fail
        has_text = any(getattr(param, "metavar", None) in ("TEXT", "QUESTION") for param in self.get_params(ctx))
        quotes = "\nA text of several words goes into quotes; a file is named with -f." if has_text else ""
        ctx.fail = lambda message: fail(f"{message}{quotes if 'extra argument' in message else ''}")
        texts = [word for word in args if has_text and DASHED.match(word)]
        try:
            rest: list[str] = super().parse_args(ctx, args)
        except Exception as exc:
            unknown: Any = exc  # option: a class that typer keeps to itself
            if any(text.startswith(getattr(unknown, "option_name", "\n")) for text in texts):
                unknown.message += f"\nA text that begins with - goes behind --: {ctx.command_path} -- TEXT"
            raise
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record and record[1]:  # an argument without help is in the usage line already
                title = getattr(param, "rich_help_panel", None) or "Options"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def expand_options(function: Callable[..., ExitStatus | None]) -> Callable[..., None]:
    """Make a function a command: its groups are spread into options, and the status it returns becomes
    the exit code."""
    plain: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if dataclasses.is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            plain += [_option(field, parameter.annotation) for field in dataclasses.fields(parameter.annotation)]
        else:
            plain.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        if status := function(**values):
            raise typer.Exit(status)

    run.__signature__ = inspect.Signature(plain)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in plain}
    return run


def _option(field: dataclasses.Field[Any], group: Any) -> inspect.Parameter:
    """A field `name: Annotated[type, typer.Option(...)] = default` as a function's parameter."""
    assert get_origin(field.type) is Annotated, f"{field.name} is not declared as an option"
    kind, info = get_args(field.type)
    info = copy.copy(info)  # commands without groups share it
    info.rich_help_panel = group.__doc__
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )
