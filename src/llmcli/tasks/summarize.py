"""summarize: a document in one go where it fits the model, else in parts, and then the parts' summaries together."""

from collections.abc import Callable, Mapping
from typing import Any

from llmcli.errors import UsageError
from llmcli.job import Job
from llmcli.tasks import ModelCall, Strategy, Task, TaskGenerator, prompting
from llmcli.tasks.condense import condensed
from llmcli.tasks.generated import EMPTY_USAGE, SEQ2SEQ, joined
from llmcli.tasks.translate import prepare
from llmcli.text import chunking, languages

WHOLE = 1000  # tokens that a model whose long texts are condensed reads as they are


def run(job: Job, fields: Mapping[str, Any], model: Any) -> TaskGenerator:
    """By an encoder-decoder model."""
    if "prompt" in job.parameters:
        raise UsageError(f"--prompt does not go with {job.model}: it is made to summarize, and not prompted")
    pipeline, prefix = model.pipeline, _specific(model.pipeline).get("prefix", "")
    room = pipeline.context_length and pipeline.context_length - len(
        pipeline.tokenizer(prefix, add_special_tokens=False)["input_ids"]
    )
    return (yield from _summarized(job, fields["text"], room, room, pipeline.count_tokens, lambda text: prefix + text))


def prompted(job: Job, fields: Mapping[str, Any], model: Any) -> TaskGenerator:
    """By a language model that is told to."""
    pipeline, prompt = model.pipeline, prompting.prompt_for(job, model.pipeline)
    most = job.generation.get("max_new_tokens") or prompt.settings["max_new_tokens"]
    frame = prompt({**fields, "text": ""})
    taken = most + pipeline.count_prompt_tokens(frame)
    room = pipeline.context_length and max(pipeline.context_length - taken, pipeline.context_length // 4)

    def ask(text: str) -> Any:
        return prompt({**fields, "text": text})

    text = fields["text"]
    if prompt.condense and pipeline.count_tokens(text) > WHOLE and not job.truncate:
        parts = [piece for _, piece in chunking.cut(text, pipeline.count_tokens, prompt.part or WHOLE)]
        central = yield from condensed(job, parts, pipeline.count_tokens, prompt.condense)
        if central:
            outputs = yield ModelCall([ask(central)], strip=True)
            return joined(
                "summary_text", outputs, lambda texts: _tidy(texts[0]), {"chunks": len(parts), "truncated": 0}
            )
    return (yield from _summarized(job, text, room, prompt.part, pipeline.count_tokens, ask))


def parameters(job: Job, pipeline: Any) -> Mapping[str, Any]:
    """What the model's configuration says of summaries, as T5's does."""
    return {name: value for name, value in _specific(pipeline).items() if name != "prefix"}


def _specific(pipeline: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (getattr(pipeline.model.config, "task_specific_params", None) or {}).get(
        "summarization", {}
    )
    return found


def _summarized(
    job: Job, text: str, room: int | None, part: int | None, count: Callable[[str], int], ask: Callable[[str], Any]
) -> TaskGenerator:
    """`room` is how many tokens fit in one input, `part` how many a part of a longer text has."""

    def parts_of(text: str) -> list[str]:
        if room is None or count(text) <= room:
            return [text]
        return [piece for _, piece in chunking.cut(text, count, min(room, part or room))]

    parts = parts_of(text)
    cut = 0
    if job.truncate:
        cut = sum(map(count, parts[1:]))
        parts = parts[:1]
    chunks = len(parts)
    outputs = done = yield ModelCall([ask(each) for each in parts], shown="" if chunks == 1 else None, strip=chunks > 1)
    while len(outputs) > 1:
        parts = parts_of("\n\n".join(output["generated_text"] for output in outputs))
        if len(parts) >= len(outputs):  # summaries that are no shorter than the text: they stay as they are
            break
        outputs = yield ModelCall(
            [ask(each) for each in parts], shown="" if len(parts) == 1 else None, strip=len(parts) > 1
        )
        done = [*done, *outputs]
    last = len(outputs)
    about = {"chunks": chunks, "truncated": cut}
    return joined("summary_text", done, lambda texts: "\n\n".join(texts[-last:]), about)


def _tidy(text: str) -> str:
    """Without sentences that were said before, and without a last one that is not finished."""
    said: dict[str, str] = {}
    for sentence in languages.sentences(text, languages.likely(text) or "en"):
        said.setdefault(" ".join(sentence.split()).casefold(), sentence)
    sentences = list(said.values())
    if len(sentences) > 1 and sentences[-1].rstrip()[-1:] not in ".!?。！？\"'”’)":
        sentences.pop()
    return "".join(sentences).strip()


EMPTY = {
    "summary_text": "",
    "chunks": 0,
    "truncated": 0,
    **EMPTY_USAGE,
}
TASK = Task(
    prepare,
    ("summary_text", "chunks", "truncated", "finish_reason", "usage"),
    EMPTY,
    {
        "seq2seq": Strategy(run, SEQ2SEQ, parameters),
        "causal": Strategy(prompted, prompting.GREEDY, prompting.parameters),
    },
)
