"""generate: continue a text."""

from collections.abc import Mapping
from typing import Any

from llmcli.job import Job
from llmcli.tasks import Strategy, Task, TaskGenerator
from llmcli.tasks.fields import fill, prompt_text
from llmcli.tasks.generated import EMPTY_USAGE, SAMPLING, generated


def prepare(job: Job, fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """The prompt, and what of it text mode prints before the answer; None where the text is empty. Of a preset's prompt
    it prints the beginning of what the model writes."""
    prompt = prompt_text(job, fields)
    shown = prompt
    if (begins := job.parameters.get("begins")) is not None:
        shown = fill(begins, {"text": fields.get(job.parameters["fields"]["text"]), **fields})
    if not job.parameters.get("full_text"):
        shown = ""
    return (prompt, shown) if prompt else None


def run(job: Job, prepared: tuple[str, str], model: Any) -> TaskGenerator:
    """The prompt as it is."""
    prompt, shown = prepared
    return (yield from generated(prompt, shown))


OUTPUTS = ("generated_text", "finish_reason", "usage")
EMPTY = {"generated_text": "", **EMPTY_USAGE}
TASK = Task(prepare, OUTPUTS, EMPTY, {"causal": Strategy(run, SAMPLING | {"max_new_tokens": 128})})
