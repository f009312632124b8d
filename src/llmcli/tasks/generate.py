"""generate: continue a text."""

from collections.abc import Mapping
from typing import Any

from llmcli.job import Job
from llmcli.tasks.fields import prompt_text


def prepare(job: Job, fields: Mapping[str, Any]) -> str | None:
    """The prompt; None where the text is empty."""
    return prompt_text(job, fields) or None


def prefix(job: Job, prepared: str) -> str:
    """With full_text, the answer begins with the prompt."""
    return prepared if job.parameters.get("full_text") else ""
