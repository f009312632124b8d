"""llmcli search: search files by meaning, and print passages as grep does."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated

from typer import Argument, Option

from llmcli import config, console
from llmcli.errors import ExitStatus, LlmcliError, UsageError
from llmcli.io.decoding import printable
from llmcli.io.folders import find_files
from llmcli.io.formats import InputFormat
from llmcli.io.records import open_inputs, read_records
from llmcli.io.units import format_passage
from llmcli.job import JsonObject, Record, Result
from llmcli.models import registry
from llmcli.options import BatchModelOptions, InputOptions, OutputOptions, expand_options
from llmcli.run import run


@expand_options
def search(
    query: Annotated[str, Argument(metavar="QUERY", show_default=False)],
    files: Annotated[list[str], Argument(metavar="FILE", default_factory=list, show_default=False)],
    limit: Annotated[int, Option("--limit", "-n", metavar="N", min=1, help="Number of passages to print.")] = 5,
    recursive: Annotated[bool, Option("--recursive", "-r", help="Search the files in directories.")] = False,
    rerank: Annotated[str | None, Option(metavar="[MODEL]",
        help="Rank the best passages again with a cross-encoder.")] = None,
    *,
    glob: Annotated[list[str], Option(metavar="PATTERN", default_factory=list, show_default=False,
        help="With -r: files to search or, after !, to skip; repeatable.")],
    model: BatchModelOptions, output: OutputOptions,
) -> ExitStatus:  # fmt: skip
    """Search files by meaning.

    Prints the passages most similar to QUERY, the best first, as file:line: passage (score). Without FILE, searches the
    lines of stdin, or with -r the working directory. Embeddings are cached, so the next search of the same files is
    fast.

    \b
    llmcli search "how to undo a commit" docs/*.md
    llmcli search "how to undo a commit" -r . --glob "*.md" --glob "!old/"
    history | llmcli search "the command that fixed the network" -n 3
    """
    if not query.strip():
        raise UsageError("QUERY must not be empty")
    if config.world_size() > 1:
        raise UsageError("search cannot run in several processes")
    if output.resume or output.retry_errors or model.shard:
        raise UsageError("search does not support --resume, --retry-errors or --shard")
    if glob and not recursive:
        raise UsageError("--glob requires -r")
    if rerank is not None:
        try:
            rerank = rerank or registry.default_names("rerank")[0]
        except UsageError as exc:
            raise UsageError("--rerank requires a model", (exc.hint or "").replace("-m ", "--rerank=")) from exc
        source = registry.resolve(rerank).source
        rerank = str(source.path) if isinstance(source, registry.FolderSource) else rerank
    failures: list[str] = []
    if files or recursive:
        documents = list(_list_documents(files or [""], glob if recursive else None, failures))
        count = len(documents) + len(failures)
        if not count:
            raise UsageError("no file to search", "check --glob" if glob else "pass files, or directories with -r")
    else:
        lines = list(read_records(open_inputs([], []), InputFormat.LINES))
        failures = [f"{line.where}{line.failure.message}" for line in lines if line.failure]
        documents = [{"text": "\n".join(line.fields.get("text", "") for line in lines), "has_lines": True}]
        count = len(lines)
    if not count:
        console.warning("input is empty")
    job = model.job("search", {"limit": limit, "rerank": rerank})
    records = [Record({"query": query, "documents": documents, "failures": failures})] if count else []

    def expand_matches(result: Result) -> list[Result]:
        """Return one result per passage."""
        if result.failure:
            raise LlmcliError(result.failure.message)
        for message in result.output["failures"]:
            if output.on_error == "stop":
                raise LlmcliError(message)
            console.error(message)
        results = []
        for match in result.output["matches"]:
            file, line, text, score = match["file"], match["line"], match["text"], match["score"]
            passage = format_passage(file, line, text, score)
            results.append(Result(Record({"line": line, "text": text}, file), {"score": score}, passage))
        return results

    extra = count - len(records)
    spec = replace(output.spec(InputOptions()), fingerprint=None, finish=expand_matches, extra_records=extra)
    return run(job, records, spec)


def _list_documents(names: Sequence[str], globs: Sequence[str] | None, failures: list[str]) -> Iterator[JsonObject]:
    """Yield the documents to search, and add errors to `failures`. If `globs` is not None, search directories.

    Other directories, dangling links and files that cannot be read are skipped: a pattern such as `docs/*` brings them.
    """
    for name in names:
        if globs is not None and os.path.isdir(name or "."):
            for path in find_files(name, globs):
                yield {"file": printable(path), "path": os.path.abspath(path), "is_found": True}
        elif os.path.lexists(name) and (os.path.isdir(name) or not os.access(name, os.R_OK)):
            console.warning(f"skipped {name!r}: {'directory' if os.path.isdir(name) else 'cannot be read'}")
        else:
            (source,) = open_inputs([], [name])
            if source.size is not None and name != "-" and not name.startswith(("/dev/", "/proc/")):
                yield {"file": printable(name), "path": os.path.abspath(name)}
                continue
            for record in read_records([source], InputFormat.WHOLE):  # A pipe can be read only once, and here alone.
                if record.failure:
                    failures.append(f"{record.where}{record.failure.message}")
                else:
                    yield {**record.fields, "file": record.file}
