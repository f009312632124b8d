"""llmcli rerank: rank texts by their relevance to a query."""

import math
from dataclasses import replace
from typing import Annotated

from typer import Argument, Option

from llmcli.errors import ExitStatus, UsageError
from llmcli.io.formats import InputFormat
from llmcli.io.output import HAVE_FIELDS, OutputFormat
from llmcli.io.units import format_passage
from llmcli.job import Result
from llmcli.options import BatchModelOptions, InputOptions, OutputOptions, expand_options
from llmcli.run import run


@expand_options
def rerank(
    query: Annotated[str, Argument(metavar="QUERY", show_default=False)],
    paths: Annotated[list[str], Argument(metavar="FILE", default_factory=list, show_default=False)],
    limit: Annotated[int | None, Option("--limit", "-n", metavar="N", min=1,
        help="Number of texts to print (default: all).")] = None,
    *, input: InputOptions, model: BatchModelOptions, output: OutputOptions,
) -> ExitStatus:  # fmt: skip
    """Rank texts by their relevance to a query.

    The texts are the lines of FILE or stdin, or records with --jsonl or --csv. Prints the most relevant one first, as
    file:line: text (score). --json adds the rank. Requires a cross-encoder: a reranker with one score.

    \b
    llmcli rerank -m ms-marco-minilm "how to undo a commit" manual.txt
    llmcli rerank -m ms-marco-minilm "good soup" --jsonl -n 10 < reviews.jsonl
    """
    if not query.strip():
        raise UsageError("QUERY must not be empty")
    if output.resume or output.retry_errors or model.shard:
        raise UsageError("rerank does not support --resume, --retry-errors or --shard")
    input = replace(input, files=[*paths, *input.files], lines=input.lines or input.format() is InputFormat.WHOLE)
    spec = output.spec(input, format=OutputFormat.JSON if input.parquet else None)  # The rows change their order.
    job = model.job("rerank", {"query": query, "fields": input.roles("text")})
    records = list(input.read())
    if input.lines or input.null:
        records = [replace(record, fields={"line": record.line, **record.fields}) for record in records]
    results: list[Result] = []

    def finish(result: Result) -> list[Result]:
        """Return nothing until the last result, then all of them: the best first, those without a score at the end."""
        results.append(result)
        if len(results) < len(records):
            return []
        results.sort(key=lambda r: -math.inf if r.output.get("score") is None else r.output["score"], reverse=True)
        ranked = [_add_rank(result, rank) for rank, result in enumerate(results, start=1)]
        kept = [result for i, result in enumerate(ranked) if result.failure or not limit or i < limit]
        return kept if spec.format in HAVE_FIELDS else [each for each in kept if each.text]

    return run(job, records, replace(spec, fingerprint=None, finish=finish))


def _add_rank(result: Result, rank: int) -> Result:
    """Return a result with its rank, and the text for text mode; unchanged if it has no score."""
    if (score := result.output.get("score")) is None:
        return result
    file, line, text = result.record.file, result.record.line, str(result.record.fields.get("text"))
    shown = format_passage(file, line, text, score)
    return replace(result, output={"rank": rank, **result.output}, text=shown)
