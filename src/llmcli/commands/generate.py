"""llmcli generate: continue a text."""

from typing import Annotated

import typer

from llmcli.errors import ExitStatus, UsageError
from llmcli.io.records import prompts
from llmcli.options import GenerationOptions, InputOptions, OutputOptions, Prompt, ServedModelOptions, completion
from llmcli.options.expand import expand_options
from llmcli.run import run
from llmcli.tasks.presets import load_preset
from llmcli.tasks.templates import build_prompt_parameters


@expand_options
def generate(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT", default_factory=list, show_default=False)],
    prompt: Prompt = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            autocompletion=completion.presets,
            help="Fiction: story, screenplay, poem, dialogue.",
        ),
    ] = None,
    full_text: Annotated[bool, typer.Option(help="Print the prompt too, in text mode.")] = True,
    *,
    input: InputOptions,
    generation: GenerationOptions,
    model: ServedModelOptions,
    output: OutputOptions,
) -> ExitStatus:
    """Continue a text. Each TEXT is a prompt of its own, unless -f makes them one.

    \b
    llmcli generate "Once upon a time"
    llmcli generate --preset poem "the harbour in winter"
    llmcli generate --lines -f openings.txt --max-new-tokens 40
    llmcli generate --jsonl --prompt "Sentiment of this review: {text}" < reviews.jsonl
    """
    form = input.form()
    if prompt is not None and preset is not None:
        raise UsageError("--prompt and --preset exclude each other")
    chosen, own = load_preset(preset), build_prompt_parameters(prompt)
    parameters = {"fields": input.roles("text"), "full_text": full_text, **own, **chosen.parameters}
    job = model.job("generate", generation, parameters, chosen.options)
    return run(job, prompts(texts, input.files, form), output.target(form, texts, input.files))
