"""The engine of this process: loads models, and runs them in batches."""

from llmcli import tasks
from llmcli.engines.engine import SteppingEngine
from llmcli.engines.model import Kept, Loaded, Model, long_lived_objects
from llmcli.engines.runner import BatchRunner, GeneratingRunner
from llmcli.job import Job
from llmcli.loader import quiet_libraries
from llmcli.tasks import Way


class LocalEngine(SteppingEngine):
    """Keeps the models that it loaded for the next call of `run`, or as `loaded` keeps them."""

    def __init__(self, loaded: Loaded | None = None) -> None:
        self._loaded = loaded or Kept()

    def check(self, job: Job) -> None:
        ways = tasks.find(job.task).ways
        generating = {kind: way.defaults for kind, way in ways.items() if way.defaults is not None}
        if generating:
            from llmcli import generation

            with long_lived_objects():
                quiet_libraries()
                kind, defaults = next(iter(generating.items()))
                generation.check(job.generation, defaults, counts_prompt=kind == "causal")

    def model(self, job: Job) -> Model:
        return Model(job, self._loaded)

    def runner(self, job: Job, way: Way, model: Model) -> BatchRunner:
        kind = BatchRunner if way.defaults is None else GeneratingRunner
        return kind(job, way, model.pipeline)

    def other(self) -> SteppingEngine:
        return self
