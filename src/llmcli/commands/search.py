"""llmcli search: search files by meaning, and print passages as grep does."""

import os
from dataclasses import replace
from typing import Annotated

from typer import Argument, Option

from llmcli import config, console
from llmcli.errors import ExitStatus, LlmcliError, UsageError
from llmcli.io.formats import InputFormat
from llmcli.io.records import open_inputs, read_records
from llmcli.job import Record, Result
from llmcli.options import BatchModelOptions, InputOptions, OutputOptions, expand_options
from llmcli.run import run


@expand_options
def search(
    query: Annotated[str, Argument(metavar="QUERY", show_default=False)],
    files: Annotated[list[str], Argument(metavar="FILE", default_factory=list, show_default=False)],
    limit: Annotated[int, Option("--limit", "-n", metavar="N", min=1, help="Number of passages to print.")] = 5,
    *, model: BatchModelOptions, output: OutputOptions,
) -> ExitStatus:  # fmt: skip
    """Search files by meaning.

    Prints the passages most similar to QUERY, the best first, as file:line: passage (score). Without FILE, searches the
    lines of stdin. Embeddings are cached, so the next search of the same files is fast.

    \b
    llmcli search "how to undo a commit" docs/*.md
    history | llmcli search "the command that fixed the network" -n 3
    """
    if not query.strip():
        raise UsageError("QUERY must not be empty")
    if config.world_size() > 1:
        raise UsageError("search cannot run in several processes")
    if output.resume or output.retry_errors or model.shard:
        raise UsageError("search does not support --resume, --retry-errors or --shard")
    format = InputFormat.WHOLE if files else InputFormat.LINES
    inputs = list(read_records(open_inputs([], _skip_unreadable(files)), format))
    if not inputs:
        console.warning("input is empty")
    job = model.job("search", {"limit": limit})
    records = [record for record in inputs if record.failure]
    texts = [{**record.fields, "file": record.file, "line": record.line} for record in inputs if not record.failure]
    if texts:
        records.append(Record({"query": query, "texts": texts}))
    extra = len(inputs) - len(records)
    spec = replace(output.spec(InputOptions()), fingerprint=None, finish=_expand_matches, extra_records=extra)
    return run(job, records, spec)


def _skip_unreadable(files: list[str]) -> list[str]:
    """Return the files without directories and dangling links, which a pattern such as `docs/*` may bring."""
    kept = []
    for name in files:
        if os.path.lexists(name) and (os.path.isdir(name) or not os.access(name, os.R_OK)):
            console.warning(f"skipped {name!r}: {'directory' if os.path.isdir(name) else 'cannot be read'}")
        else:
            kept.append(name)
    if files and not kept:
        raise UsageError("no file to search", hint=f"pass files, e.g. {os.path.join(files[0], '*')}")
    return kept


def _expand_matches(result: Result) -> list[Result]:
    """Return one result per passage; nothing for a file that cannot be read."""
    if result.record.failure:
        return []
    if result.failure:
        raise LlmcliError(result.failure.message)
    results = []
    for match in result.output["matches"]:
        file, line, text, score = match["file"], match["line"], match["text"], match["score"]
        passage = f"{f'{file}:' if file else ''}{line}: {' '.join(text.split())} ({score:.3f})"
        results.append(Result(Record({"line": line, "text": text}, file), {"score": score}, passage))
    return results
