"""One call, from the job to the exit status: records through the engine, results to the output."""

from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from typing import Any

from llmcli import config, console, engines, tasks
from llmcli.errors import ExitStatus, UsageError
from llmcli.io.output import Output, OutputFormat, OutputSpec
from llmcli.io.progress import Progress, RunCounts, print_statistics
from llmcli.io.resume import Journal
from llmcli.job import Job, Record, Result


def run(job: Job, records: Iterable[Record], target: OutputSpec) -> ExitStatus:
    """Write every result as soon as its turn is done, and every failure to stderr.

    Returns FAILED for a single input that failed, or where nothing passed a filter; PARTIAL for some of many that
    failed; OK otherwise.
    """
    if config.rank():
        from llmcli.engines.distributed import serve

        return serve(engines.engine_for(job))
    names = _names(job, target.format)
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(target, job)) if target.resume else None
        counts = journal.counts() if journal else RunCounts()
        if target.stats:
            stack.enter_context(print_statistics(job.model, counts))
        counts.records += target.extra_records
        if journal and journal.is_complete:
            console.notice(f"'{target.path}' is already complete")
            list(_engine(job).run(job, ()))  # other processes wait to be told
            return _ended(counts, target)
        progress = Progress(counts)
        records = progress.track(records)
        if journal:
            records = journal.remaining(records)
        if target.retry:
            records = map(Record.drop_error, records)
        path = journal.output if journal else target.path
        output = Output(target.format, path=path, names=names, model=job.model, append=journal is not None)
        shows = console.is_watched() and not output.is_watched
        with output, console.live_status(progress.line) if shows else nullcontext():
            on_text, on_result = output.stream if output.streams else None, progress.done.add if shows else None
            for result in _engine(job).run(job, records, on_text, on_result):
                written = target.finish(result) if target.finish else [result]
                if journal:
                    journal.write(output, result, written)
                else:
                    for part in written:
                        output.write(part)
                counts.add(result, len(written))
                _say(result)
                if result.failure and target.stop_on_error:
                    return ExitStatus.FAILED
        if journal:
            journal.mark_complete()
        if counts.carried_over:
            console.notice(
                f"{counts.carried_over} of {counts.records} records already had an `error` and were passed on unchanged"
            )
        return _ended(counts, target)


def _engine(job: Job) -> Any:
    if config.world_size() == 1:
        return engines.engine_for(job)
    from llmcli.engines.distributed import DistributedEngine

    return DistributedEngine(engines.engine_for(job))


def _names(job: Job, format: OutputFormat) -> list[str]:
    """The fields that the task adds to a record."""
    several = (job.generation.get("num_return_sequences") or 1) > 1
    if several and format is OutputFormat.LINES:
        raise UsageError(
            "-n greater than 1 cannot be used with --lines", hint="--json writes all of them in generated_texts"
        )
    several = several or (job.parameters.get("top_k") or 1) > 1
    outputs = tasks.load_task(job.task).outputs
    extra = ["token_logprobs"] * bool(job.parameters.get("token_logprobs"))
    return [*dict.fromkeys([*outputs, *[f"{outputs[0]}s"] * several, *["truncated"] * job.truncate, *extra])]


def _say(result: Result) -> None:
    if cut := result.output.get("truncated"):
        console.warning(f"{result.record.where}truncated by {cut} tokens")
    if result.failure:
        console.error(f"{result.record.where}{result.failure.message}")


def _ended(counts: RunCounts, target: OutputSpec) -> ExitStatus:
    """The status of a whole run; of many records, how many failed is said."""
    status = ExitStatus.from_counts(counts.failed, counts.records)
    if status is ExitStatus.PARTIAL:
        console.error(f"{counts.failed} of {counts.records} records failed")
    if not status and target.is_filter and not counts.written:
        return ExitStatus.FAILED  # as grep
    return status
