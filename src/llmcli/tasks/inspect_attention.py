"""inspect attention: compute the attention weights between the tokens of a text."""

from llmcli.job import Job, JsonObject
from llmcli.tasks import Strategy, Task, TaskModel, passthrough
from llmcli.tasks.fields import read_text_field


def prepare(job: Job, fields: JsonObject) -> str:
    """Return the text of a record. Raises RecordError if the text is missing or invalid."""
    return read_text_field(fields, "text")


def select_parameters(job: Job, model: TaskModel) -> JsonObject:
    """Return the parameters of the attention pipelines."""
    return {name: job.parameters[name] for name in ("layer", "head")}


OUTPUTS = ("tokens", "attention", "layers", "heads")
STRATEGY = Strategy(passthrough, parameters=select_parameters)
TASK = Task(prepare, OUTPUTS, {}, {"causal_attention": STRATEGY, "attention": STRATEGY})
