"""score: how likely a model finds a text."""

from collections.abc import Mapping
from typing import Any

from llmcli.job import Job
from llmcli.tasks import Strategy, Task, passthrough
from llmcli.tasks.fields import text_field


def prepare(job: Job, fields: Mapping[str, Any]) -> dict[str, str] | None:
    """The text, and the condition that stands before it; None where the text is empty."""
    condition = job.parameters.get("condition")
    asked = {
        "text": text_field(fields, job.parameters["fields"]["text"]),
        "condition": text_field(fields, condition) if condition is not None else "",
    }
    return asked if asked["text"] else None


def parameters(job: Job, pipeline: object) -> Mapping[str, Any]:
    """Those of the pipeline."""
    return {name: job.parameters.get(name) for name in ("stride", "token_logprobs")}


OUTPUTS = ("logprob", "perplexity", "bits_per_byte", "tokens")
EMPTY = {"logprob": 0.0, "perplexity": None, "bits_per_byte": None, "tokens": 0}
TASK = Task(prepare, OUTPUTS, EMPTY, {"scoring": Strategy(passthrough, parameters=parameters)})
