"""llmcli embed: compute text embeddings."""

from typing import Annotated

from typer import Option

from llmcli.errors import ExitStatus
from llmcli.io.output import OutputFormat
from llmcli.options import BatchModelOptions, InputOptions, OutputOptions, Texts, expand_options
from llmcli.run import run


@expand_options
def embed(
    texts: Texts,
    truncate: Annotated[bool, Option("--truncate", help="Truncate inputs longer than the context length.")] = False,
    *, input: InputOptions, model: BatchModelOptions, output: OutputOptions,
) -> ExitStatus:  # fmt: skip
    """Compute text embeddings.

    The output is JSON Lines, CSV with --csv, or Parquet with --parquet. Vectors have length 1: texts with a similar
    meaning have a large dot product.

    \b
    llmcli embed "The harbor clock was repaired in 1951."
    llmcli embed --lines -f sentences.txt > vectors.jsonl
    """
    spec = output.spec(input, texts, format=None if input.format().has_fields else OutputFormat.JSON)
    job = model.job("embed", {"fields": input.roles("text")}, truncate=truncate)
    return run(job, input.read(texts), spec)
