"""chat: answer a message or a conversation through the model's chat template."""

import re

from llmcli.errors import RecordError
from llmcli.job import Job, JsonObject
from llmcli.tasks import Messages, Strategy, Task, TaskGenerator, TaskModel
from llmcli.tasks.fields import field_name, is_blank, read_prompt, text_field
from llmcli.tasks.generate import EMPTY, OUTPUTS
from llmcli.tasks.generated import SAMPLING, run_prompt

Message = dict[str, str]


def prepare(job: Job, fields: JsonObject) -> Messages | None:
    """Return the conversation so far, which begins with the job's `system` message, or None if there is no message."""
    name = field_name(job, "messages")
    if name in fields and "prompt" not in job.parameters:
        messages = _check_messages(fields[name], name)
        if is_blank(messages[-1]["content"]):
            return None
    elif text := read_prompt(job, fields):
        messages = [{"role": "user", "content": text}]
    else:
        return None
    system = job.parameters.get("system")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _check_messages(messages: object, name: str) -> list[Message]:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise RecordError("wrong_type", f"field {name!r} must be a list of messages")
    messages = [{**message, "content": _join_parts(message.get("content"))} for message in messages]
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RecordError("wrong_type", f"message {number} of {name!r} has no string {key!r}")
            text_field(message, key)
        if not re.fullmatch(r"[\w.-]+", message["role"]):
            raise RecordError("wrong_type", f"message {number} of {name!r}: invalid role {message['role']!r}")
    return messages


def _join_parts(content: object) -> object:
    """Return the text of a content that is a list of parts; another content as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RecordError("wrong_type", f"expected content parts of type 'text', got {kind!r}")
    return "".join(part["text"] for part in content)


def run(job: Job, messages: Messages, model: TaskModel) -> TaskGenerator:
    """Generate the answer to a conversation."""
    return run_prompt(messages, "")


TASK = Task(prepare, OUTPUTS, EMPTY, {"causal": Strategy(run, SAMPLING | {"max_new_tokens": 512})})
