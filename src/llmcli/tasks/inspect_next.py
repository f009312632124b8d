"""inspect next: list the most likely tokens after a text."""

from llmcli.job import Job
from llmcli.tasks import LocalModel, ModelCall, Strategy, Task, TaskGenerator, TaskResult
from llmcli.tasks.fields import read_text
from llmcli.tasks.generated import SAMPLING
from llmcli.tasks.outputs import NextTokenOutput


def run(job: Job, text: str, model: LocalModel) -> TaskGenerator:
    """Return the most likely next tokens, as many as the parameter `limit` of the job."""
    outputs: list[NextTokenOutput] = yield ModelCall([text])
    (output,) = outputs
    probability, sampling_probability = output["probability"], output["sampling_probability"]
    next_tokens = [
        {
            "token": model.pipeline.token_texts(token, output["input_ids"]),
            "id": token,
            "probability": float(probability[token]),
            "sampling_probability": float(sampling_probability[token]),
        }
        for token in (-probability).argsort(kind="stable")[: job.parameters["limit"]].tolist()
    ]
    truncated = {"truncated": output["truncated"]} if "truncated" in output else {}
    return TaskResult({"next": next_tokens, "sampling": output["sampling"], **truncated}, "")


TASK = Task(read_text, ("next", "sampling"), {}, {"next_token": Strategy(run, SAMPLING | {"max_new_tokens": 1})})
