"""inspect next: list the most likely tokens after a text."""

from llmcli.job import Job
from llmcli.tasks import LocalModel, ModelCall, Strategy, Task, TaskGenerator, TaskResult
from llmcli.tasks.fields import read_text
from llmcli.tasks.generated import SAMPLING


def run(job: Job, text: str, model: LocalModel) -> TaskGenerator:
    """Return the most likely next tokens, as many as the parameter `limit` of the job."""
    (output,) = yield ModelCall([text])
    next_tokens = [
        {
            "token": model.pipeline.token_texts(token, output["input_ids"]),
            "id": token,
            "probability": float(output["probability"][token]),
            "sampling_probability": float(output["sampling_probability"][token]),
        }
        for token in (-output["probability"]).argsort(kind="stable")[: job.parameters["limit"]].tolist()
    ]
    truncated = {"truncated": output["truncated"]} if "truncated" in output else {}
    return TaskResult({"next": next_tokens, "sampling": output["sampling"], **truncated}, "")


TASK = Task(read_text, ("next", "sampling"), {}, {"next_token": Strategy(run, SAMPLING | {"max_new_tokens": 1})})
