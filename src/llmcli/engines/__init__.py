"""Engines turn a job and records into results, in input order: here, in the worker, or at a server."""

from llmcli import config, console
from llmcli.engines.engine import Engine
from llmcli.job import Job


def engine_for(job: Job) -> Engine:
    if job.endpoint:
        from llmcli.engines.endpoint import EndpointEngine

        return EndpointEngine()
    if job.keep_alive != 0 and config.world_size() == 1:
        from llmcli.engines.worker import protocol

        if job.keep_alive or protocol.has_socket():
            from llmcli.engines.worker.client import WorkerEngine

            return WorkerEngine()
        if console.verbose:
            console.notice("no worker is running; this process runs the model")
    from llmcli.engines.local import LocalEngine

    return LocalEngine()
