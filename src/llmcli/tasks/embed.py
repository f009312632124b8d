"""embed: a text to a vector."""

from llmcli.job import Job
from llmcli.tasks import Answer, Ask, Steps, Task, Way
from llmcli.tasks.generate import prepare


def steps(job: Job, text: str, model: object) -> Steps:
    """The vector, under `embedding`."""
    (output,) = yield Ask([text])
    return Answer(output, "")


EMPTY = {"embedding": None, "usage": {"prompt_tokens": 0}}
TASK = Task(prepare, ("embedding", "usage"), EMPTY, {"embedding": Way(steps)})
