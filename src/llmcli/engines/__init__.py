"""Engines turn a Job and Records into Results, in input order. One contract, the same results.

    run(job, records, on_text, on_done) -> Iterator[Result]
    load(job)                              has the model ready before there is a record

`on_text`, where given, gets the text of a record in pieces while it is generated, before its Result,
whenever the engine works on that record alone and no other waits for its turn. `on_done`, where given,
gets every Result as soon as it is there, which may be before its turn.
"""

from llmcli import config
from llmcli.engines.engine import Engine
from llmcli.job import Job


def of(job: Job) -> Engine:
    """The engine that runs a job."""
    if job.endpoint:
        from llmcli.engines.endpoint import EndpointEngine

        return EndpointEngine()
    if job.keep_alive != 0 and config.world_size() == 1:
        from llmcli.engines.worker.client import WorkerEngine

        return WorkerEngine()
    from llmcli.engines.local import LocalEngine

    return LocalEngine()
