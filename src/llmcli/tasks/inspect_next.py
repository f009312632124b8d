"""inspect next: which tokens may follow a text."""

from collections.abc import Mapping
from typing import Any

from llmcli.job import Job
from llmcli.tasks import ModelCall, Strategy, Task, TaskGenerator, TaskResult
from llmcli.tasks.fields import text_field
from llmcli.tasks.generated import SAMPLING


def prepare(job: Job, fields: Mapping[str, Any]) -> str:
    """The text, which may be empty: then it is the first token that is asked for."""
    return text_field(fields, "text")


def run(job: Job, text: str, model: Any) -> TaskGenerator:
    """The likeliest of all."""
    (output,) = yield ModelCall([text])
    chances, after = output["probability"], output["sampling_probability"]
    found = [
        {
            "token": model.pipeline.token_texts(token, output["input_ids"]),
            "id": token,
            "probability": float(chances[token]),
            "sampling_probability": float(after[token]),
        }
        for token in (-chances).argsort(kind="stable")[: job.parameters["limit"]].tolist()
    ]
    about = {name: output[name] for name in ("sampling", "truncated") if name in output}
    return TaskResult({"next": found, **about}, "")


TASK = Task(prepare, ("next", "sampling"), {}, {"next_token": Strategy(run, SAMPLING | {"max_new_tokens": 1})})
