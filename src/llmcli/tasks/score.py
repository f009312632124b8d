"""score: compute the perplexity of a text."""

from llmcli.job import Job, JsonObject
from llmcli.tasks import Strategy, Task, TaskModel, passthrough
from llmcli.tasks.fields import field_name, read_text_field


def prepare(job: Job, fields: JsonObject) -> dict[str, str] | None:
    """Return the input of the scoring pipeline.

    Args:
        job: The job. Its parameter `condition` names the field of the prefix that the text is conditioned on.
        fields: The fields of the record.

    Returns:
        The `text` and its `condition`, or None if the text is empty.

    Raises:
        RecordError: A field is missing or is not a string.
    """
    condition = job.parameters.get("condition")
    text = read_text_field(fields, field_name(job, "text"))
    prefix = "" if condition is None else read_text_field(fields, condition)
    return {"text": text, "condition": prefix} if text else None


def select_parameters(job: Job, model: TaskModel) -> JsonObject:
    """Return the parameters of the scoring pipeline."""
    return {name: job.parameters.get(name) for name in ("stride", "token_logprobs")}


OUTPUTS = ("logprob", "perplexity", "bits_per_byte", "tokens")
EMPTY = {"logprob": 0.0, "perplexity": None, "bits_per_byte": None, "tokens": 0}
TASK = Task(prepare, OUTPUTS, EMPTY, {"scoring": Strategy(passthrough, parameters=select_parameters)})
