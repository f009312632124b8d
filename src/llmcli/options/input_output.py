"""Options for reading records and writing results, and the switches for stderr."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from llmcli import config, console
from llmcli.errors import UsageError
from llmcli.io.decoding import Dialect, find_encoding
from llmcli.io.formats import InputFormat
from llmcli.io.output import HAVE_FIELDS, OutputFormat, OutputSpec
from llmcli.io.parquet import TableSource
from llmcli.io.records import open_inputs, read_prompts, read_records
from llmcli.io.resume import fingerprint
from llmcli.job import Record

Texts = Annotated[list[str], Argument(metavar="TEXT", default_factory=list, show_default=False)]
Prompt = Annotated[str | None, Option(metavar="TEMPLATE",
    help='Prompt template with record fields, e.g. "Classify: {text}".')]  # fmt: skip
Json = Annotated[bool, Option("--json", help="Write JSON Lines.")]
OutputPath = Annotated[Path | None, Option("--output", metavar="PATH",
    help="Write results to PATH, which must not exist; - is stdout.")]  # fmt: skip
Quiet = Annotated[bool, Option("--quiet", "-q", callback=console.set_quiet, help="Print errors only.")]
Verbose = Annotated[bool, Option("--verbose", "-v", callback=console.set_verbose,
    help="Print tracebacks and library warnings.")]  # fmt: skip
FORMATS = {
    InputFormat.WHOLE: OutputFormat.TEXT, InputFormat.LINES: OutputFormat.LINES, InputFormat.NULL: OutputFormat.NULL,
    InputFormat.JSONL: OutputFormat.JSON, InputFormat.CSV: OutputFormat.CSV, InputFormat.PARQUET: OutputFormat.PARQUET,
    InputFormat.OPENAI_BATCH: OutputFormat.OPENAI_BATCH,
}  # fmt: skip
NOT_PARQUET = (".arrow", ".feather", ".ipc", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".gz", ".bz2", ".zst", ".xz")


def split_names(names: str | None) -> list[str]:
    """Return names that are separated by commas."""
    return [name.strip() for name in names.split(",")] if names is not None else []


@dataclass
class InputOptions:
    """Input"""

    files: Annotated[list[str], Option("--file", "-f", metavar="PATH",
        help="Read input from PATH; repeatable. Use - for stdin.")] = field(default_factory=list)  # fmt: skip
    lines: Annotated[bool, Option("--lines", help="Treat each line as a record.")] = False
    null: Annotated[bool, Option("--null", help="Treat each NUL-terminated string as a record.")] = False
    jsonl: Annotated[bool, Option("--jsonl", help="Read and write JSON Lines, one object per line.")] = False
    csv: Annotated[bool, Option("--csv", help="Read and write CSV; the first row is the header.")] = False
    delimiter: Annotated[str | None, Option(metavar="CHAR",
        help="Delimiter of CSV: one character, or tab (default: ,).")] = None  # fmt: skip
    encoding: Annotated[str, Option(metavar="NAME",
        help="Encoding of files and stdin, e.g. cp1252; or auto.")] = "utf-8"  # fmt: skip
    parquet: Annotated[bool, Option("--parquet", help="Read Parquet or Arrow files, and write Parquet.")] = False
    columns: Annotated[str | None, Option(metavar="NAMES",
        help="Read only these columns of --parquet, separated by commas.")] = None  # fmt: skip
    fields: Annotated[list[str], Option("--field", metavar="[ROLE=]NAME",
        help="Input field to use (default: text); repeatable.")] = field(default_factory=list)  # fmt: skip

    def format(self) -> InputFormat:
        """Return the record format that was chosen; raise UsageError if there are several."""
        chosen = [format for format in InputFormat if getattr(self, format.value.replace("-", "_"), False)]
        if len(chosen) > 1:
            raise UsageError(f"--{chosen[0].value} cannot be used with --{chosen[1].value}")
        if self.columns is not None and not self.parquet:
            raise UsageError("--columns requires --parquet")
        return chosen[0] if chosen else InputFormat.WHOLE

    @cached_property
    def dialect(self) -> Dialect:
        """How the text of the input is written. Raises UsageError if --encoding or --delimiter is invalid."""
        delimiter = {"tab": "\t", "\\t": "\t"}.get(self.delimiter or "", self.delimiter)
        if delimiter is not None and self.format() is not InputFormat.CSV:
            raise UsageError("--delimiter requires --csv")
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise UsageError(f"--delimiter: expected one character or tab, got {delimiter!r}")
        return Dialect(find_encoding(self.encoding), delimiter)

    @cached_property
    def table(self) -> TableSource:
        """The files of --parquet. Raises UsageError if they cannot be tables."""
        if not find_spec("pyarrow"):
            raise UsageError("--parquet requires the package pyarrow", hint='pip install "llmcli[parquet]"')
        inputs = open_inputs([], self.files)
        if piped := [input.name or "stdin" for input in inputs if input.size is None and not config.rank()]:
            raise UsageError(f"{piped[0]}: --parquet requires a regular file: Parquet is read from its end")
        return TableSource(inputs, split_names(self.columns))

    def read(self, texts: Sequence[str] = ()) -> Iterator[Record]:
        """Yield the records of the texts, then of the files; of stdin if there are neither."""
        if not self.parquet:
            return read_records(open_inputs(texts, self.files), self.format(), self.dialect)
        if texts:
            raise UsageError("TEXT cannot be used with --parquet", hint="pass files with -f PATH")
        return self.table.records()

    def read_prompts(self, texts: Sequence[str]) -> Iterator[Record]:
        """Yield the records of generate and chat: texts and files together are one prompt."""
        return self.read(texts) if self.parquet else read_prompts(texts, self.files, self.format(), self.dialect)

    def roles(self, *known: str) -> dict[str, str]:
        """Return the field name for each role, e.g. {"text": "review"}.

        Args:
            known: Roles of the command. A --field without a role sets the first one.
        """
        roles = {role: role for role in known}
        for item in self.fields:
            role, _, name = item.rpartition("=")
            role = role or known[0]
            if role not in roles:
                raise UsageError(f"--field: unknown role {role!r}", hint=f"roles: {', '.join(known)}")
            roles[role] = name
        return roles


@dataclass
class RequestInputOptions(InputOptions):
    """Input"""

    openai_batch: Annotated[bool, Option("--openai-batch",
        help="Read requests and write responses of the OpenAI API.")] = False  # fmt: skip


@dataclass
class OutputOptions:
    """Output"""

    json: Json = False
    output: OutputPath = None
    resume: Annotated[bool, Option("--resume", help="Continue an interrupted run; requires --output.")] = False
    retry_errors: Annotated[bool, Option("--retry-errors", help="Retry records that failed in an earlier run.")] = False
    on_error: Annotated[Literal["skip", "stop"], Option(help="Skip failed records, or stop at the first one.")] = "skip"
    rename: Annotated[list[str], Option(metavar="RESULT=NEW",
        help="Write a result field under another name; repeatable.")] = field(default_factory=list)  # fmt: skip
    select: Annotated[str | None, Option(metavar="NAMES",
        help="Write only these result fields, separated by commas.")] = None  # fmt: skip
    stats: Annotated[bool, Option("--stats", help="Print run statistics to stderr as JSON.")] = False
    quiet: Quiet = False
    verbose: Verbose = False

    def spec(self, input: InputOptions, texts: Sequence[str] = (), *, format: OutputFormat | None = None) -> OutputSpec:
        """Return where and how results are written.

        Args:
            input: How records are read; results are written alike unless --json is given.
            texts: Texts of the input; --resume checks that they, and the files, stay the same.
            format: Output format of a command that writes no other.
        """
        input_format, table = input.format(), input.table if input.parquet else None
        given, files = (
            [*texts, input.dialect.encoding, input.dialect.delimiter or "", *split_names(input.columns)],
            input.files,
        )
        format = format or (OutputFormat.JSON if self.json else FORMATS[input_format])
        format = OutputFormat.OPENAI_BATCH if input_format is InputFormat.OPENAI_BATCH else format
        if (self.rename or self.select is not None) and format not in HAVE_FIELDS:
            option = "--rename" if self.rename else "--select"
            raise UsageError(f"{option} requires --json, --jsonl, --csv or --parquet")
        rename = {name: new for name, _, new in (item.partition("=") for item in self.rename)}
        if len(rename) < len(self.rename) or not all([*rename, *rename.values()]):
            raise UsageError("--rename requires RESULT=NEW, once for each field")
        path = None if self.output == Path("-") else self.output
        if path and os.path.exists(path) and not os.path.isfile(path):
            raise UsageError(f"'{path}' exists and is not a regular file", hint="choose another path; - is stdout")
        if path and path.suffix.lower() in (NOT_PARQUET if format is OutputFormat.PARQUET else (".parquet",)):
            hint = (
                "choose a name ending in .parquet, or add --json"
                if format is OutputFormat.PARQUET
                else "choose another name; Parquet requires --parquet without --json"
            )
            raise UsageError(f"cannot write {format.value} to '{path}'", hint)
        if self.resume and not path:
            raise UsageError("--resume requires --output PATH")
        if self.resume and format is OutputFormat.TEXT:
            hint = "add --json, --jsonl, --csv, --parquet, --lines or --null"
            raise UsageError("--resume requires a structured format", hint)
        return OutputSpec(
            format=format, path=path, dialect=input.dialect,
            fingerprint=fingerprint(given, files) if path and format is not OutputFormat.TEXT else None,
            resume=self.resume, retry=self.retry_errors, stats=self.stats, stop_on_error=self.on_error == "stop",
            has_files=bool(files), has_records=input_format is not InputFormat.WHOLE, rename=rename,
            select=None if self.select is None else split_names(self.select),
            table=table if format is OutputFormat.PARQUET else None,
        )  # fmt: skip
