"""The engine of this process: finds and loads models, and runs them in batches."""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmcli import console, pipelines, tasks
from llmcli.engines.batch_runner import BatchRunner
from llmcli.engines.batching import BatchPolicy, TokenBatchPolicy
from llmcli.engines.engine import TaskEngine
from llmcli.engines.memory import MemoryEstimator, make_estimate, probe_memory
from llmcli.engines.model_cache import ModelCache, ModelLease
from llmcli.errors import ModelTooLargeError, ModelUnavailableError, UsageError
from llmcli.job import Job, LoadOptions
from llmcli.models import adapters, generation, loading
from llmcli.models.devices import is_out_of_memory
from llmcli.tasks import Strategy

if TYPE_CHECKING:
    from transformers import GenerationConfig, Pipeline, PreTrainedConfig, PreTrainedTokenizerBase


class LocalEngine(TaskEngine):
    """Runs jobs in this process. Models that it has loaded stay in its lease for later jobs."""

    def __init__(self, lease: ModelLease | None = None) -> None:
        self._lease = lease or ModelLease(ModelCache())

    def find_model(self, job: Job) -> "Model":
        strategies = tasks.load_task(job.task).strategies
        generating = [(kind, item.defaults) for kind, item in strategies.items() if item.defaults is not None]
        if generating:
            kind, defaults = generating[0]
            with suspended_garbage_collection():
                loading.quiet_libraries()
                generation.check(job.generation, defaults, counts_prompt=kind == "causal")
        return Model(job, self._lease)

    def make_runner(self, job: Job, strategy: Strategy, model: "Model") -> BatchRunner:
        pipeline = model.pipeline
        device = pipeline.device.type
        memory = partial(MemoryEstimator, partial(probe_memory, pipeline.model))
        parameters, defaults = strategy.parameters(job, model), strategy.defaults
        if job.think is not None or job.template_options:
            if not getattr(pipeline, "is_chat", False):
                message = f"--think and --template-option require a chat template, but {job.model} has none"
                raise UsageError(message, hint="use a chat model: -m NAME")
            pipeline.chat_template.check(job.think, job.template_options)
        is_fixed = job.load_options.tensor_parallel  # All processes run the same batches.
        if defaults is None:
            # A batch that is only read is measured in tokens, unless the user says how many rows it has.
            kind = BatchPolicy if job.batch_size else TokenBatchPolicy
            policy = kind(job.batch_size, device, memory(make_estimate(pipeline.model)), is_fixed=is_fixed)
            return BatchRunner(pipeline, policy, parameters, truncate=job.truncate)
        from transformers import set_seed

        is_seq2seq = pipeline.model.config.is_encoder_decoder
        generation.check_known(parameters, f"{job.model}: task_specific_params" if is_seq2seq else "prompts.toml")

        @lru_cache(maxsize=1024)
        def merge(options: str, is_constrained: bool) -> "GenerationConfig":
            own, given = pipeline.model.generation_config, generation.override(job.generation, json.loads(options))
            with loading.translated_errors(model.folder):
                config = generation.merge(own, given, defaults, parameters, counts_prompt=not is_seq2seq)
                if is_constrained:
                    config.stop_strings = None  # that of a prompt may be a part of the answer
                if config.pad_token_id is None:
                    config.pad_token_id = pipeline.tokenizer.pad_token_id
                config.eos_token_id = pipeline.find_end_tokens(config)
            return config

        config = merge("{}", False)
        if job.seed is not None:
            set_seed(job.seed)
        # A seed repeats a run only if the batches do not depend on speed and free memory.
        is_fixed |= job.seed is not None and bool(config.do_sample or job.settings_field)
        answer_tokens = config.max_new_tokens or config.max_length or 0
        estimate = make_estimate(pipeline.model, (config.num_beams or 1) * (config.num_return_sequences or 1))
        starts_full = is_seq2seq and (config.num_beams or 1) == 1  # With beams, a source is several rows.
        batches = BatchPolicy(job.batch_size, device, memory(estimate), answer_tokens, is_fixed, starts_full)
        options = {"generation_config": config}
        if not is_seq2seq:
            options |= {"can_think": strategy.can_think, "think": job.think, "options": job.template_options}
        return BatchRunner(pipeline, batches, options, truncate=job.truncate, merge=merge, logprobs=job.logprobs)


class Model:
    """A job's model. Its weights are found, and pulled if needed, at once; `pipeline` loads them when first used."""

    def __init__(self, job: Job, lease: ModelLease) -> None:
        self._pipeline: Pipeline | None = None
        self.folder, options = adapters.find_weights(job.model, job.adapter, job.load_options)
        self._job, self._lease = replace(job, load_options=options), lease
        strategies = list(tasks.load_task(job.task).strategies)
        # A task with one strategy is checked when the model is loaded: it may need no more than the folder.
        self.kind = strategies[0] if len(strategies) == 1 else self._find_kind()

    @property
    def pipeline(self) -> "Pipeline":
        """The pipeline, loaded at the first access, which raises ModelUnavailableError or UsageError (the device)."""
        if self._pipeline is None:
            with suspended_garbage_collection():
                head = pipelines.pipeline_class(self.kind).auto_class
            # Kinds with the same head share one loaded model, and so do jobs for which nothing depends on `one_stream`.
            key = (self.folder, self._changed_ns, head, replace(self._load_options, offline=False))
            with loading.translated_errors(self.folder):
                self._pipeline = pipelines.wrap_as(self.kind, self._lease.get(self._job.model, key, self._load))
        return self._pipeline

    @property
    def _load_options(self) -> LoadOptions:
        options = self._job.load_options
        if not options.one_stream or self.kind != "causal":
            return replace(options, one_stream=False)
        device = loading.choose_device(options.device)
        types = {loading.choose_dtype(options.dtype, device, one_stream) for one_stream in (False, True)}
        return replace(options, one_stream=len(types) > 1)

    @property
    def fingerprint(self) -> str:
        options = self._job.load_options
        weights = f"{self.folder} {options.adapter}" if options.adapter else self.folder
        return f"{weights} {self._changed_ns} {options.dtype} {options.quantize}"

    @property
    def is_chat(self) -> bool:
        return bool(self.pipeline.is_chat)

    @property
    def context_length(self) -> int | None:
        length: int | None = self.pipeline.context_length
        return length

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.pipeline.tokenizer

    @property
    def config(self) -> "PreTrainedConfig":
        return self.pipeline.model.config

    def count_tokens(self, text: str) -> int:
        return int(self.pipeline.count_tokens(text))

    def count_prompt_tokens(self, prompt: tasks.Prompt) -> int:
        return int(self.pipeline.count_prompt_tokens(prompt))

    @property
    def _changed_ns(self) -> int:
        folders = [self.folder, Path(self._job.load_options.adapter or self.folder)]
        return max(file.stat().st_mtime_ns for folder in folders for file in folder.iterdir() if file.exists())

    def _load(self) -> "Pipeline":
        kind = self._find_kind()
        with suspended_garbage_collection(), console.working(f"loading {self._job.model}"):
            try:
                return pipelines.load(kind, self.folder, self._load_options)
            except Exception as exc:
                if not is_out_of_memory(exc):
                    raise
                raise ModelTooLargeError(f"{self._job.model} does not fit in memory", "use a smaller model") from exc

    def _find_kind(self) -> str:
        """Return the first kind of pipeline, in the order of the task's strategies, that the model can be."""
        options, strategies = self._job.load_options, tasks.load_task(self._job.task).strategies
        with suspended_garbage_collection():
            reasons = pipelines.check_compatibility(self.folder, options, strategies)
            if kind := next((kind for kind, reason in reasons.items() if reason is None), None):
                return kind
            names = [name for name in tasks.task_names() if name != "serve_requests"]  # which has no command
            kinds_by_task = {name: set(tasks.load_task(name).strategies) for name in names}
            others = pipelines.check_compatibility(self.folder, options, set().union(*kinds_by_task.values()))
        able = [name for name, kinds in kinds_by_task.items() if any(others[kind] is None for kind in kinds)]
        raise ModelUnavailableError(
            f"{self._job.model} cannot {self._job.task.replace('_', ' ')}: {' and '.join(map(str, reasons.values()))}",
            hint=f"it can {', '.join(able).replace('_', ' ')}" if able else "llmcli has no task for it",
        )


@contextmanager
def suspended_garbage_collection() -> Iterator[None]:
    """Spare the objects of imports and weights, which stay for good, from scans: a quarter of a cold call's time."""
    module_count = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > module_count:  # what is frozen without need would never be freed
            gc.freeze()
        gc.enable()
