"""Declare a command by groups of options. Each group is a dataclass, and a section of --help."""

import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args, get_origin

import typer

from llmcli.compat.typer import TyperCommand, TyperGroup
from llmcli.errors import ExitStatus, UsageError
from llmcli.models import registry

OPTIONAL_VALUES = {"[N]": (str.isdecimal, "0"), "[MODEL]": (registry.is_model, "")}  # what one is, and the default
PROBABLY_TEXT = re.compile(r"--?[^\s=]*\s|-\d")  # a word that begins like an option


class Command(TyperCommand):
    """A command with plain-text help that keeps options in their groups, and hints for texts without quotes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        fail = ctx.fail
        has_text = any(getattr(param, "metavar", None) in ("TEXT", "QUESTION") for param in self.get_params(ctx))
        hint = "\nhint: quote a text of several words; name a file with -f" if has_text else ""
        ctx.fail = lambda message: fail(f"{message}{hint if 'extra argument' in message else ''}")
        texts = [word for word in args if has_text and PROBABLY_TEXT.match(word)]
        kinds = {
            name: OPTIONAL_VALUES.get(param.metavar or "") for param in self.get_params(ctx) for name in param.opts
        }
        args = _add_optional_values(args, kinds)
        try:
            rest: list[str] = super().parse_args(ctx, args)
        except Exception as exc:
            error: Any = exc  # Typer does not export NoSuchOption, the class that has an option_name.
            if any(text.startswith(getattr(error, "option_name", "\n")) for text in texts):
                error.message += f"\nhint: put text that starts with '-' after '--': {ctx.command_path} -- TEXT"
            raise
        for param in self.get_params(ctx):
            _check_utf8(param, ctx.params.get(param.name))
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record and record[1]:  # The usage line shows arguments that have no help.
                title = getattr(param, "rich_help_panel", None) or "Options"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=min(30, formatter.width // 3))


class Group(TyperGroup):
    """A group of commands: `help COMMAND` is `COMMAND --help`, and options belong after the command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        try:
            rest: list[str] = super().parse_args(ctx, args)
        except Exception as exc:
            error: Any = exc  # as above
            if name := getattr(error, "option_name", None):
                error.message += f"\nhint: put options after the command: {ctx.command_path} COMMAND {name}"
            raise
        return rest


def _add_optional_values(args: list[str], kinds: Mapping[str, tuple[Callable[[str], bool], str] | None]) -> list[str]:
    """Return arguments with `=` and a default after those options, whose value is optional, that no value follows."""
    end = args.index("--") if "--" in args else len(args)
    completed = []
    for word, value in zip(args[:end], [*args[1:], ""], strict=False):
        kind = kinds.get(word)
        completed.append(f"{word}={kind[1]}" if kind and not kind[0](value) else word)
    return completed + args[end:]


def _check_utf8(param: Any, value: object) -> None:
    """Raise UsageError if a value of the command line is not UTF-8. Only names of files may be other bytes."""
    texts = value if isinstance(value, list | tuple) else [value]
    for text in texts if param.metavar not in ("PATH", "FILE") else ():
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else b""
        try:
            data.decode()
        except UnicodeDecodeError as exc:
            name = max(param.opts, key=len) if param.param_type_name == "option" else param.metavar
            message = f"{name}: not UTF-8: byte 0x{data[exc.start]:02x} at offset {exc.start}"
            raise UsageError(message, "convert it with iconv") from None


def expand_options(function: Callable[..., ExitStatus | None]) -> Callable[..., None]:
    """Make a function a command for `typer.Typer.command`.

    Parameters whose type is a dataclass are expanded into one option per field. The exit status that the function
    returns becomes the exit code.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        group = parameter.annotation
        if dataclasses.is_dataclass(group):
            groups[parameter.name] = group
            parameters += [_parameter(field, group.__doc__) for field in dataclasses.fields(group)]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def run(**values: object) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        if status := function(**values):
            raise typer.Exit(status)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(field: "dataclasses.Field[object]", panel: str | None) -> inspect.Parameter:
    """Return the parameter for a field `name: Annotated[type, Option(...)] = default`."""
    assert get_origin(field.type) is Annotated, f"{field.name} is not declared as an option"
    kind, info = get_args(field.type)
    info = copy.copy(info)  # Commands without groups use the same object.
    info.rich_help_panel = info.rich_help_panel or panel
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    parameter = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default)
    return parameter.replace(annotation=Annotated[kind, info])
