"""One call, from the job to the exit status: records through the engine, results to the output."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from llmcli import console, tasks
from llmcli.engines.local import LocalEngine
from llmcli.errors import ExitStatus, UsageError
from llmcli.job import Job, Record
from llmcli.output import Format, Output
from llmcli.resume import Journal


def run(
    job: Job,
    records: Iterable[Record],
    *,
    format: Format = Format.TEXT,
    path: Path | None = None,
    stop_on_error: bool = False,
    resume: str | None = None,
    retry: bool = False,
) -> ExitStatus:
    """Write every result as soon as its turn is done, and every failure to stderr. `resume`, a fingerprint of the
    input, goes on where the file at `path` ends. `retry` runs again what failed before: records that come with an
    error and, with `resume`, those that have one in the file.

    Returns FAILED for a single input that failed, PARTIAL for some of many, OK otherwise.
    """
    several = (job.generation.get("num_return_sequences") or 1) > 1
    if several and format is Format.LINES:
        raise UsageError("-n above 1 does not go with --lines", hint="--json gives all of them: generated_texts")
    outputs = tasks.find(job.task).outputs
    several = several or (job.parameters.get("top_k") or 1) > 1
    names = dict.fromkeys([*outputs, *[f"{outputs[0]}s"] * several, *["truncated"] * job.truncate])
    total = failed = passed = 0
    stopped = False
    with Journal(path, job, resume, format.value, retry=retry) if path and resume else nullcontext() as journal:
        if journal and journal.is_whole:
            console.notice(f"{path} is whole: nothing to do")
            return _ended(journal.failed, journal.done)
        if journal:
            records = journal.remaining(records)
        if retry:
            records = map(Record.without_error, records)
        with Output(format, path=path, names=list(names), model=job.model, append=journal is not None) as output:
            for result in LocalEngine().run(job, records, output.piece if output.streams else None):
                total += 1
                if journal:
                    journal.write(output, result)
                else:
                    output.write(result)
                passed += result.record.has_failed_before
                if cut := result.output.get("truncated"):
                    console.notice(f"{result.record.where}cut by {cut} tokens")
                if result.failure:
                    failed += 1
                    console.error(f"{result.record.where}{result.failure.message}")
                    if stop_on_error:
                        stopped = True
                        break
        if journal:
            journal.finish(is_whole=not stopped)
            total, failed = journal.done, journal.failed
    if stopped:
        return ExitStatus.FAILED
    if passed:
        console.notice(f"{passed} of {total} records came with an `error` and were passed on as they are")
    return _ended(failed, total)


def _ended(failed: int, total: int) -> ExitStatus:
    """The status of a whole run; of many records, how many failed is said."""
    status = ExitStatus.of(failed, total)
    if status is ExitStatus.PARTIAL:
        console.error(f"{failed} of {total} records failed")
    return status
