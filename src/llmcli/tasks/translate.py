"""translate: with a translation model, or with a language model by instruction."""

from collections.abc import Callable, Generator, Sequence
from functools import cache, partial

from llmcli.errors import UsageError
from llmcli.job import Job, JsonObject
from llmcli.tasks import LocalModel, ModelCall, Prompt, Strategy, Task, TaskGenerator, TaskModel, TaskResult
from llmcli.tasks.fields import read_text_record
from llmcli.tasks.generated import EMPTY_USAGE, SEQ2SEQ, GeneratedOutput, join_outputs, list_texts
from llmcli.tasks.prompting import GREEDY, prompt_for, prompt_settings, read_tables
from llmcli.tasks.translation_plan import choose_source, plan_for
from llmcli.text import languages
from llmcli.text.markdown import Segment, Splitter, has_markup, join_segments, keeps_markup

BuildInput = Callable[[str], Prompt | JsonObject]
Example = dict[str, str]


def run(job: Job, fields: JsonObject, model: LocalModel) -> TaskGenerator:
    """Translate with an encoder-decoder model: in one input if the text fits, else sentence by sentence."""
    if "prompt" in job.parameters:
        raise UsageError(f"--prompt cannot be used with {job.model}, a translation model without prompts")
    text = fields["text"]
    if result := _copy_symbols(job, text):
        return result
    plan = plan_for(job, model)
    source = choose_source(job, text, list(plan.sources)) if plan.sources else job.parameters.get("from")
    code = plan.sources.get(source) if source else None
    limit = None if job.truncate else model.context_length

    def fits(piece: str) -> bool:
        # The tokenizers of these models read a newline as a space.
        return "\n" not in piece.strip() and (not limit or model.count_tokens(plan.prefix + piece) <= limit)

    def build_input(piece: str) -> JsonObject:
        # Marian would read `>>...<<` at the beginning as a language.
        return {"text": (plan.prefix or " " * piece.startswith(">>")) + piece, "source": code}

    splitter = Splitter(fits, model.count_tokens, limit - model.count_tokens(plan.prefix) if limit else None)
    return (yield from _translate(job, text, source, splitter, build_input))


def run_prompted(job: Job, fields: JsonObject, model: TaskModel) -> TaskGenerator:
    """Translate with a language model by instruction. A base model sees examples, and translates line by line."""
    text = fields["text"]
    if result := _copy_symbols(job, text):
        return result
    prompt, target = prompt_for(job, model), job.parameters["to"]
    source = choose_source(job, text, [])
    names = {"from": languages.english_name(source), "to": languages.english_name(target)}
    examples = [] if "prompt" in job.parameters else [{**names, **pair} for pair in _select_examples(source, target)]
    max_tokens = prompt.settings["max_new_tokens"] // 2  # A translation may have more tokens than the text.
    is_one_line = "\n" in prompt.settings.get("stop_strings", ())

    def fits(piece: str) -> bool:
        return not (is_one_line and "\n" in piece) and model.count_tokens(piece) <= max_tokens

    def build_input(piece: str) -> Prompt:
        return prompt.render({**fields, **names, "text": piece}, examples)

    splitter = Splitter(fits, model.count_tokens, max_tokens)
    return (yield from _translate(job, text, source, splitter, build_input, strip=True))


def read_settings(job: Job, model: LocalModel) -> JsonObject:
    """Return the GenerationConfig values that tell an encoder-decoder model the language."""
    return plan_for(job, model).settings


def _copy_symbols(job: Job, text: str) -> TaskResult | None:
    """Return a text without letters as its translation: numbers and symbols are the same in every language."""
    if job.constraint or any(map(str.isalpha, text)):
        return None
    info = {"from": job.parameters.get("from"), "to": job.parameters["to"]}
    return TaskResult({"translation_text": text, **info, **EMPTY_USAGE}, text)


def _translate(
    job: Job, text: str, source: str | None, splitter: Splitter, build_input: BuildInput, *, strip: bool = False
) -> TaskGenerator:
    """Translate a text as a whole if it fits and keeps its markup, else in segments, and those around their spans."""
    info, fits = {"from": source, "to": job.parameters["to"]}, splitter.fits(text)
    if job.constraint:  # The answer is not a translation alone, so that parts of it could not be joined.
        outputs = yield ModelCall([build_input(text)], strip=strip)
        return join_outputs("translation_text", outputs, lambda texts: texts[0], info)
    has_lines = "\n" in text.strip()
    segments = splitter.split(text, source or "en") if not fits or has_lines or has_markup(text) else []
    is_plain = not has_lines and not any(s.spans or (not s.text and s.before.strip()) for s in segments)
    if fits and (is_plain or any(segment.text for segment in segments)):
        outputs = yield ModelCall([build_input(text)], shown="" if is_plain else None, strip=strip)
        if is_plain or all(keeps_markup(text, segments, translation) for translation in list_texts(outputs[0])):
            info |= _count_untranslated([text], outputs) if is_plain else _find_untranslated(segments, outputs[0])
            return join_outputs("translation_text", outputs, lambda texts: texts[0], info)
        segments = segments if len(segments) > 1 else segments[0].split_around_spans()

    def run_parts(parts: list[Segment]) -> Generator[ModelCall, list[GeneratedOutput], dict[Segment, GeneratedOutput]]:
        outputs = yield ModelCall([build_input(part.text) for part in parts], strip=strip)
        return dict(zip(parts, outputs, strict=True))

    known = yield from run_parts([segment for segment in segments if segment.text])
    if broken := {part for part, output in known.items() if not all(map(part.keeps, list_texts(output)))}:
        segments = [
            piece
            for segment in segments
            for piece in (segment.split_around_spans() if segment in broken else [segment])
        ]
        known |= yield from run_parts([segment for segment in segments if segment.text and segment not in known])
    parts = [segment for segment in segments if segment.text]
    outputs = [known[part] for part in parts]
    info |= _count_untranslated([part.text for part in parts], outputs)
    return join_outputs("translation_text", outputs, partial(join_segments, segments), info)


def _count_untranslated(texts: Sequence[str], outputs: Sequence[GeneratedOutput]) -> JsonObject:
    translations = [output["generated_text"].strip() for output in outputs]
    equal = sum(after == before.strip() for before, after in zip(texts, translations, strict=True))
    return {"untranslated": [equal, len(texts)]}


def _find_untranslated(segments: Sequence[Segment], output: GeneratedOutput) -> JsonObject:
    texts = [segment.text for segment in segments if segment.text]
    return {"untranslated": [sum(text in output["generated_text"] for text in texts), len(texts)]}


def _select_examples(source: str, target: str) -> list[Example]:
    """Return example sentences in two languages as `text` and `answer`, or none if a language has no sentences."""
    known = {tag for sentence in load_examples() for tag in sentence}
    text, answer = languages.match(source, known), languages.match(target, known)
    both = [sentence for sentence in load_examples() if text in sentence and answer in sentence]
    return [{"text": sentence[text], "answer": sentence[answer]} for sentence in both if text and answer]


@cache
def load_examples() -> list[Example]:
    """Return the sentences of translations.toml and the user's own. Raises UsageError if that file is invalid."""
    table, own, path = read_tables("translations.toml")
    sentences = own.get("sentences") if own else []
    if not isinstance(sentences, list) or not all(isinstance(sentence, dict) for sentence in sentences):
        raise UsageError(f"{path}: sentences must be tables, [[sentences]]")
    return [*table["sentences"], *sentences]


OUTPUTS = ("translation_text", "from", "to", "finish_reason", "usage")
EMPTY = {"translation_text": "", "from": None, "to": None, **EMPTY_USAGE}
STRATEGIES = {
    "seq2seq": Strategy(run, SEQ2SEQ, read_settings),
    "causal": Strategy(run_prompted, GREEDY, prompt_settings, can_think=False),
}
TASK = Task(read_text_record, OUTPUTS, EMPTY, STRATEGIES)
