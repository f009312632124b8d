"""llmcli rerank: rank texts by their relevance to a query."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

from typer import Argument, Option

from llmcli.errors import ExitStatus, UsageError
from llmcli.io.formats import InputFormat
from llmcli.io.records import open_inputs, read_records
from llmcli.job import Result
from llmcli.options import BatchModelOptions, InputOptions, OutputOptions, expand_options
from llmcli.run import run

TEXT_FORMATS = InputFormat.LINES, InputFormat.NULL


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
    llmcli rerank -m ms-marco-minilm "how to undo a commit" tips.txt
    llmcli rerank -m bge-reranker "red shoes" --jsonl -n 10 < products.jsonl
    """
    if not query.strip():
        raise UsageError("QUERY must not be empty")
    if output.resume or output.retry_errors:
        raise UsageError("rerank does not support --resume or --retry-errors")
    format, files = input.format(), [*paths, *input.files]
    format = InputFormat.LINES if format is InputFormat.WHOLE else format
    spec = output.spec(format, (), files)
    job = model.job("rerank", {"query": query, "fields": input.roles("text")})
    records = list(read_records(open_inputs([], files), format))
    if format in TEXT_FORMATS:
        records = [replace(record, fields={"line": record.line, **record.fields}) for record in records]
    ranking = Ranking(len(records), limit, is_text=format in TEXT_FORMATS and not output.json)
    return run(job, records, replace(spec, fingerprint=None, finish=ranking.add))


@dataclass
class Ranking:
    """Collects the results of all records, and ranks them."""

    count: int  # of the records
    limit: int | None
    is_text: bool
    results: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> Sequence[Result]:
        """Return the ranked results with the last of them; those without a score follow, if text mode can show them."""
        self.results.append(result)
        if len(self.results) < self.count:
            return []
        scored = [result for result in self.results if result.output.get("score") is not None]
        scored.sort(key=lambda result: result.output["score"], reverse=True)
        ranked = [_add_rank(rank, result) for rank, result in enumerate(scored[: self.limit], start=1)]
        others = [result for result in self.results if result.output.get("score") is None]
        if self.limit is not None:  # A text that failed may be relevant.
            others = [result for result in others if result.failure]
        return ranked if self.is_text else [*ranked, *others]


def _add_rank(rank: int, result: Result) -> Result:
    record, output = result.record, {"rank": rank, **result.output}
    place = f"{f'{record.file}:' if record.file else ''}{record.line}: "
    shown = f"{place}{' '.join(str(record.fields.get('text', '')).split())} ({output['score']:.3f})"
    return replace(result, output=output, text=shown)
