"""The engine of this process: finds and loads models, and runs them in batches."""

from functools import partial

from llmcli import tasks
from llmcli.engines.batch_runner import BatchRunner
from llmcli.engines.batching import RowPolicy, TokenPolicy
from llmcli.engines.engine import TaskEngine
from llmcli.engines.memory import MemoryEstimator, probe_memory
from llmcli.engines.model import Model, suspended_garbage_collection
from llmcli.engines.model_cache import ModelCache, ModelLease
from llmcli.job import Job
from llmcli.models.loading import quiet_libraries
from llmcli.tasks import Strategy


class LocalEngine(TaskEngine):
    """Runs jobs in this process. Models that it has loaded stay in its lease for later jobs."""

    def __init__(self, lease: ModelLease | None = None) -> None:
        self._lease = lease or ModelLease(ModelCache())

    def check(self, job: Job) -> None:
        strategies = tasks.find(job.task).strategies
        generating = [(kind, item.defaults) for kind, item in strategies.items() if item.defaults is not None]
        if generating:
            from llmcli.models import generation

            kind, defaults = generating[0]
            with suspended_garbage_collection():
                quiet_libraries()
                generation.check(job.generation, defaults, counts_prompt=kind == "causal")

    def find_model(self, job: Job) -> Model:
        return Model(job, self._lease)

    def make_runner(self, job: Job, strategy: Strategy, model: Model) -> BatchRunner:
        pipeline = model.pipeline
        device = pipeline.device.type
        memory = MemoryEstimator(partial(probe_memory, pipeline.model))
        parameters = strategy.parameters(job, model)
        if strategy.defaults is None:
            # A batch that is only read is measured in tokens, unless the user says how many rows it has.
            policy = RowPolicy if job.batch_size else TokenPolicy
            return BatchRunner(pipeline, policy(job.batch_size, device, memory), parameters, truncate=job.truncate)
        from transformers import set_seed

        from llmcli.models import generation

        is_seq2seq = pipeline.model.config.is_encoder_decoder
        generation.check_known(parameters, f"{job.model}: task_specific_params" if is_seq2seq else "prompts.toml")
        own = pipeline.model.generation_config
        config = generation.merge(own, job.generation, strategy.defaults, parameters, counts_prompt=not is_seq2seq)
        if config.pad_token_id is None:
            config.pad_token_id = pipeline.tokenizer.pad_token_id
        if job.seed is not None:
            set_seed(job.seed)
        # A seed repeats a run only if the batches do not depend on speed and free memory.
        is_fixed = job.seed is not None and bool(config.do_sample)
        answer_tokens = config.max_new_tokens or config.max_length or 0
        batches = RowPolicy(job.batch_size, device, memory, answer_tokens, is_fixed)
        return BatchRunner(pipeline, batches, {"generation_config": config}, truncate=job.truncate)
