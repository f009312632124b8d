"""Reads from a translation model which languages it knows, and how its input and settings name them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from llmcli.errors import UsageError
from llmcli.job import Job, JsonObject
from llmcli.tasks import LocalModel
from llmcli.text import languages

T5_PAIR = re.compile(r"translation_(\w+)_to_(\w+)")  # names in T5's task_specific_params


@dataclass(frozen=True, slots=True)
class TranslationPlan:
    """How a model translates into the language of a job: with a prefix of each input, or GenerationConfig settings.

    `sources` are the languages that the model accepts, with the tokenizer's codes if it has any. Empty: all texts.
    """

    sources: Mapping[str, str | None]
    prefix: str = ""
    settings: JsonObject = field(default_factory=dict)


# Making a plan takes milliseconds, because the vocabulary is searched for languages. A model's plans end with it.
_plans: WeakKeyDictionary[LocalModel, dict[tuple[str, str | None], TranslationPlan]] = WeakKeyDictionary()


def plan_for(job: Job, model: LocalModel) -> TranslationPlan:
    """Return the plan for all records of a job. Raises UsageError if the model does not know the languages."""
    plans = _plans.setdefault(model, {})
    key = (job.parameters["to"], job.parameters.get("from"))
    if key not in plans:
        plans[key] = _make_plan(job, model)
    return plans[key]


def _make_plan(job: Job, model: LocalModel) -> TranslationPlan:
    target, given = job.parameters["to"], job.parameters.get("from")
    params = getattr(model.config, "task_specific_params", None) or {}
    if pairs := {(match[1], match[2]): name for name in params if (match := T5_PAIR.fullmatch(name))}:
        target = _match_language(job, target, sorted({into for _, into in pairs}), "to")
        names = {source: name for (source, into), name in pairs.items() if into == target}
        source = _match_language(job, given, list(names), "from") if given else next(iter(names))
        settings = dict(params[names[source]])
        return TranslationPlan({source: None}, settings.pop("prefix", ""), settings)
    if model.config.model_type in ("t5", "mt5", "umt5"):
        # Later models of this kind were trained with the same prefixes, but their configurations do not list them.
        start = f"translate {languages.english_name(given)} to" if given else "translate to"
        return TranslationPlan({}, f"{start} {languages.english_name(target)}: ")
    if model.config.model_type == "marian":
        return _plan_for_marian(job, model)
    codes = languages.find_codes(model.tokenizer.get_added_vocab())
    if not codes:
        return TranslationPlan({})
    tokens = {tag: token for token, tag in reversed(codes.items())}
    sources = {tag: token.strip("_") for tag, token in tokens.items()}
    token_id = model.tokenizer.convert_tokens_to_ids(tokens[_match_language(job, target, list(tokens), "to")])
    return TranslationPlan(sources, settings={"forced_bos_token_id": token_id})


def choose_source(job: Job, text: str, known: Sequence[str]) -> str:
    """Return the given language, the only one of the `known` languages, or the detected one."""
    if given := job.parameters.get("from"):
        return _match_language(job, given, known, "from") if known else str(given)
    return known[0] if len(known) == 1 else languages.detect(text, known)


def _match_language(job: Job, wanted: str, known: Sequence[str], direction: str) -> str:
    """Return the known tag that serves as another one. Raises UsageError if there is none."""
    if tag := languages.match(wanted, known):
        return tag
    nearest = ", ".join(f"{tag} ({languages.english_name(tag)})" for tag in languages.find_nearest(wanted, known))
    raise UsageError(
        f"{job.model} does not translate {direction} {languages.english_name(wanted)} ({wanted})",
        hint=f"{'closest ' if len(known) > 1 else ''}supported: {nearest}",
    )


def _plan_for_marian(job: Job, model: LocalModel) -> TranslationPlan:
    source, target = _parse_or_none(model.tokenizer.source_lang), _parse_or_none(model.tokenizer.target_lang)
    sources = {source: None} if source else {}
    codes = languages.find_codes(model.tokenizer.get_vocab())
    tokens = {tag: token for token, tag in codes.items() if ">>" in token}
    if tokens:
        return TranslationPlan(sources, f"{tokens[_match_language(job, job.parameters['to'], list(tokens), 'to')]} ")
    if target:
        _match_language(job, job.parameters["to"], [target], "to")
    return TranslationPlan(sources)


def _parse_or_none(code: str | None) -> str | None:
    """Return the tag of a language, or None for a group of languages such as ROMANCE."""
    try:
        return languages.parse(code) if code else None
    except UsageError:
        return None
