"""One run by several processes, on one machine or on many: the first deals out the records, every one runs its share,
and the first takes the results together in input order."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from queue import SimpleQueue
from typing import Any

from llmcli.engines.engine import MAX_IN_FLIGHT, Engine
from llmcli.engines.job_run import OnResult
from llmcli.engines.read_ahead import ReadAhead
from llmcli.engines.requests import OnText
from llmcli.errors import ExitStatus, LlmcliError
from llmcli.job import Job, Record, Result

FOREVER = timedelta(days=365)  # how long one process may wait for another


class DistributedEngine:
    """The first process's; `engine` runs its own share."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(
        self, job: Job, records: Iterable[Record], on_text: OnText | None = None, on_result: OnResult | None = None
    ) -> Iterator[Result]:
        """Results in the order of the records. Raises what `engine` raises, here or in another process; LlmcliError
        where that has ended."""
        others = [_Other(rank, job) for rank in range(1, _state().num_processes)]
        own = self._engine.run(_placed(job), _own_share(records, others), on_result=on_result)
        with ReadAhead(own, MAX_IN_FLIGHT) as results:  # a thread, so that it goes on while others are waited for
            while result := next(iter(results.take(1, minimum=1)), None):
                yield result
                for other in others:
                    if result := other.next():
                        if on_result:
                            on_result(result)
                        yield result
            for other in others:
                other.end()
        _leave()


class _Other:
    """Another process, as the first one sees it."""

    def __init__(self, rank: int, job: Job) -> None:
        self._rank = rank
        self._given: SimpleQueue[Record | None] = SimpleQueue()
        self._to_send: SimpleQueue[Record | None] = SimpleQueue()
        _send(job, rank)
        threading.Thread(target=self._deal, daemon=True).start()
        self._answers = ReadAhead(_received(rank), MAX_IN_FLIGHT)

    def give(self, record: Record | None) -> None:
        """The next record of its share; None: there is none left."""
        self._given.put(record)
        self._to_send.put(record)

    def next(self) -> Result | None:
        """What became of the next record of its share, if there is one."""
        if (record := self._given.get()) is None:
            return None
        ((output, text, failure),) = self._answers.take(1, minimum=1)
        return Result(record, output, text, failure)

    def end(self) -> None:
        """Wait for its last word."""
        self._answers.take(1, minimum=1)

    def _deal(self) -> None:
        with suppress(ProcessEndedError):  # whoever waits for its answers will say so
            while record := self._to_send.get():
                _send(record, self._rank)
            _send(None, self._rank)


def serve(engine: Engine) -> ExitStatus:
    """What every process but the first does, whatever input its command line names."""
    try:
        job = next(_received(0))
        for result in engine.run(_placed(job), _received(0)):
            _send((result.output, result.text, result.failure), 0)
        _send(None, 0)
    except ProcessEndedError:
        return ExitStatus.OK  # it knows why
    except LlmcliError as exc:
        _send(_Problem(exc.message, exc.hint, exc.status), 0)
        return exc.status
    _leave()
    return ExitStatus.OK


def _own_share(records: Iterable[Record], others: list[_Other]) -> Iterator[Record]:
    """Each process gets a record in its turn; the first one's own are yielded."""
    for number, record in enumerate(records):
        if turn := number % (len(others) + 1):
            others[turn - 1].give(record)
        else:
            yield record
    for other in others:
        other.give(None)


@cache
def _state() -> Any:
    """This process among the others, whom it has joined."""
    from accelerate import PartialState

    return PartialState(cpu=True, timeout=FOREVER)  # the wire is the processors'; each has its own device, if any


def _placed(job: Job) -> Job:
    """On this process's device, where each has one of its own."""
    from llmcli.models.loading import choose_device

    device = choose_device(job.load_options.device)
    if job.load_options.device != "auto" or device == "cpu":
        return job
    import torch

    index = _state().local_process_index % torch.accelerator.device_count()
    return replace(job, load_options=replace(job.load_options, device=f"{device}:{index}"))


def _leave() -> None:
    import torch

    torch.distributed.destroy_process_group()


@dataclass(frozen=True, slots=True)
class _Problem:
    """An error, on the wire."""

    message: str
    hint: str | None
    status: ExitStatus


class ProcessEndedError(LlmcliError):
    """Another process has ended before its work was done."""


def _send(value: Any, rank: int) -> None:
    import torch

    _state()
    try:
        torch.distributed.send_object_list([value], dst=rank)
    except RuntimeError as exc:
        raise ProcessEndedError(f"process {rank} has ended") from exc


def _received(rank: int) -> Iterator[Any]:
    """What another process sends, to the None that ends it. Raises what it raised."""
    import torch

    _state()
    while True:
        box = [None]
        try:
            torch.distributed.recv_object_list(box, src=rank)
        except RuntimeError as exc:
            raise ProcessEndedError(
                f"process {rank} has ended", hint="the same command, with --resume, goes on"
            ) from exc
        if isinstance(found := box[0], _Problem):
            raise LlmcliError(f"process {rank}: {found.message}", found.hint, found.status)
        if found is None:
            return
        yield found
