"""One call, from the job to the exit status: records through the engine, results to the output."""

from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

from llmcli import config, console, engines, tasks
from llmcli.errors import ExitStatus, UsageError
from llmcli.io.output import Output, OutputFormat, OutputSpec
from llmcli.io.progress import Progress, Tally, summary
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
        tally = journal.tally() if journal else Tally()
        if target.stats:
            stack.enter_context(summary(job.model, tally))
        if journal and journal.is_complete:
            console.notice(f"{target.path} is whole: nothing to do")
            list(_engine(job).run(job, ()))  # other processes wait to be told
            return _ended(tally, target)
        progress = Progress(tally)
        records = progress.reading(records)
        if journal:
            records = journal.remaining(records)
        if target.retry:
            records = map(Record.drop_error, records)
        output = Output(target.format, path=target.path, names=names, model=job.model, append=journal is not None)
        shows = console.is_watched() and not output.is_watched
        with output, console.showing(progress.line) if shows else nullcontext():
            write = partial(journal.write, output) if journal else output.write
            on_text, on_result = output.piece if output.streams else None, progress.done.add if shows else None
            for result in _engine(job).run(job, records, on_text, on_result):
                if target.finish:
                    result = target.finish(result)
                write(result)
                tally.add(result)
                _say(result)
                if result.failure and target.stop_on_error:
                    return ExitStatus.FAILED
        if journal:
            journal.mark_complete()
        if tally.carried_over:
            console.notice(
                f"{tally.carried_over} of {tally.records} records came with an `error` and were passed on as they are"
            )
        return _ended(tally, target)


def _engine(job: Job) -> Any:
    if config.world_size() == 1:
        return engines.engine_for(job)
    from llmcli.engines.distributed import DistributedEngine

    return DistributedEngine(engines.engine_for(job))


def _names(job: Job, format: OutputFormat) -> list[str]:
    """The fields that the task adds to a record."""
    several = (job.generation.get("num_return_sequences") or 1) > 1
    if several and format is OutputFormat.LINES:
        raise UsageError("-n above 1 does not go with --lines", hint="--json gives all of them: generated_texts")
    several = several or (job.parameters.get("top_k") or 1) > 1
    outputs = tasks.find(job.task).outputs
    extra = ["token_logprobs"] * bool(job.parameters.get("token_logprobs"))
    return [*dict.fromkeys([*outputs, *[f"{outputs[0]}s"] * several, *["truncated"] * job.truncate, *extra])]


def _say(result: Result) -> None:
    if cut := result.output.get("truncated"):
        console.notice(f"{result.record.where}cut by {cut} tokens")
    if result.failure:
        console.error(f"{result.record.where}{result.failure.message}")


def _ended(tally: Tally, target: OutputSpec) -> ExitStatus:
    """The status of a whole run; of many records, how many failed is said."""
    status = ExitStatus.of(tally.failed, tally.records)
    if status is ExitStatus.PARTIAL:
        console.error(f"{tally.failed} of {tally.records} records failed")
    if not status and target.filters and not tally.written:
        return ExitStatus.FAILED  # as grep
    return status
