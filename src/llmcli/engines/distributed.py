"""One run by several processes: rank 0 deals out the records, and collects every rank's results in input order."""

import os
import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import cache
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from llmcli import config, console
from llmcli.engines.engine import MIN_WINDOW, Engine, OnResult
from llmcli.engines.read_ahead import ReadAhead
from llmcli.engines.requests import OnText
from llmcli.errors import ExitStatus, LlmcliError, UsageError
from llmcli.job import Job, Record, Result

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

JOIN_TIMEOUT_S = 300.0  # for all ranks to start
LOAD_TIMEOUT = timedelta(hours=1)  # for all ranks to load their parts of a model
REPORT_TIMEOUT_S = 10.0  # for rank 0 to exit with an error that this rank has too
MESSAGE_TIMEOUT = timedelta(days=365)  # a rank may wait this long for input, or for a slow batch of another one

EXIT_TAG = 1  # of a message that no rank sends


class RankExitedError(LlmcliError):
    """Another process exited before its work was done."""


class DistributedEngine:
    """The engine of rank 0. `engine` runs the records of this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(
        self, job: Job, records: Iterable[Record], on_text: OnText | None = None, on_result: OnResult | None = None
    ) -> Iterator[Result]:
        _join(job)
        if job.load_options.tensor_parallel:
            yield from self._run_in_lockstep(job, records, on_text, on_result)
            return
        remotes = [_RemoteRank(rank, job) for rank in range(1, _group().size())]
        own = self._engine.run(_job_of_rank(job), _deal(records, remotes), on_result=on_result)
        with ReadAhead(own, MIN_WINDOW) as results:  # goes on computing while other ranks are waited for
            while taken := results.take(1, minimum=1):
                yield from taken
                for remote in remotes:
                    for result in remote.results.take(1, minimum=1):
                        if on_result:
                            on_result(result)
                        yield result
            for remote in remotes:
                remote.results.take(1, minimum=1)  # the end: the rank is done
        _leave()

    def _run_in_lockstep(
        self, job: Job, records: Iterable[Record], on_text: OnText | None, on_result: OnResult | None
    ) -> Iterator[Result]:
        """Let all ranks run the same batches at the same time, each with its part of the model."""
        if "max_time" in job.generation:
            raise UsageError("--tensor-parallel cannot be used with max_time: the processes would stop at other tokens")
        if job.seed is None:
            job = replace(job, seed=random.randrange(2**32))
        ranks = range(1, _group().size())

        def send(item: object) -> None:
            for rank in ranks:
                _send(item, rank)

        def send_records() -> Iterator[Record]:
            for record in records:
                send(record)
                yield record
            send(None)

        send((job, on_text is not None))
        for result in self._engine.run(_job_of_rank(job), send_records(), on_text, on_result):
            if result.failure and result.failure.type in ("internal_error", "out_of_memory"):
                # It may be that of another rank, and from then on the ranks would run different batches.
                raise LlmcliError(f"a batch failed: {result.failure.message}", "continue with --resume")
            yield result
        _leave()


class _RemoteRank:
    """Another process, as rank 0 sees it."""

    def __init__(self, rank: int, job: Job) -> None:
        self._rank = rank
        self.to_send: SimpleQueue[Record | None] = SimpleQueue()  # None: there is no more
        self._sent: SimpleQueue[Record] = SimpleQueue()
        _send(job, rank)
        threading.Thread(target=self._send_records, daemon=True).start()
        self.results = ReadAhead(self._receive_results(), MIN_WINDOW)

    def _receive_results(self) -> Iterator[Result]:
        for outcome in _receive(self._rank):
            yield Result(self._sent.get(), *outcome)

    def _send_records(self) -> None:
        with suppress(RankExitedError):  # _receive_results raises it too
            while record := self.to_send.get():
                self._sent.put(record)
                _send(record, self._rank)
            _send(None, self._rank)


def serve(engine: Engine, job: Job) -> ExitStatus:
    """Run the records that rank 0 sends to this process, whatever input its command line names."""
    _join(job)
    if job.load_options.tensor_parallel:
        return _follow(engine)
    try:
        job = next(_receive(0))
        for result in engine.run(_job_of_rank(job), _receive(0)):
            _send((result.output, result.text, result.failure), 0)
        _send(None, 0)
    except RankExitedError:
        return ExitStatus.OK  # rank 0 has reported why
    except LlmcliError as exc:
        with suppress(RankExitedError):
            _send(LlmcliError(exc.message, exc.hint, exc.status), 0)
        _wait_for_exit(0)
        return exc.status
    _leave()
    return ExitStatus.OK


def _follow(engine: Engine) -> ExitStatus:
    """Run what rank 0 runs, up to its exit."""

    def exit_with_rank_0() -> None:
        _wait_for_exit(0)
        os._exit(ExitStatus.OK)  # This rank may be waiting for an answer of rank 0, within a batch.

    watcher = threading.Thread(target=exit_with_rank_0, daemon=True)
    watcher.start()
    try:
        job, is_streamed = next(_receive(0))
        for _ in engine.run(_job_of_rank(job), _receive(0), (lambda text: None) if is_streamed else None):
            pass
    except LlmcliError:
        watcher.join(REPORT_TIMEOUT_S)
        raise
    watcher.join()
    return ExitStatus.OK


def _deal(records: Iterable[Record], remotes: list[_RemoteRank]) -> Iterator[Record]:
    """Give each rank a record in turn, and at last None; yield those of this process."""
    for number, record in enumerate(records):
        if rank := number % (len(remotes) + 1):
            remotes[rank - 1].to_send.put(record)
        else:
            yield record
    for remote in remotes:
        remote.to_send.put(None)


def _join(job: Job) -> None:
    """Join the other processes. Messages go over the CPU (gloo), tensors of parts of a model from GPU to GPU (NCCL)."""
    import torch

    has_nccl = job.load_options.tensor_parallel and torch.cuda.is_available()
    timeout = LOAD_TIMEOUT if has_nccl else timedelta(seconds=JOIN_TIMEOUT_S)
    try:
        with console.working("waiting for the other processes"):
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=timeout)
            _group()
    except (RuntimeError, ValueError) as exc:
        why, *_ = str(exc).split("\n")
        hint = "start all with torchrun; to run one process, unset RANK and WORLD_SIZE"
        raise LlmcliError(f"cannot join the other processes: {why}", hint) from exc


@cache
def _group() -> "ProcessGroup":
    """Return the group for messages, whose processes may wait long for each other."""
    import torch

    return torch.distributed.new_group(timeout=MESSAGE_TIMEOUT, backend="gloo")


def _job_of_rank(job: Job) -> Job:
    """Return the job with this rank's own device, and its own seed unless all ranks run the same records."""
    import torch

    from llmcli.models.loading import choose_device

    if job.seed is not None and not job.load_options.tensor_parallel:
        # With one seed for all, equal records would get equal samples in every rank.
        job = replace(job, seed=(job.seed + _group().rank()) % 2**32)
    device = choose_device(job.load_options.device)
    if device == "cpu":
        if job.load_options.tensor_parallel and torch.accelerator.is_available():
            raise UsageError("--tensor-parallel requires the GPUs of this machine, not --device cpu")
        return job
    kind, _, index = device.partition(":")
    number = int(index or os.environ.get("LOCAL_RANK") or config.rank()) % torch.accelerator.device_count()
    torch.accelerator.set_device_index(number)  # Without it, libraries would also take memory of the first device.
    return replace(job, load_options=replace(job.load_options, device=f"{kind}:{number}"))


def _leave() -> None:
    import torch

    torch.distributed.destroy_process_group()


def _wait_for_exit(rank: int) -> None:
    """Return once another process has exited: torchrun ends all processes as soon as one of them has failed."""
    import torch

    with suppress(RuntimeError):  # the connection is closed
        torch.distributed.recv(torch.empty(1), src=rank, group=_group(), tag=EXIT_TAG)


def _send(item: object, rank: int) -> None:
    import torch

    try:
        torch.distributed.send_object_list([item], dst=rank, group=_group())
    except RuntimeError as exc:
        raise RankExitedError(f"process {rank} has exited") from exc


def _receive(rank: int) -> Iterator[Any]:
    """Yield what another rank sends, up to None. Raises what the rank raised."""
    import torch

    while True:
        items: list[object] = [None]
        try:
            torch.distributed.recv_object_list(items, src=rank, group=_group())
        except RuntimeError as exc:
            raise RankExitedError(f"process {rank} has exited") from exc
        (item,) = items
        if isinstance(item, LlmcliError):
            raise LlmcliError(f"process {rank}: {item.message}", item.hint, item.status)
        if item is None:
            return
        yield item
