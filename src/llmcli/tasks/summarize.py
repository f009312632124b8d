"""summarize: in one call if the text fits the model, else part by part, and then the summaries of the parts."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from llmcli.errors import UsageError
from llmcli.job import Job, JsonObject
from llmcli.models import registry
from llmcli.tasks import LocalModel, ModelCall, Prompt, Strategy, Task, TaskGenerator, TaskModel, prompting
from llmcli.tasks.fields import read_text_record
from llmcli.tasks.generated import EMPTY_USAGE, SEQ2SEQ, join_outputs
from llmcli.text import languages
from llmcli.text.splitting import split

BuildInput = Callable[[str], Prompt]
MIN_CONDENSED_TOKENS = 1000  # a longer text is condensed, for models whose prompt says so
MAX_SENTENCES = 10  # of all condensed parts together, or one of each part if there are more parts
SENTENCE_BYTES = range(40, 400)  # length of a sentence that is likely to make sense alone


def run(job: Job, fields: JsonObject, model: LocalModel) -> TaskGenerator:
    """Summarize with an encoder-decoder model."""
    if "prompt" in job.parameters:
        raise UsageError(f"--prompt cannot be used with {job.model}, a summarization model without prompts")
    prefix = str(_model_settings(model).get("prefix", ""))
    max_tokens = model.context_length
    if max_tokens:
        max_tokens -= len(model.tokenizer(prefix, add_special_tokens=False)["input_ids"])
    return (yield from _summarize(job, fields["text"], model, max_tokens, None, lambda part: prefix + part))


def run_prompted(job: Job, fields: JsonObject, model: TaskModel) -> TaskGenerator:
    """Summarize with a language model by instruction."""
    prompt, text = prompting.prompt_for(job, model), fields["text"]

    def render(part: str) -> Prompt:
        return prompt.render({**fields, "text": part})

    if prompt.condensed_tokens and model.count_tokens(text) > MIN_CONDENSED_TOKENS and not job.truncate:
        part_tokens = prompt.part_tokens or MIN_CONDENSED_TOKENS
        parts = [part for _, part in split(text, model.count_tokens, part_tokens)]
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
    return (yield from _summarize(job, text, model, max_tokens, prompt.part_tokens, render))


def read_settings(job: Job, model: LocalModel) -> JsonObject:
    """Return the GenerationConfig values that the model's configuration has for summaries, as T5's does."""
    return {name: value for name, value in _model_settings(model).items() if name != "prefix"}


def _model_settings(model: LocalModel) -> dict[str, object]:
    params = getattr(model.config, "task_specific_params", None) or {}
    return dict(params.get("summarization", {}))


def _summarize(
    job: Job, text: str, model: TaskModel, max_tokens: int | None, part_tokens: int | None, build_input: BuildInput
) -> TaskGenerator:
    """Summarize all parts of a text, then the summaries, until there is one part or summaries become no shorter."""

    def split_parts(text: str) -> list[str]:
        if max_tokens is None or model.count_tokens(text) <= max_tokens:
            return [text]
        return [part for _, part in split(text, model.count_tokens, min(max_tokens, part_tokens or max_tokens))]

    def call(parts: list[str]) -> ModelCall:
        is_single = len(parts) == 1  # Only a summary of a single part is final, so only that may be shown.
        shown = "" if is_single else None
        return ModelCall(list(map(build_input, parts)), shown=shown, strip=not is_single, is_final=is_single)

    parts, truncated = split_parts(text), 0
    if job.truncate:
        truncated = sum(map(model.count_tokens, parts[1:]))
        parts = parts[:1]
    info = {"chunks": len(parts), "truncated": truncated}
    outputs = yield call(parts)
    all_outputs = outputs
    while len(outputs) > 1:
        parts = split_parts("\n\n".join(output["generated_text"] for output in outputs))
        if len(parts) >= len(outputs):
            break
        outputs = yield call(parts)
        all_outputs = [*all_outputs, *outputs]
    last = len(outputs)
    return join_outputs("summary_text", all_outputs, lambda texts: "\n\n".join(texts[-last:]), info)


def condense(
    job: Job, parts: Sequence[str], count_tokens: Callable[[str], int], max_tokens: int
) -> Generator[ModelCall, list[Any], str]:
    """Select the most central sentences, at most `max_tokens` tokens, of which each part of a text has an equal share.

    The score of a sentence is its cosine similarity to the centroid of its part plus that to the centroid of the text.
    This is centroid summarization with sentence vectors in place of word counts (Radev et al., "Centroid-based
    summarization of multiple documents", 2004), for models that are too small to summarize their own summaries.
    """
    import numpy as np

    sentences = [_split_sentences(part) for part in parts]
    texts = [sentence for part in sentences for sentence in part]
    if not texts:
        return ""
    encoder = registry.default_names("embed")[0]
    parameters = {"normalize": True}
    embed = Job("embed", encoder, parameters=parameters, load_options=job.load_options, batch_size=32, truncate=True)
    outputs = yield ModelCall([{"text": text} for text in texts], job=embed)
    vectors = np.array([output["embedding"] for output in outputs])
    text_centroid = vectors.mean(0)
    text_centroid /= np.linalg.norm(text_centroid) or 1
    max_sentences = max(1, MAX_SENTENCES // len(parts))
    selected: list[str] = []
    used = start = 0
    for number, part in enumerate(sentences, start=1):
        if not part:
            continue
        part_vectors = vectors[start : start + len(part)]
        start += len(part)
        part_centroid = part_vectors.mean(0)
        part_centroid /= np.linalg.norm(part_centroid) or 1
        scores = part_vectors @ part_centroid + part_vectors @ text_centroid
        lengths = [count_tokens(sentence) for sentence in part]
        best: list[int] = []
        for i in np.argsort(-scores):
            if len(best) < max_sentences and used + lengths[i] <= max_tokens * number / len(parts):
                best.append(int(i))
                used += lengths[i]
        selected += [part[i] for i in sorted(best)]
    return " ".join(selected)


def _split_sentences(text: str) -> list[str]:
    """Return the complete sentences of a text that are likely to make sense alone."""
    sentences = [" ".join(sentence.split()) for sentence in languages.split_sentences(text)]
    return [s for s in sentences if len(s.encode()) in SENTENCE_BYTES and s[-1] in ".!?。！？"]


def _remove_repetition(text: str) -> str:
    """Remove repeated sentences, and a last sentence that is not finished."""
    unique: dict[str, str] = {}
    for sentence in languages.split_sentences(text):
        unique.setdefault(" ".join(sentence.split()).casefold(), sentence)
    sentences = list(unique.values())
    if len(sentences) > 1 and sentences[-1].rstrip()[-1:] not in ".!?。！？\"'”’)":
        sentences.pop()
    return "".join(sentences).strip()


OUTPUTS = ("summary_text", "chunks", "truncated", "finish_reason", "usage")
EMPTY = {"summary_text": "", "chunks": 0, "truncated": 0, **EMPTY_USAGE}
STRATEGIES = {
    "seq2seq": Strategy(run, SEQ2SEQ, read_settings),
    "causal": Strategy(run_prompted, prompting.GREEDY, prompting.prompt_settings, can_think=False),
}
TASK = Task(read_text_record, OUTPUTS, EMPTY, STRATEGIES)
