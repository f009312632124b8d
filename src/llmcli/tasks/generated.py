"""What tasks that generate text share: defaults, and how several outputs become one result."""

from collections.abc import Callable, Sequence
from typing import NotRequired, TypedDict

from llmcli.job import JsonObject
from llmcli.tasks import ModelCall, Prompt, TaskGenerator, TaskResult

EMPTY_USAGE = {"finish_reason": "stop", "usage": {"prompt_tokens": 0, "completion_tokens": 0}}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
SEQ2SEQ = {"num_beams": 4, "do_sample": False, "max_new_tokens": 256}  # as in the pipelines of Transformers 4


class GeneratedOutput(TypedDict):
    """What a `causal` or `seq2seq` pipeline generates for one prompt."""

    generated_text: str
    generated_texts: NotRequired[list[str]]  # all sequences, if more than one was requested
    reasoning: NotRequired[str]  # what the model thought before the first one
    truncated: NotRequired[int]  # tokens cut from the prompt
    finish_reason: str
    usage: dict[str, int]


def run_prompt(prompt: Prompt, shown: str) -> TaskGenerator:
    """Generate the answer to one prompt. Text mode prints `shown` before each answer."""
    (output,) = yield ModelCall([prompt], shown=shown)
    return TaskResult(output, "\n".join(shown + answer for answer in list_texts(output)))


def join_outputs(
    name: str, outputs: Sequence[GeneratedOutput], join: Callable[[Sequence[str]], str], info: JsonObject
) -> TaskResult:
    """Return one result for the outputs of all parts of a record.

    `join` makes one text of the first sequences of all parts, for the field `name`, another of the second ones, and so
    on, for the field `NAMEs`. `info` is more fields.
    """
    texts = [join(parts) for parts in zip(*map(list_texts, outputs), strict=True)] or [join([])]
    several = {f"{name}s": texts} if len(texts) > 1 else {}
    return TaskResult({name: texts[0], **several, **info, **merge_usage(outputs)}, "\n".join(texts))


def merge_usage(outputs: Sequence[GeneratedOutput]) -> dict[str, object]:
    """Return `finish_reason`, `usage` and, where there are any, `truncated` and `reasoning` of several outputs."""
    truncated = sum(output.get("truncated", 0) for output in outputs)
    is_cut_short = any(output["finish_reason"] == "length" for output in outputs)
    usage = {key: sum(output["usage"][key] for output in outputs) for key in ("prompt_tokens", "completion_tokens")}
    extra: dict[str, object] = {"truncated": truncated} if truncated else {}
    if thoughts := [output["reasoning"] for output in outputs if "reasoning" in output]:
        extra["reasoning"] = "\n\n".join(thoughts)
    return {**extra, "finish_reason": "length" if is_cut_short else "stop", "usage": usage}


def list_texts(output: GeneratedOutput) -> list[str]:
    """Return all sequences of an output."""
    return output.get("generated_texts", [output["generated_text"]])
