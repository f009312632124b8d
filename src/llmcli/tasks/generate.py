"""generate: continue a text."""

from collections.abc import Mapping
from typing import Any

from llmcli.job import Job
from llmcli.tasks import Answer, Ask, Steps, Task, Way
from llmcli.tasks.fields import prompt_text

OUTPUTS = ("generated_text", "finish_reason", "usage")
EMPTY = {
    "generated_text": "",
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 0, "completion_tokens": 0},
}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}


def prepare(job: Job, fields: Mapping[str, Any]) -> str | None:
    """The prompt; None where the text is empty."""
    return prompt_text(job, fields) or None


def steps(job: Job, prompt: Any, model: Any) -> Steps:
    """The prompt, or the conversation, as it is."""
    shown = prompt if job.parameters.get("full_text") else ""
    (output,) = yield Ask([prompt], shown=shown)
    answers = output.get("generated_texts", [output["generated_text"]])
    return Answer(output, "\n".join(shown + answer for answer in answers))


TASK = Task(prepare, OUTPUTS, EMPTY, {"causal": Way(steps, SAMPLING | {"max_new_tokens": 128})})
