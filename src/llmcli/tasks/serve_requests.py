"""serve_requests: answer a request of the OpenAI API, for a chat completion, a completion or embeddings."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from llmcli.errors import RecordError
from llmcli.io.openai_batch import CHATS, EMBEDDINGS
from llmcli.job import Job, JsonObject
from llmcli.tasks import Messages, ModelCall, Strategy, Task, TaskGenerator, TaskModel, TaskResult, chat, embed
from llmcli.tasks.fields import text_field
from llmcli.tasks.generated import SAMPLING


def answer(job: Job, request: JsonObject, model: TaskModel) -> TaskGenerator:
    """Answer a request by a language model. A server gets the request as it is."""
    if job.endpoint:
        (output,) = yield ModelCall([request])
        return TaskResult(output, "")
    if request["url"] == EMBEDDINGS:
        own = replace(job, task="embed", think=None, template_options={})
        inputs = [{"text": text} for text in _read_texts(request, "input")]
        return _make_embeddings((yield ModelCall(inputs, job=own, is_shared=True)))
    is_chat, copies = request["url"] == CHATS, request["n"] or 1
    prompts = _read_messages(job, request, model) if is_chat else _read_texts(request, "prompt")
    outputs = yield ModelCall(prompts, copies=copies, logprobs=request["logprobs"])
    kind, make = ("chat.completion", _make_message) if is_chat else ("text_completion", _make_text)
    choices = [{"index": i, "finish_reason": each["finish_reason"], **make(each)} for i, each in enumerate(outputs)]
    return _make_result({"object": kind, "choices": choices}, outputs, copies)


def compute_embeddings(job: Job, request: JsonObject, model: TaskModel) -> TaskGenerator:
    """Answer a request by an encoder."""
    if request["url"] != EMBEDDINGS:
        raise RecordError("unsuitable_model", f"{job.model} is not a causal language model")
    return _make_embeddings((yield ModelCall(_read_texts(request, "input"))))


def _read_messages(job: Job, request: JsonObject, model: TaskModel) -> list[Messages]:
    if not model.is_chat:
        raise RecordError("unsuitable_model", f"{job.model} has no chat template")
    if messages := chat.prepare(job, {"messages": request["input"]}):
        return [messages]
    raise RecordError("empty", "the last message is empty")


def _read_texts(request: JsonObject, name: str) -> list[str]:
    texts = [request["input"]] if isinstance(request["input"], str) else request["input"]
    if not (isinstance(texts, list) and texts):
        raise RecordError("wrong_type", f"{name} must be a string, or an array of strings")
    if any(isinstance(text, str) and not text.strip() for text in texts):
        raise RecordError("empty", f"{name} has an empty text")
    return [text_field({name: text}, name) for text in texts]


def _make_message(output: JsonObject) -> JsonObject:
    message = {"role": "assistant", "content": output["generated_text"], "refusal": None}
    thoughts = {"reasoning_content": output["reasoning"]} if "reasoning" in output else {}
    return {"message": message | thoughts, "logprobs": output.get("logprobs")}


def _make_text(output: JsonObject) -> JsonObject:
    tokens = output["logprobs"]["content"] if "logprobs" in output else []
    texts = [token["token"] for token in tokens]
    logprobs = {
        "tokens": texts,
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{other["token"]: other["logprob"] for other in token["top_logprobs"]} for token in tokens],
        "text_offset": [*accumulate(map(len, texts), initial=0)][:-1],
    }
    return {"text": output["generated_text"], "logprobs": logprobs if "logprobs" in output else None}


def _make_embeddings(outputs: Sequence[JsonObject]) -> TaskResult:
    vectors = [{"object": "embedding", "index": i, "embedding": each["embedding"]} for i, each in enumerate(outputs)]
    return _make_result({"object": "list", "data": vectors}, outputs)


def _make_result(body: JsonObject, outputs: Sequence[JsonObject], copies: int = 1) -> TaskResult:
    """Return a result. Its first field is the answer, and its plural all of them, to which a schema applies."""
    read = sum(each["usage"]["prompt_tokens"] for each in outputs[::copies])
    new = sum(each["usage"].get("completion_tokens", 0) for each in outputs)
    usage = {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
    texts = [each.get("generated_text") for each in outputs]
    answers = {"text": texts[0], "texts": texts, "truncated": sum(each.get("truncated", 0) for each in outputs)}
    return TaskResult({**answers, "body": {**body, "usage": usage}, "usage": usage}, "")


TASK = Task(lambda job, fields: fields, ("text",), {}, {
    "causal": Strategy(answer, SAMPLING | {"max_new_tokens": 512}),
    "embedding": Strategy(compute_embeddings, parameters=embed.TASK.strategies["embedding"].parameters),
})  # fmt: skip
