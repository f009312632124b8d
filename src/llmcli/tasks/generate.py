"""generate: continue a text."""

from dataclasses import dataclass

from llmcli.job import Job, JsonObject
from llmcli.tasks import Strategy, Task, TaskGenerator, TaskModel
from llmcli.tasks.fields import field_name
from llmcli.tasks.generated import EMPTY_USAGE, SAMPLING, run_prompt
from llmcli.tasks.templates import fill_template, read_prompt


@dataclass(frozen=True, slots=True)
class ShownPrompt:
    """A prompt, and the end of it that text mode prints before the answer."""

    prompt: str
    shown: str


def prepare(job: Job, fields: JsonObject) -> ShownPrompt | None:
    """Return the prompt of a record, or None if its text is empty.

    Raises:
        RecordError: A field is missing or is not a string.
    """
    if not (prompt := read_prompt(job, fields)):
        return None
    shown = prompt
    if (begins := job.parameters.get("begins")) is not None:
        shown = fill_template(begins, {"text": fields.get(field_name(job, "text")), **fields})
    return ShownPrompt(prompt, shown if job.parameters.get("full_text") else "")


def run(job: Job, prepared: ShownPrompt, model: TaskModel) -> TaskGenerator:
    """Generate the continuation of a prompt."""
    return (yield from run_prompt(prepared.prompt, prepared.shown))


OUTPUTS = ("generated_text", "finish_reason", "usage")
EMPTY = {"generated_text": "", **EMPTY_USAGE}
TASK = Task(prepare, OUTPUTS, EMPTY, {"causal": Strategy(run, SAMPLING | {"max_new_tokens": 128})})
