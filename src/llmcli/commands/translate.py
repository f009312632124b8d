"""llmcli translate: from one language to another."""

from typing import Annotated

import typer

from llmcli.errors import ExitStatus
from llmcli.io.records import peek_first, read, sources
from llmcli.job import Job
from llmcli.options import GenerationOptions, InputOptions, OutputOptions, Prompt, ServedModelOptions, completion
from llmcli.options.expand import expand_options
from llmcli.run import run
from llmcli.tasks.templates import build_prompt_parameters
from llmcli.text import languages


@expand_options
def translate(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT", default_factory=list, show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="LANG", autocompletion=completion.languages, help="Into this language: fr, zh-Hans, french."
        ),
    ],
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="LANG",
            autocompletion=completion.languages,
            help="From this one (default: detected).",
        ),
    ] = None,
    prompt: Prompt = None,
    *,
    input: InputOptions,
    generation: GenerationOptions,
    model: ServedModelOptions,
    output: OutputOptions,
) -> ExitStatus:
    """Translate each TEXT, keeping its lines.

    A text that is longer than the model takes goes sentence by sentence.

    \b
    llmcli translate --to fr "The weather is nice today."
    llmcli translate --from de --to en --lines -f briefe.txt
    llmcli translate --to chinese -m facebook/nllb-200-distilled-600M -f README.md
    """
    form = input.form()
    source, target = languages.parse(from_) if from_ else None, languages.parse(to)
    target_options = output.target(form, texts, input.files)
    roles = input.roles("text")
    records = read(sources(texts, input.files), form)
    guess = source
    if model.model is None and not model.endpoint:
        records, first = peek_first(records)
        text = first.fields.get(roles["text"]) if first else None
        if not first:
            return run(Job("translate", ""), records, target_options)
        guess = source or (languages.detect_or_none(text) if isinstance(text, str) else None)
    parameters = {"fields": roles, "from": source, "to": target} | build_prompt_parameters(prompt)
    job = model.job("translate", generation, parameters, source=guess, target=target)
    return run(job, records, target_options)
