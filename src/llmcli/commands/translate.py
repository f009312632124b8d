"""llmcli translate: translate texts, preserving line structure."""

import itertools
from dataclasses import replace
from typing import Annotated

from typer import Option

from llmcli import console
from llmcli.errors import ExitStatus, UsageError
from llmcli.job import Job, Result
from llmcli.options import ChatModelOptions, GenerationOptions, InputOptions, OutputOptions, Prompt, Texts, completion
from llmcli.options.expand import expand_options
from llmcli.options.structure import StructureOptions
from llmcli.run import run
from llmcli.tasks.fields import build_prompt_parameters
from llmcli.text import languages


@expand_options
def translate(
    texts: Texts,
    to: Annotated[str, Option(metavar="LANG", autocompletion=completion.languages,
        help="Target language, e.g. fr, zh-Hans or french.")],
    from_: Annotated[str | None, Option("--from", metavar="LANG", autocompletion=completion.languages,
        help="Source language (default: detected).")] = None,
    prompt: Prompt = None,
    *, input: InputOptions, generation: GenerationOptions, structure: StructureOptions, model: ChatModelOptions,
    output: OutputOptions,
) -> ExitStatus:  # fmt: skip
    """Translate texts, preserving line structure.

    A text longer than the context length is translated sentence by sentence.

    \b
    llmcli translate --to fr "The weather is nice today."
    llmcli translate --from de --to en --lines -f briefe.txt
    llmcli translate --to chinese -m facebook/nllb-200-distilled-600M -f README.md
    """
    target, source = languages.parse(to), languages.parse(from_) if from_ else None
    untranslated, parts = 0, 0

    def count(result: Result) -> list[Result]:
        nonlocal untranslated, parts
        equal, total = result.output.get("untranslated", (0, 0))
        untranslated, parts = untranslated + equal, parts + total
        return [replace(result, output={name: result.output[name] for name in result.output if name != "untranslated"})]

    spec = replace(output.spec(input, texts), finish=count)
    roles, fields = input.roles("text"), structure.job_fields(input, generation)
    records = input.read(texts)
    likely_source = source
    if model.model is None and not model.endpoint:  # The default model depends on the language of the first text.
        first = next(records, None)
        if not first:
            return run(Job("translate", ""), [], spec)
        records = itertools.chain([first], records)
        text = first.fields.get(roles["text"])
        likely_source = source or (languages.detect_or_none(text) if isinstance(text, str) else None)
        if not likely_source and not languages.match(target, {tag for tag, _ in languages.rank("")}):
            name = languages.english_name(target)
            raise UsageError(f"no default model translates to {name} ({target})", hint="choose one with -m NAME")
    parameters = {"fields": roles, "from": source, "to": target} | build_prompt_parameters(prompt)
    job = model.job("translate", parameters, generation, source=likely_source, target=target, fields=fields)
    status = run(job, records, spec)
    if untranslated:
        console.warning(f"{untranslated} of {parts} parts came back untranslated")
    return status
