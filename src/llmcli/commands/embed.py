"""llmcli embed: compute text embeddings."""

from typing import Annotated

from typer import Option

from llmcli.errors import ExitStatus
from llmcli.io.formats import InputFormat
from llmcli.io.output import OutputFormat
from llmcli.options import BatchModelOptions, OutputOptions, Texts, expand_options
from llmcli.options.input_output import RequestInputOptions
from llmcli.run import run


@expand_options
def embed(
    texts: Texts,
    truncate: Annotated[bool, Option("--truncate", help="Truncate inputs longer than the context length.")] = False,
    *, input: RequestInputOptions, model: BatchModelOptions, output: OutputOptions,
) -> ExitStatus:  # fmt: skip
    """Compute text embeddings.

    The output is JSON Lines, or CSV with --csv. Vectors have length 1: texts with a similar meaning have a large dot
    product.

    \b
    llmcli embed "The harbor clock was repaired in 1951."
    llmcli embed --lines -f sentences.txt > vectors.jsonl
    """
    format = input.format()
    output_format = OutputFormat.CSV if format is InputFormat.CSV and not output.json else OutputFormat.JSON
    spec = output.spec(format, texts, input.files, format=output_format)
    job = model.job("embed", {"fields": input.roles("text")}, truncate=truncate)
    return run(job, input.read(texts), spec)
