"""Tasks: how a record becomes a pipeline's input, and its output a result. Not how models run.

A new task is a Task in the table below, its functions in a module of its own, and a command file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmcli.job import Job
from llmcli.tasks import chat, generate
from llmcli.tasks.fields import check_template


@dataclass(frozen=True, slots=True)
class Task:
    """`prepare` makes a record's fields into the pipeline's input, or None where there is nothing to
    do (RecordError: a field is missing or of the wrong type); `text` is what text mode prints for a
    prepared input and the pipeline's output; `prefix` is the part of that text known beforehand."""

    pipeline: str
    outputs: tuple[str, ...]
    prepare: Callable[[Job, Mapping[str, Any]], Any]
    empty: Mapping[str, Any]  # the output for an empty text
    prefix: Callable[[Job, Any], str]
    defaults: Mapping[str, Any] | None  # GenerationConfig values where all are silent; None: it does not generate

    def text(self, job: Job, prepared: Any, output: Mapping[str, Any]) -> str:
        """What text mode prints."""
        answers = output.get(f"{self.outputs[0]}s", [output[self.outputs[0]]])
        return "\n".join(f"{self.prefix(job, prepared)}{answer}" for answer in answers)


GENERATED = ("generated_text", "finish_reason", "usage")
NOTHING = {
    "generated_text": "",
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 0, "completion_tokens": 0},
}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}


def _nothing(job: Job, prepared: Any) -> str:
    return ""


TASKS: Mapping[str, Task] = {
    "generate": Task(
        pipeline="causal",
        outputs=GENERATED,
        prepare=generate.prepare,
        empty=NOTHING,
        prefix=generate.prefix,
        defaults=SAMPLING | {"max_new_tokens": 128},
    ),
    "chat": Task(
        pipeline="causal",
        outputs=GENERATED,
        prepare=chat.prepare,
        empty=NOTHING,
        prefix=_nothing,
        defaults=SAMPLING | {"max_new_tokens": 512},
    ),
    "embed": Task(
        pipeline="embedding",
        outputs=("embedding", "usage"),
        prepare=generate.prepare,
        empty={"embedding": None, "usage": {"prompt_tokens": 0}},
        prefix=_nothing,
        defaults=None,
    ),
}


def template(prompt: str | None) -> dict[str, str]:
    """`--prompt` as a job's parameter. Raises UsageError where it could never be filled."""
    if prompt is None:
        return {}
    check_template(prompt)
    return {"prompt": prompt}
