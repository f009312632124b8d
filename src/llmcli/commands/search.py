"""llmcli search: passages nearest in meaning, printed as grep prints."""

from contextlib import nullcontext
from typing import Annotated

import typer

from llmcli import config, console, engines
from llmcli.errors import ExitStatus, LlmcliError, UsageError
from llmcli.io.formats import InputFormat
from llmcli.io.output import Output, OutputFormat
from llmcli.io.progress import Tally, summary
from llmcli.io.records import read, sources
from llmcli.job import Job, Record, Result
from llmcli.options import ModelOptions, OutputOptions
from llmcli.options.expand import expand_options

BATCH_SIZE = 32


@expand_options
def search(
    query: Annotated[str, typer.Argument(metavar="QUERY", show_default=False)],
    files: Annotated[list[str], typer.Argument(metavar="FILE", default_factory=list, show_default=False)],
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", min=1, help="How many passages to show.")] = 5,
    *,
    model: ModelOptions,
    output: OutputOptions,
) -> ExitStatus:
    """Print the passages nearest in meaning to QUERY.

    The best comes first, as file:line: passage (score). Without FILE, the lines of stdin. What was embedded once is
    kept: a second search is quick.

    \b
    llmcli search "how to undo a commit" docs/*.md
    history | llmcli search "the command that fixed the network" -n 3
    """
    if not query.strip():
        raise UsageError("the query is empty")
    if config.world_size() > 1:
        raise UsageError("search runs in one process")
    if output.resume or output.retry_errors:
        raise UsageError("search does not go with --resume and --retry-errors: it ends with all passages or none")
    found = list(read(sources([], files), InputFormat.WHOLE if files else InputFormat.LINES))
    name, tally = model.name("search"), Tally()
    with summary(name, tally) if output.stats else nullcontext():
        for record in found:
            tally.add(Result(record, failure=record.failure))
            if record.failure:
                console.error(f"{record.where}{record.failure.message}")
        if tally.failed and output.on_error == "stop":
            return ExitStatus.FAILED
        job = Job(
            task="search",
            model=name,
            parameters={"limit": limit},
            load_options=model.load_options(),
            batch_size=model.batch() or BATCH_SIZE,
            keep_alive=model.kept(),
        )
        texts = [{**record.fields, "file": record.file, "line": record.line} for record in found if not record.failure]
        (result,) = engines.engine_for(job).run(job, [Record({"query": query, "texts": texts})])
        if result.failure:
            raise LlmcliError(result.failure.message)
        with Output(OutputFormat.JSON if output.json else OutputFormat.TEXT, path=output.output, model=name) as out:
            for match in result.output["matches"]:
                place = f"{match['file']}:{match['line']}" if match["file"] else str(match["line"])
                text = f"{place}: {' '.join(match['text'].split())} ({match['score']:.3f})"
                record = Record({"line": match["line"], "text": match["text"]}, match["file"])
                out.write(Result(record, {"score": match["score"]}, text))
    return ExitStatus.of(tally.failed, tally.records)
