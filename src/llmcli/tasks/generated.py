"""What tasks that generate text share: defaults, and how several outputs become one result."""

from collections.abc import Callable, Sequence

from llmcli.job import JsonObject
from llmcli.tasks import ModelCall, Prompt, TaskGenerator, TaskResult
from llmcli.tasks.outputs import GeneratedOutput

EMPTY_USAGE = {"finish_reason": "stop", "usage": {"prompt_tokens": 0, "completion_tokens": 0}}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
SEQ2SEQ = {"num_beams": 4, "do_sample": False, "max_new_tokens": 256}  # as in the pipelines of Transformers 4


def run_prompt(prompt: Prompt, shown: str) -> TaskGenerator:
    """Generate the answer to one prompt. Text mode prints `shown` before each answer."""
    (output,) = yield ModelCall([prompt], shown=shown)
    return TaskResult(output, "\n".join(shown + answer for answer in list_texts(output)))


def list_texts(output: GeneratedOutput) -> list[str]:
    """Return all sequences that were generated for one prompt."""
    return output.get("generated_texts", [output["generated_text"]])


def join_outputs(
    name: str, outputs: Sequence[GeneratedOutput], join: Callable[[Sequence[str]], str], info: JsonObject
) -> TaskResult:
    """Return one result for the outputs of all parts of a record.

    Args:
        name: Name of the field for the joined text. With several sequences, the field `NAMEs` holds all joined texts.
        outputs: The outputs of the parts, in order.
        join: Joins the texts of the parts. The first sequences of all parts are one text, the second ones another.
        info: More fields for the result.
    """
    texts = [join(parts) for parts in zip(*map(list_texts, outputs), strict=True)] or [join([])]
    several = {f"{name}s": texts} if len(texts) > 1 else {}
    return TaskResult({name: texts[0], **several, **info, **merge_usage(outputs)}, "\n".join(texts))


def merge_usage(outputs: Sequence[GeneratedOutput]) -> dict[str, object]:
    """Return the finish reason and the token usage of several outputs together.

    Returns:
        `finish_reason`, which is "length" if any output has it; `usage`, the sums of the token counts; and `truncated`,
        if tokens were cut from a prompt.
    """
    truncated = sum(output.get("truncated", 0) for output in outputs)
    is_cut_short = any(output["finish_reason"] == "length" for output in outputs)
    return {
        **({"truncated": truncated} if truncated else {}),
        "finish_reason": "length" if is_cut_short else "stop",
        "usage": {
            "prompt_tokens": sum(output["usage"]["prompt_tokens"] for output in outputs),
            "completion_tokens": sum(output["usage"]["completion_tokens"] for output in outputs),
        },
    }
