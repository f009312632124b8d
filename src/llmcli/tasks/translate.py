"""translate: by a model made for it, or by a language model that is told to."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from llmcli import config
from llmcli.errors import UsageError
from llmcli.job import Job
from llmcli.tasks import ModelCall, Strategy, Task, TaskGenerator, TaskResult, prompting
from llmcli.tasks.fields import text_field
from llmcli.tasks.generated import EMPTY_USAGE, SEQ2SEQ, joined
from llmcli.text import chunking, languages

PAIR = re.compile(r"translation_(\w+)_to_(\w+)")  # T5's task_specific_params
MARKERS = re.compile(r"\s*(?:(?:[-*+>|]|#+|\d+[.)])\s+)*")  # what begins a line of Markdown and is not language
FENCE = re.compile(r"\s*(`{3,}(?=[^`]*$)|~{3,})(.*)", re.DOTALL)

Examples = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is told to translate to the job's language. `sources` are the languages that it takes, each with
    the tokenizer's code for it; empty where any text will do."""

    sources: Mapping[str, str | None]
    prefix: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def prepare(job: Job, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record's fields with its text as `text`; None where that is empty."""
    text = text_field(fields, job.parameters.get("fields", {}).get("text", "text"))
    return {**fields, "text": text} if text.strip() else None


def run(job: Job, fields: Mapping[str, Any], model: Any) -> TaskGenerator:
    """By an encoder-decoder model: in one where the text fits, else by sentences."""
    if "prompt" in job.parameters:
        raise UsageError(f"--prompt does not go with {job.model}: it is made to translate, and not prompted")
    text = fields["text"]
    if not any(map(str.isalpha, text)):
        return _unchanged(job, text)
    pipeline = model.pipeline
    plan = _plan(job, pipeline)
    source = _source(job, text, list(plan.sources)) if plan.sources else job.parameters.get("from")
    code = plan.sources.get(source) if source else None

    def fits(piece: str) -> bool:
        return (
            not pipeline.context_length
            or job.truncate
            or pipeline.count_tokens(plan.prefix + piece) <= pipeline.context_length
        )

    def most() -> int:
        left: int = pipeline.context_length - pipeline.count_tokens(plan.prefix)
        return left

    return (
        yield from _translated(
            job,
            text,
            source,
            fits,
            lambda piece: {"text": plan.prefix + piece, "source": code},
            pipeline.count_tokens,
            most,
        )
    )


def prompted(job: Job, fields: Mapping[str, Any], model: Any) -> TaskGenerator:
    """By a language model: with examples of the two languages where it is a base model, whose answer is a line."""
    if not any(map(str.isalpha, fields["text"])):
        return _unchanged(job, fields["text"])
    pipeline, prompt, to = model.pipeline, prompting.prompt_for(job, model.pipeline), job.parameters["to"]
    source = _source(job, fields["text"], [])
    names = {"from": languages.name(source), "to": languages.name(to)}
    examples = [] if "prompt" in job.parameters else _examples(source, to)
    longest = prompt.settings["max_new_tokens"] // 2

    def fits(piece: str) -> bool:
        return not (prompt.is_one_line and "\n" in piece) and pipeline.count_tokens(piece) <= longest

    def ask(piece: str) -> Any:
        return prompt({**fields, **names, "text": piece}, [{**names, **example} for example in examples])

    return (
        yield from _translated(
            job, fields["text"], source, fits, ask, pipeline.count_tokens, lambda: longest, strip=True
        )
    )


def _unchanged(job: Job, text: str) -> TaskResult:
    """Numbers and signs are the same in every language."""
    about = {"from": job.parameters.get("from"), "to": job.parameters["to"]}
    return TaskResult({"translation_text": text, **about, **EMPTY_USAGE}, text)


def parameters(job: Job, pipeline: Any) -> Mapping[str, Any]:
    """GenerationConfig values that tell an encoder-decoder model the language."""
    return _plan(job, pipeline).settings


def _translated(
    job: Job,
    text: str,
    source: str | None,
    fits: Callable[[str], bool],
    ask: Callable[[str], Any],
    count: Callable[[str], int],
    most: Callable[[], int],
    *,
    strip: bool = False,
) -> TaskGenerator:
    about = {"from": source, "to": job.parameters["to"]}
    if fits(text):
        outputs = yield ModelCall([ask(text)], shown="", strip=strip)
        return joined("translation_text", outputs, lambda texts: texts[0], about)
    parts = list(_parts(text, source or "en", fits, lambda piece: chunking.cut(piece, count, most())))
    wanted = [core for _, core, _ in parts if core]
    outputs = yield ModelCall([ask(core) for core in wanted])

    def together(texts: Sequence[str]) -> str:
        translated = iter(texts)
        return "".join(lead + (" ".join(next(translated).split()) if core else "") + tail for lead, core, tail in parts)

    return joined("translation_text", outputs, together, about)


def _parts(
    text: str, tag: str, fits: Callable[[str], bool], cut: Callable[[str], Iterator[tuple[int, str]]]
) -> Iterator[tuple[str, str, str]]:
    """The text as (what stands before, what is translated, what stands after): joined, it is the text. What is
    translated has no line end; it is empty for lines without a letter, and for blocks of code between fences."""
    fence = ""  # that began a block of code
    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        if fence or mark:
            if not fence:
                fence = mark[1] if mark else ""
            elif mark and mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
            yield line, "", ""
            continue
        marker = MARKERS.match(line)
        lead = marker[0] if marker else ""
        if lead:
            yield lead, "", ""
        for sentence in languages.sentences(line[len(lead) :], tag):
            for piece in [sentence] if fits(sentence) else _whole(sentence, cut(sentence)):
                core = piece.strip()
                if not any(map(str.isalpha, core)):
                    yield piece, "", ""
                else:
                    at = piece.index(core)
                    yield piece[:at], core, piece[at + len(core) :]


def _whole(text: str, found: Iterator[tuple[int, str]]) -> Iterator[str]:
    """Pieces with all that lies between them."""
    starts = [0, *[start for start, _ in found][1:], len(text)]
    return (text[a:b] for a, b in itertools.pairwise(starts))


def _source(job: Job, text: str, known: Sequence[str]) -> str:
    """The tag of the text's language: the one that is said, the only one that the model knows, or the detected one, of
    all where `known` is empty. Raises RecordError where the guess is unsure."""
    if said := job.parameters.get("from"):
        return _matched(job, said, known, "from") if known else str(said)
    if len(known) == 1:
        return known[0]
    return languages.detect(text, known)


def _matched(job: Job, wanted: str, known: Sequence[str], where: str) -> str:
    if found := languages.match(wanted, known):
        return found
    near = ", ".join(f"{tag} ({languages.name(tag)})" for tag in languages.nearest(wanted, known))
    what = f"{job.model} does not translate {where} {languages.name(wanted)} ({wanted})"
    raise UsageError(what, hint=f"it translates {where}{' these, the nearest first:' * (len(known) > 1)} {near}")


def _plan(job: Job, pipeline: Any) -> Plan:
    """Read from what the model says of itself. Raises UsageError where it does not translate to the job's language."""
    to, tokenizer, model_config = job.parameters["to"], pipeline.tokenizer, pipeline.model.config
    specific = getattr(model_config, "task_specific_params", None) or {}
    pairs = {(m[1], m[2]): name for name in specific if (m := PAIR.fullmatch(name))}
    if pairs:
        target = _matched(job, to, sorted({target for _, target in pairs}), "to")
        sources = {source: name for (source, into), name in pairs.items() if into == target}
        said = job.parameters.get("from")
        source = _matched(job, said, list(sources), "from") if said else next(iter(sources))
        params = dict(specific[sources[source]])
        return Plan({source: None}, params.pop("prefix", ""), params)
    if model_config.model_type in ("t5", "mt5", "umt5"):  # later ones were trained so, and say nothing of it
        said = job.parameters.get("from")
        between = f"{languages.name(said)} to {languages.name(to)}" if said else f"to {languages.name(to)}"
        return Plan({}, f"translate {between}: ")
    if model_config.model_type == "marian":
        sources = {tag: None} if (tag := _readable(tokenizer.source_lang)) else {}
        targets = {tag: token for token, tag in languages.codes(tokenizer.get_vocab()).items() if ">>" in token}
        if targets:
            return Plan(sources, f"{targets[_matched(job, to, list(targets), 'to')]} ")
        if tag := _readable(tokenizer.target_lang):
            _matched(job, to, [tag], "to")
        return Plan(sources)
    if found := languages.codes(tokenizer.get_added_vocab()):
        tags = {tag: token for token, tag in reversed(found.items())}
        token = tags[_matched(job, to, list(tags), "to")]
        codes = {tag: token.strip("_") for tag, token in tags.items()}
        return Plan(codes, settings={"forced_bos_token_id": tokenizer.convert_tokens_to_ids(token)})
    return Plan({})


def _readable(code: Any) -> str | None:
    """The tag of a language; None for a group of them, like ROMANCE."""
    try:
        return languages.parse(code) if code else None
    except UsageError:
        return None


def _examples(source: str, target: str) -> Examples:
    """The same sentences in both languages, as `text` and `answer`; none where one of them has no sentences."""
    sentences = examples()
    known = {tag for sentence in sentences for tag in sentence}
    one, other = languages.match(source, known), languages.match(target, known)
    if one and other:
        return [{"text": each[one], "answer": each[other]} for each in sentences if one in each and other in each]
    return []


@cache
def examples() -> Examples:
    """translations.toml, with the user's own after it."""
    own = config.config_file().with_name("translations.toml")
    files = [Path(__file__).with_name("translations.toml"), *([own] if own.exists() else [])]
    found: list[Mapping[str, str]] = []
    for file in files:
        sentences = config.read_toml(file).get("sentences")
        if not isinstance(sentences, list) or not all(isinstance(each, dict) for each in sentences):
            raise UsageError(f"{file}: sentences are tables, [[sentences]]")
        found += sentences
    return found


EMPTY = {
    "translation_text": "",
    "from": None,
    "to": None,
    **EMPTY_USAGE,
}
TASK = Task(
    prepare,
    ("translation_text", "from", "to", "finish_reason", "usage"),
    EMPTY,
    {
        "seq2seq": Strategy(run, SEQ2SEQ, parameters),
        "causal": Strategy(prompted, prompting.GREEDY, prompting.parameters),
    },
)
