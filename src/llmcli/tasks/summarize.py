"""summarize: in one call if the text fits the model, else part by part, and then the summaries of the parts."""

from collections.abc import Callable
from functools import partial

from llmcli.errors import UsageError
from llmcli.job import Job, JsonObject
from llmcli.tasks import LocalModel, ModelCall, Prompt, Strategy, Task, TaskGenerator, TaskModel, prompting
from llmcli.tasks.condense import condense
from llmcli.tasks.fields import read_text_record
from llmcli.tasks.generated import EMPTY_USAGE, SEQ2SEQ, join_outputs
from llmcli.tasks.outputs import GeneratedOutput
from llmcli.text import chunking, languages

MIN_CONDENSED_TOKENS = 1000  # a longer text is condensed, for models whose prompt says so


def run(job: Job, fields: JsonObject, model: LocalModel) -> TaskGenerator:
    """Summarize with an encoder-decoder model.

    Raises:
        UsageError: The job has a prompt.
    """
    if "prompt" in job.parameters:
        raise UsageError(f"--prompt cannot be used with {job.model}, a summarization model without prompts")
    prefix = str(_summarization_settings(model).get("prefix", ""))
    max_tokens = model.context_length
    if max_tokens:
        max_tokens -= len(model.tokenizer(prefix, add_special_tokens=False)["input_ids"])
    split = partial(split_parts, model.count_tokens, max_tokens, None)
    return (yield from _summarize(job, fields["text"], model, split, lambda part: prefix + part))


def run_prompted(job: Job, fields: JsonObject, model: TaskModel) -> TaskGenerator:
    """Summarize with a language model by instruction."""
    prompt, text = prompting.prompt_for(job, model), fields["text"]

    def render(part: str) -> Prompt:
        return prompt.render({**fields, "text": part})

    if prompt.condensed_tokens and model.count_tokens(text) > MIN_CONDENSED_TOKENS and not job.truncate:
        part_tokens = prompt.part_tokens or MIN_CONDENSED_TOKENS
        parts = [part for _, part in chunking.split(text, model.count_tokens, part_tokens)]
        condensed = yield from condense(job, parts, model.count_tokens, prompt.condensed_tokens)
        if condensed:
            outputs = yield ModelCall([render(condensed)], strip=True)
            info = {"chunks": len(parts), "truncated": 0}
            return join_outputs("summary_text", outputs, lambda texts: _remove_repetition(texts[0]), info)
    max_tokens = model.context_length
    if max_tokens:
        answer_tokens = job.generation.get("max_new_tokens") or prompt.settings["max_new_tokens"]
        other_tokens = answer_tokens + model.count_prompt_tokens(render(""))
        max_tokens = max(max_tokens - other_tokens, max_tokens // 4)
    split = partial(split_parts, model.count_tokens, max_tokens, prompt.part_tokens)
    return (yield from _summarize(job, text, model, split, render))


def read_settings(job: Job, model: LocalModel) -> JsonObject:
    """Return the GenerationConfig values that the model's configuration has for summaries, as T5's does."""
    return {name: value for name, value in _summarization_settings(model).items() if name != "prefix"}


def _summarization_settings(model: LocalModel) -> dict[str, object]:
    params = getattr(model.config, "task_specific_params", None) or {}
    settings: dict[str, object] = params.get("summarization", {})
    return settings


def split_parts(
    count_tokens: Callable[[str], int], max_tokens: int | None, part_tokens: int | None, text: str
) -> list[str]:
    """Return the parts of a text of more than `max_tokens`, each of at most `part_tokens` if that is given."""
    if max_tokens is None or count_tokens(text) <= max_tokens:
        return [text]
    return [part for _, part in chunking.split(text, count_tokens, min(max_tokens, part_tokens or max_tokens))]


def _summarize(
    job: Job, text: str, model: TaskModel, split: Callable[[str], list[str]], build_input: Callable[[str], Prompt]
) -> TaskGenerator:
    """Summarize all parts of a text, then the summaries, until there is one part or summaries become no shorter."""
    parts, truncated = split(text), 0
    if job.truncate:
        truncated = sum(map(model.count_tokens, parts[1:]))
        parts = parts[:1]
    info = {"chunks": len(parts), "truncated": truncated}
    outputs: list[GeneratedOutput] = yield _call(parts, build_input)
    all_outputs = outputs
    while len(outputs) > 1:
        parts = split("\n\n".join(output["generated_text"] for output in outputs))
        if len(parts) >= len(outputs):
            break
        outputs = yield _call(parts, build_input)
        all_outputs = [*all_outputs, *outputs]
    last = len(outputs)
    return join_outputs("summary_text", all_outputs, lambda texts: "\n\n".join(texts[-last:]), info)


def _call(parts: list[str], build_input: Callable[[str], Prompt]) -> ModelCall:
    """Return a call for these parts. Only a summary of a single part is final, so only that may be shown."""
    is_single = len(parts) == 1
    return ModelCall(list(map(build_input, parts)), shown="" if is_single else None, strip=not is_single)


def _remove_repetition(text: str) -> str:
    """Remove repeated sentences, and a last sentence that is not finished."""
    unique: dict[str, str] = {}
    for sentence in languages.split_sentences(text, languages.detect_or_none(text) or "en"):
        unique.setdefault(" ".join(sentence.split()).casefold(), sentence)
    sentences = list(unique.values())
    if len(sentences) > 1 and sentences[-1].rstrip()[-1:] not in ".!?。！？\"'”’)":
        sentences.pop()
    return "".join(sentences).strip()


OUTPUTS = ("summary_text", "chunks", "truncated", "finish_reason", "usage")
EMPTY = {"summary_text": "", "chunks": 0, "truncated": 0, **EMPTY_USAGE}
STRATEGIES = {
    "seq2seq": Strategy(run, SEQ2SEQ, read_settings),
    "causal": Strategy(run_prompted, prompting.GREEDY, prompting.prompt_settings),
}
TASK = Task(read_text_record, OUTPUTS, EMPTY, STRATEGIES)
