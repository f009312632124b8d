"""inspect next: list the most likely tokens after a text."""

from llmcli.job import Job, JsonObject
from llmcli.tasks import LocalModel, ModelCall, Strategy, Task, TaskGenerator, TaskResult
from llmcli.tasks.fields import read_text_field
from llmcli.tasks.generated import SAMPLING
from llmcli.tasks.outputs import NextTokenOutput


def prepare(job: Job, fields: JsonObject) -> str:
    """Return the text of a record. Before an empty text, the next token is the first one.

    Args:
        job: The job.
        fields: The fields of the record.

    Returns:
        The text.

    Raises:
        RecordError: The text is missing or invalid.
    """
    return read_text_field(fields, "text")


def run(job: Job, text: str, model: LocalModel) -> TaskGenerator:
    """List the most likely next tokens.

    Args:
        job: The job. Its parameter `limit` is the number of tokens.
        text: The text.
        model: The model.

    Yields:
        One call with the text.

    Returns:
        The tokens as `next`, each with its probability before and after sampling settings, and these settings.
    """
    outputs: list[NextTokenOutput] = yield ModelCall([text])
    (output,) = outputs
    probability, sampling_probability = output["probability"], output["sampling_probability"]
    tokens: list[int] = (-probability).argsort(kind="stable")[: job.parameters["limit"]].tolist()
    rows = [
        {
            "token": model.pipeline.token_texts(token, output["input_ids"]),
            "id": token,
            "probability": float(probability[token]),
            "sampling_probability": float(sampling_probability[token]),
        }
        for token in tokens
    ]
    truncated = {"truncated": output["truncated"]} if "truncated" in output else {}
    return TaskResult({"next": rows, "sampling": output["sampling"], **truncated}, "")


TASK = Task(prepare, ("next", "sampling"), {}, {"next_token": Strategy(run, SAMPLING | {"max_new_tokens": 1})})
