"""One call, from the job to the exit status: records through the engine, results to the output."""

from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

from llmcli import config, console, engines, tasks
from llmcli.errors import ExitStatus, UsageError
from llmcli.io.openai_batch import read_requests
from llmcli.io.output import HAVE_FIELDS, Output, OutputFormat, OutputSpec
from llmcli.io.parquet import TableWriter, file_for_stdout
from llmcli.io.progress import Progress, RunCounts, print_statistics
from llmcli.io.resume import RESUME_HINT, Journal
from llmcli.job import Job, Record
from llmcli.tasks.fields import reads_error


def run(job: Job, records: Iterable[Record], spec: OutputSpec) -> ExitStatus:
    """Write every result as soon as it has its turn, and every failure to stderr."""
    if config.rank():
        from llmcli.engines.distributed import serve

        return serve(engines.engine_for(job), job)
    if job.shard and spec.path and spec.format is OutputFormat.TEXT:
        hint = "add --json, --jsonl, --csv, --parquet, --lines or --null"
        raise UsageError("--shard with --output requires a structured format", hint)
    if spec.table and not spec.path:
        with file_for_stdout(spec) as file_spec:
            return run(job, records, file_spec)
    if spec.format is OutputFormat.OPENAI_BATCH:
        job, records = read_requests(job, records)
    elif job.logprobs is not None and spec.format not in HAVE_FIELDS:
        console.warning("--logprobs has no effect in text output: use --json")
    if not spec.has_records:
        job = replace(job, load_options=replace(job.load_options, one_stream=True))
    names = spec.name_fields(_output_names(job, spec.format))
    names.setdefault("reasoning", None)
    table = TableWriter(spec.table, names, job.shard or (0, 1)) if spec.table else None  # checks the input
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(spec, job)) if spec.fingerprint is not None else None
        counts = journal.counts() if journal else RunCounts()
        if spec.stats:
            stack.enter_context(print_statistics(job.model, counts))
        counts.records += spec.extra_records
        if journal and journal.is_complete:
            console.notice(f"'{spec.path}' is already complete")
            list(_engine_for(job).run(job, ()))  # Other processes wait for the end.
            return _report_end(counts, spec)
        progress = Progress(counts)
        index, count = job.shard or (0, 1)
        records = progress.track(islice(records, index, None, count))
        if index and job.seed is not None and not job.endpoint:
            job = replace(job, seed=(job.seed + index) % 2**32)  # so that equal records get different samples
        if journal:
            records = journal.remaining(records)
        if spec.retry and not reads_error(job.parameters):
            records = map(Record.drop_error, records)
        path = journal.output if journal else spec.path
        append, is_styled, dialect = journal is not None, spec.is_styled, spec.dialect
        output = Output(
            spec.format, job.model, path=path, names=names, append=append, is_styled=is_styled, dialect=dialect
        )
        shows = console.is_watched() and not output.is_watched
        with output, console.live_status(progress.line) if shows else nullcontext():
            on_text, on_result = output.stream if output.streams else None, progress.done.add if shows else None
            for result in _engine_for(job).run(job, records, on_text, on_result):
                written = spec.finish(result) if spec.finish else [result]
                if journal:
                    journal.write(output, result, written)
                else:
                    for part in written:
                        output.write(part)
                counts.add(result, len(written))
                if count := result.output.get("truncated"):
                    console.warning(f"{result.record.where}truncated by {count} tokens")
                if result.failure:
                    console.error(f"{result.record.where}{result.failure.message}")
                if result.failure and spec.stop_on_error:
                    if spec.fingerprint and not spec.retry:
                        console.print_line(f"hint: {RESUME_HINT}")
                    return ExitStatus.FAILED
        if journal:
            journal.mark_complete(table.write if table else None)
        if counts.carried_over:
            share = f"{counts.carried_over} of {counts.records} records"
            console.notice(f"{share} already had an `error` and were passed on unchanged")
        return _report_end(counts, spec)


def _engine_for(job: Job) -> Any:
    if config.world_size() == 1:
        return engines.engine_for(job)
    from llmcli.engines.distributed import DistributedEngine

    return DistributedEngine(engines.engine_for(job))


def _output_names(job: Job, format: OutputFormat) -> list[str]:
    """Return the fields that the task adds to a record."""
    is_plural = (job.generation.get("num_return_sequences") or 1) > 1
    if is_plural and format is OutputFormat.LINES:
        hint = "--json writes all of them in generated_texts"
        raise UsageError("-n greater than 1 cannot be used with --lines", hint)
    is_plural = is_plural or (job.parameters.get("top_k") or 1) > 1
    outputs = tasks.load_task(job.task).outputs
    extra = ["token_logprobs"] * bool(job.parameters.get("token_logprobs"))
    extra += ["labels"] * bool(job.parameters.get("multi_label"))
    has_schema = "schema" in (job.constraint or {}) or job.schema_field or job.settings_field
    extra += ["data"] * bool(has_schema) + ["logprobs", "mean_logprob"] * (job.logprobs is not None)
    # All rows of a table would have a column that few models fill.
    extra += ["reasoning"] * ("finish_reason" in outputs and (format is OutputFormat.JSON or bool(job.think)))
    return [*dict.fromkeys([*outputs, *[f"{outputs[0]}s"] * is_plural, *["truncated"] * job.truncate, *extra])]


def _report_end(counts: RunCounts, spec: OutputSpec) -> ExitStatus:
    status = ExitStatus.from_counts(counts.failed, counts.records)
    if status is ExitStatus.PARTIAL:
        console.error(f"{counts.failed} of {counts.records} records failed")
    has_no_match = spec.is_filter and not counts.written
    return ExitStatus.FAILED if has_no_match and not status else status  # like grep
