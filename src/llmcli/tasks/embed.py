"""embed: a text to a vector."""

from collections.abc import Mapping
from typing import Any

from llmcli.job import Job
from llmcli.tasks import Strategy, Task, passthrough
from llmcli.tasks.fields import prompt_text


def prepare(job: Job, fields: Mapping[str, Any]) -> str | None:
    """The text; None where it is empty."""
    return prompt_text(job, fields) or None


EMPTY = {"embedding": None, "usage": {"prompt_tokens": 0}}
TASK = Task(prepare, ("embedding", "usage"), EMPTY, {"embedding": Strategy(passthrough)})
