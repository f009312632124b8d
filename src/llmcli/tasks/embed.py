"""embed: compute the vector of a text."""

from llmcli.job import Job, JsonObject
from llmcli.tasks import Strategy, Task, passthrough
from llmcli.tasks.templates import read_prompt


def prepare(job: Job, fields: JsonObject) -> str | None:
    """Return the text of a record, or None if it is empty. Raises RecordError if the text is missing or invalid."""
    return read_prompt(job, fields) or None


EMPTY = {"embedding": None, "usage": {"prompt_tokens": 0}}
TASK = Task(prepare, ("embedding", "usage"), EMPTY, {"embedding": Strategy(passthrough)})
