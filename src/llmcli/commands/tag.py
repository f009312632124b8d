"""llmcli tag: find names, places and other entities."""

from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from typer import Option

from llmcli.errors import ExitStatus
from llmcli.io.output import OutputFormat
from llmcli.job import Result
from llmcli.options import BatchModelOptions, InputOptions, OutputOptions, Texts, expand_options
from llmcli.run import run


@expand_options
def tag(
    texts: Texts,
    aggregation: Annotated[Literal["none", "simple", "first", "average", "max"], Option(
        help="How to join tokens: none, simple, or by whole words.")] = "simple",
    *, input: InputOptions, model: BatchModelOptions, output: OutputOptions,
) -> ExitStatus:  # fmt: skip
    """Find names, places and other entities.

    Requires a model with a token-classification head. Text mode prints one line per entity: its text, label and place
    in characters, separated by tabs; with --lines, all entities of a record on one line. --json adds the scores.

    \b
    llmcli tag -m dslim/bert-base-NER "Ada Lovelace lived in London."
    llmcli tag -m dslim/bert-base-NER --jsonl < letters.jsonl > entities.jsonl
    """
    spec = output.spec(input, texts)
    job = model.job("tag", {"fields": input.roles("text"), "aggregation": aggregation})
    return run(job, input.read(texts), replace(spec, finish=partial(_finish, spec.format)))


def _finish(format: OutputFormat, result: Result) -> list[Result]:
    """Return the result with all entities on one line for --lines; nothing if text mode has nothing to print."""
    if format is OutputFormat.TEXT and not (result.text or result.failure):
        return []
    return [replace(result, text=result.text.replace("\n", "\t")) if format is OutputFormat.LINES else result]
