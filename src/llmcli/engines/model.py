"""The model of a job: its weights on disk, the kind of pipeline that runs it, and the pipeline once it is loaded."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmcli import console, tasks
from llmcli.engines.model_cache import ModelLease
from llmcli.errors import ModelTooLargeError, ModelUnavailableError
from llmcli.job import Job
from llmcli.models import registry, store

if TYPE_CHECKING:
    from transformers import Pipeline, PreTrainedConfig, PreTrainedTokenizerBase


class Model:
    """A job's model. Its weights are found, and pulled if needed, at once; `pipeline` loads them when first used.

    Raises ModelUnavailableError if the weights cannot be had, or cannot do the job's task.
    """

    def __init__(self, job: Job, lease: ModelLease) -> None:
        self._job, self._lease = job, lease
        self._pipeline: Pipeline | None = None
        options = job.load_options
        spec = registry.resolve(job.model)
        self.folder: Path = store.pull(spec, offline=options.offline, allow_pickle=options.allow_pickle)
        strategies = list(tasks.find(job.task).strategies)
        # A task with one strategy is checked when the model is loaded: it may need no more than the folder.
        self.kind = strategies[0] if len(strategies) == 1 else self._find_kind()

    @property
    def pipeline(self) -> "Pipeline":
        """The pipeline, loaded at the first access, which raises ModelUnavailableError or UsageError (the device)."""
        if self._pipeline is None:
            from llmcli import pipelines

            with suspended_garbage_collection():
                head = pipelines.pipeline_class(self.kind).auto_class
            # Kinds with the same head share one loaded model.
            key = (self.folder, self._changed_ns, head, replace(self._job.load_options, offline=False))
            self._pipeline = pipelines.wrap_as(self.kind, self._lease.get(self._job.model, key, self._load))
        return self._pipeline

    @property
    def fingerprint(self) -> str:
        """A key that changes when the weights or their precision change."""
        options = self._job.load_options
        return f"{self.folder} {self._changed_ns} {options.dtype} {options.quantize}"

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
        return max(file.stat().st_mtime_ns for file in self.folder.iterdir())

    def _load(self) -> "Pipeline":
        from llmcli import pipelines

        kind = self._find_kind()
        with suspended_garbage_collection(), console.working(f"loading {self._job.model}"):
            try:
                return pipelines.load(kind, self.folder, self._job.load_options)
            except MemoryError as exc:
                raise ModelTooLargeError(
                    f"{self._job.model} does not fit in memory", hint="use a smaller model"
                ) from exc

    def _find_kind(self) -> str:
        """Return the first kind of pipeline, in the order of the task's strategies, that the model can be."""
        from llmcli import pipelines

        options = self._job.load_options
        strategies = tasks.find(self._job.task).strategies
        with suspended_garbage_collection():
            reasons = pipelines.check_compatibility(self.folder, options, strategies)
            if kind := next((kind for kind, reason in reasons.items() if reason is None), None):
                return kind
            kinds_by_task = {name: set(tasks.find(name).strategies) for name in tasks.names()}
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
