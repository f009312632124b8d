"""generate: continue a text."""

from llmcli.job import Job, JsonObject
from llmcli.tasks import Strategy, Task, TaskGenerator, TaskModel
from llmcli.tasks.fields import field_name, fill_template, read_prompt
from llmcli.tasks.generated import EMPTY_USAGE, SAMPLING, run_prompt


def prepare(job: Job, fields: JsonObject) -> tuple[str, str] | None:
    """Return the prompt and the end of it that text mode prints before the answer, or None if the text is empty."""
    if not (prompt := read_prompt(job, fields)):
        return None
    shown = prompt
    if (begins := job.parameters.get("begins")) is not None:
        shown = fill_template(begins, {"text": fields.get(field_name(job, "text")), **fields})
    return prompt, shown if job.parameters.get("full_text") else ""


def run(job: Job, prepared: tuple[str, str], model: TaskModel) -> TaskGenerator:
    """Generate the continuation of a prompt."""
    return run_prompt(*prepared)


OUTPUTS = ("generated_text", "finish_reason", "usage")
EMPTY = {"generated_text": "", **EMPTY_USAGE}
TASK = Task(prepare, OUTPUTS, EMPTY, {"causal": Strategy(run, SAMPLING | {"max_new_tokens": 128})})
