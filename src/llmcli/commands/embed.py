"""llmcli embed: compute text embeddings."""

from typing import Annotated, Literal

from typer import Option

from llmcli.errors import ExitStatus
from llmcli.io.output import OutputFormat
from llmcli.options import BatchModelOptions, OutputOptions, Texts, expand_options
from llmcli.options.input_output import RequestInputOptions
from llmcli.run import run


@expand_options
def embed(
    texts: Texts,
    role: Annotated[Literal["query", "document"] | None, Option("--as",
        help="Add the model's prompt for queries or documents.")] = None,
    dimensions: Annotated[int | None, Option(metavar="N", min=1,
        help="Keep the first N dimensions (Matryoshka models).")] = None,
    truncate: Annotated[bool, Option("--truncate", help="Truncate inputs longer than the context length.")] = False,
    *, input: RequestInputOptions, model: BatchModelOptions, output: OutputOptions,
) -> ExitStatus:  # fmt: skip
    """Compute text embeddings.

    The output is JSON Lines, CSV with --csv, or Parquet with --parquet. Vectors are those of sentence-transformers. The
    default model's have length 1: texts with a similar meaning have a large dot product.

    \b
    llmcli embed "The harbor clock was repaired in 1951."
    llmcli embed --lines -f sentences.txt > vectors.jsonl
    llmcli embed --as query "Who repaired the clock?"
    """
    spec = output.spec(input, texts, format=None if input.format().has_fields else OutputFormat.JSON)
    parameters = {"fields": input.roles("text"), "role": role, "dimensions": dimensions}
    job = model.job("embed", parameters, truncate=truncate)
    return run(job, input.read(texts), spec)
