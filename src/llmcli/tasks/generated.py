"""What tasks that generate text have in common: defaults, and one result of several outputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmcli.tasks import ModelCall, TaskGenerator, TaskResult

EMPTY_USAGE = {"finish_reason": "stop", "usage": {"prompt_tokens": 0, "completion_tokens": 0}}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
SEQ2SEQ = {"num_beams": 4, "do_sample": False, "max_new_tokens": 256}  # as transformers 4's pipelines


def generated(prompt: Any, shown: str) -> TaskGenerator:
    """The output for a prompt as it is; text mode prints `shown` before each answer."""
    (output,) = yield ModelCall([prompt], shown=shown)
    answers = output.get("generated_texts", [output["generated_text"]])
    return TaskResult(output, "\n".join(shown + answer for answer in answers))


def joined(
    name: str, outputs: Sequence[Mapping[str, Any]], together: Callable[[Sequence[str]], str], about: Mapping[str, Any]
) -> TaskResult:
    """One result of the outputs for a record's parts, which `together` joins; with several sequences a part, the first
    of each make the first text, and so on, and `NAMEs` holds them all."""
    several = [output.get("generated_texts", [output["generated_text"]]) for output in outputs]
    texts = [together(some) for some in zip(*several, strict=True)] or [together([])]
    fields = {name: texts[0], **({f"{name}s": texts} if len(texts) > 1 else {}), **about}
    return TaskResult(fields | merge_usage(outputs), "\n".join(texts))


def merge_usage(outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How it ended, and how many tokens all of it took."""
    cut = sum(output.get("truncated", 0) for output in outputs)
    usage = {key: sum(output["usage"][key] for output in outputs) for key in ("prompt_tokens", "completion_tokens")}
    ends = {output["finish_reason"] for output in outputs}
    return {
        **({"truncated": cut} if cut else {}),
        "finish_reason": "length" if "length" in ends else "stop",
        "usage": usage,
    }
