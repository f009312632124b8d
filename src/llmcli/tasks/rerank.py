"""rerank: score how relevant a text is to the query of the job."""

from llmcli.job import Job, JsonObject
from llmcli.tasks import Strategy, Task, passthrough
from llmcli.tasks.fields import read_text


def prepare(job: Job, fields: JsonObject) -> JsonObject | None:
    """Return the query and the text of a record, or None if the text is blank."""
    text = read_text(job, fields)
    return {"query": job.parameters["query"], "text": text} if text.strip() else None


OUTPUTS = ("rank", "score", "truncated")  # The command, which has all scores, adds the rank.
TASK = Task(prepare, OUTPUTS, {"rank": None, "score": None}, {"reranking": Strategy(passthrough)})
