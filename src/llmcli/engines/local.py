"""The engine of this process: loads models, and runs them in batches."""

from llmcli import tasks
from llmcli.engines.engine import TaskEngine
from llmcli.engines.model import InMemoryModelCache, Model, ModelCache, long_lived_objects
from llmcli.engines.runner import BatchRunner, GeneratingRunner
from llmcli.job import Job
from llmcli.models.loading import quiet_libraries
from llmcli.tasks import Strategy


class LocalEngine(TaskEngine):
    """Keeps the models that it loaded for the next call of `run`, or as `loaded` keeps them."""

    def __init__(self, loaded: ModelCache | None = None) -> None:
        self._loaded = loaded or InMemoryModelCache()

    def check(self, job: Job) -> None:
        strategies = tasks.find(job.task).strategies
        generating = {kind: strategy.defaults for kind, strategy in strategies.items() if strategy.defaults is not None}
        if generating:
            from llmcli.models import generation

            with long_lived_objects():
                quiet_libraries()
                kind, defaults = next(iter(generating.items()))
                generation.check(job.generation, defaults, counts_prompt=kind == "causal")

    def model(self, job: Job) -> Model:
        return Model(job, self._loaded)

    def runner(self, job: Job, strategy: Strategy, model: Model) -> BatchRunner:
        kind = BatchRunner if strategy.defaults is None else GeneratingRunner
        return kind(job, strategy, model)

    def other(self) -> TaskEngine:
        return self
