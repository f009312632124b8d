"""llmcli embed: texts to vectors."""

from dataclasses import replace
from typing import Annotated

import typer

from llmcli.errors import ExitStatus
from llmcli.io.formats import InputFormat
from llmcli.io.output import OutputFormat
from llmcli.io.records import read, sources
from llmcli.job import Job
from llmcli.options import InputOptions, ModelOptions, OutputOptions
from llmcli.options.expand import expand_options
from llmcli.run import run


@expand_options
def embed(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT", default_factory=list, show_default=False)],
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut the end of a text that is too long.")] = False,
    *,
    input: InputOptions,
    model: ModelOptions,
    output: OutputOptions,
) -> ExitStatus:
    """Print each text's vector, as JSON Lines.

    Vectors have length 1: the nearer in meaning, the greater their dot product.

    \b
    llmcli embed "The harbour clock was repaired in 1951."
    llmcli embed --lines -f sentences.txt > vectors.jsonl
    """
    form = input.form()
    target = output.target(form, texts, input.files)
    if form is not InputFormat.CSV:
        target = replace(target, format=OutputFormat.JSON)
    job = Job(
        task="embed",
        model=model.name("embed"),
        parameters={"fields": input.roles("text")},
        load_options=model.load_options(),
        batch_size=model.batch(),
        keep_alive=model.kept(),
        truncate=truncate,
    )
    return run(job, read(sources(texts, input.files), form), target)
