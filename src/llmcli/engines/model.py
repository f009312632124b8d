"""The model of a job: its folder, what it can do, and its pipeline."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from llmcli import console, tasks
from llmcli.errors import ModelTooLargeError, ModelUnavailableError
from llmcli.job import Job
from llmcli.lazy import lazy
from llmcli.models import registry, store


class ModelCache(Protocol):
    """Pipelines that are kept, by a key of what they were loaded from and how."""

    def get(self, name: str, key: Any, load: Callable[[], Any]) -> Any:
        """The one under that key, loaded now if need be. `name` is what people call the model."""


class InMemoryModelCache:
    """Pipelines that stay to the end."""

    def __init__(self) -> None:
        self._pipelines: dict[Any, Any] = {}

    def get(self, name: str, key: Any, load: Callable[[], Any]) -> Any:
        if key not in self._pipelines:
            self._pipelines[key] = load()
        return self._pipelines[key]


class Model:
    """A job's model as its steps see it: the folder of its weights, and a pipeline, loaded when first asked for."""

    def __init__(self, job: Job, loaded: ModelCache) -> None:
        self._job, self._loaded = job, loaded

    @lazy
    def folder(self) -> Path:
        """Raises ModelUnavailable."""
        load_options = self._job.load_options
        spec = registry.resolve(self._job.model)
        return store.pull(spec, offline=load_options.offline, allow_pickle=load_options.allow_pickle)

    @property
    def fingerprint(self) -> str:
        """A key that changes when the weights or their precision change."""
        load_options = self._job.load_options
        return f"{self.folder} {self.changed} {load_options.dtype} {load_options.quantize}"

    @property
    def is_chat(self) -> bool:
        is_chat: bool = self.pipeline.is_chat
        return is_chat

    @property
    def context_length(self) -> int | None:
        length: int | None = self.pipeline.context_length
        return length

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer

    @property
    def config(self) -> Any:
        return self.pipeline.model.config

    def count_tokens(self, text: str) -> int:
        count: int = self.pipeline.count_tokens(text)
        return count

    def count_prompt_tokens(self, prompt: tasks.Prompt) -> int:
        count: int = self.pipeline.count_prompt_tokens(prompt)
        return count

    @lazy
    def changed(self) -> int:
        """When a file of it was last changed, in nanoseconds."""
        return max(file.stat().st_mtime_ns for file in self.folder.iterdir())

    @lazy
    def kind(self) -> str:
        """Which of the task's ways it goes. Raises ModelUnavailable where it can go none."""
        strategies = list(tasks.find(self._job.task).strategies)
        return strategies[0] if len(strategies) == 1 else self._able_kind

    @lazy
    def pipeline(self) -> Any:
        """Raises ModelUnavailable; UsageError for a device that is not here."""
        from llmcli import pipelines

        with long_lived_objects():
            head = pipelines.pipeline_class(self.kind).auto_class  # kinds that have the same share one model
        key = (self.folder, self.changed, head, replace(self._job.load_options, offline=False))
        return pipelines.wrap_as(self.kind, self._loaded.get(self._job.model, key, self._load))

    def _load(self) -> Any:
        from llmcli import pipelines

        folder, kind = self.folder, self._able_kind
        with long_lived_objects(), console.working(f"loading {self._job.model}"):
            try:
                return pipelines.load(kind, folder, self._job.load_options)
            except MemoryError as exc:
                raise ModelTooLargeError(
                    f"{self._job.model} does not fit in memory", hint="take a smaller model"
                ) from exc

    @lazy
    def _able_kind(self) -> str:
        with long_lived_objects():
            return _able_kind(self._job, self.folder)


def _able_kind(job: Job, folder: Path) -> str:
    """The first kind, of those that the task takes, that the model can be."""
    from llmcli import pipelines

    strategies = tasks.find(job.task).strategies
    reasons = pipelines.check_compatibility(folder, job.load_options, strategies)
    for kind, reason in reasons.items():
        if reason is None:
            return kind
    others = {name: tasks.find(name).strategies for name in tasks.names()}
    verdict = pipelines.check_compatibility(
        folder, job.load_options, {kind for strategies in others.values() for kind in strategies}
    )
    able = [name for name, strategies in others.items() if any(verdict[kind] is None for kind in strategies)]
    raise ModelUnavailableError(
        f"{job.model} cannot {_said(job.task)}: {' and '.join(map(str, reasons.values()))}",
        hint=f"it can {', '.join(map(_said, able))}" if able else "llmcli has no task for it",
    )


def _said(task: str) -> str:
    return task.replace("_", " ")  # as the command is called


@contextmanager
def long_lived_objects() -> Iterator[None]:
    """Spare the garbage collector a million objects that stay: imports and weights. It takes a quarter of a cold
    call to walk them again and again, while they are made and at exit."""
    known = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:  # in a process that goes on, what is frozen for nothing would never be freed
            gc.freeze()
        gc.enable()
