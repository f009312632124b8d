"""chat: answer a message, or a conversation, through the model's chat template."""

from collections.abc import Mapping
from typing import Any

from llmcli.errors import RecordError
from llmcli.job import Job
from llmcli.tasks import Strategy, Task, TaskGenerator
from llmcli.tasks.fields import prompt_text, text_field
from llmcli.tasks.generate import EMPTY, OUTPUTS
from llmcli.tasks.generated import SAMPLING, generated

Message = dict[str, Any]


def prepare(job: Job, fields: Mapping[str, Any]) -> list[Message] | None:
    """The conversation so far; None where the message is empty. A system message of the record's own
    stands before the job's."""
    name = job.parameters.get("fields", {}).get("messages", "messages")
    if name in fields and "prompt" not in job.parameters:
        messages = _checked(fields[name], name)
    elif text := prompt_text(job, fields):
        messages = [{"role": "user", "content": text}]
    else:
        return None
    system = job.parameters.get("system")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def run(job: Job, messages: list[Message], model: Any) -> TaskGenerator:
    """The conversation as it is."""
    return (yield from generated(messages, ""))


def _checked(messages: Any, name: str) -> list[Message]:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise RecordError("wrong_type", f"field {name!r} is not a list of messages")
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RecordError("wrong_type", f"message {number} of {name!r} has no text {key!r}")
            text_field(message, key)
    return messages


TASK = Task(prepare, OUTPUTS, EMPTY, {"causal": Strategy(run, SAMPLING | {"max_new_tokens": 512})})
