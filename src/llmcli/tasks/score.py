"""score: compute the perplexity of a text."""

from llmcli.job import Job, JsonObject
from llmcli.tasks import Strategy, Task, passthrough, select_parameters
from llmcli.tasks.fields import read_text, text_field


def prepare(job: Job, fields: JsonObject) -> dict[str, str] | None:
    """Return the text of a record and its condition, the prefix that it follows, or None if the text is empty."""
    text, condition = read_text(job, fields), job.parameters.get("condition")
    prefix = "" if condition is None else text_field(fields, condition)
    return {"text": text, "condition": prefix} if text.strip() else None


OUTPUTS = ("logprob", "perplexity", "bits_per_byte", "tokens")
EMPTY = {"logprob": 0.0, "perplexity": None, "bits_per_byte": None, "tokens": 0}
PARAMETERS = select_parameters("stride", "token_logprobs")
TASK = Task(prepare, OUTPUTS, EMPTY, {"scoring": Strategy(passthrough, parameters=PARAMETERS)})
