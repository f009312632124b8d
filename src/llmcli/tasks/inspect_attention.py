"""inspect attention: how much each token of a text attends to each."""

from collections.abc import Mapping
from typing import Any

from llmcli.job import Job
from llmcli.tasks import Strategy, Task, passthrough
from llmcli.tasks.fields import text_field


def prepare(job: Job, fields: Mapping[str, Any]) -> str:
    """The text."""
    return text_field(fields, "text")


def parameters(job: Job, pipeline: object) -> Mapping[str, Any]:
    """Those of the pipeline."""
    return {name: job.parameters[name] for name in ("layer", "head")}


OUTPUTS = ("tokens", "attention", "layers", "heads")
WAY = Strategy(passthrough, parameters=parameters)
TASK = Task(prepare, OUTPUTS, {}, {"causal_attention": WAY, "attention": WAY})
