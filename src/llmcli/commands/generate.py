"""llmcli generate: generate text from a prompt."""

from typing import Annotated

from typer import Option

from llmcli.errors import ExitStatus, UsageError
from llmcli.io.records import read_prompts
from llmcli.options import GenerationOptions, OutputOptions, Prompt, Texts, completion
from llmcli.options.expand import expand_options
from llmcli.options.input_output import RequestInputOptions
from llmcli.options.model import ServedModelOptions
from llmcli.options.structure import AnswerOptions
from llmcli.run import run
from llmcli.tasks.fields import build_prompt_parameters
from llmcli.tasks.prompting import load_preset


@expand_options
def generate(
    texts: Texts,
    prompt: Prompt = None,
    preset: Annotated[str | None, Option(metavar="NAME", autocompletion=completion.presets,
        help="Writing preset: story, screenplay, poem or dialogue.")] = None,
    full_text: Annotated[bool, Option(help="Include the prompt in text output.")] = True,
    *, input: RequestInputOptions, generation: GenerationOptions, structure: AnswerOptions, model: ServedModelOptions,
    output: OutputOptions,
) -> ExitStatus:  # fmt: skip
    """Generate text from a prompt.

    Each TEXT is one prompt. With -f, the files and TEXT together are one prompt.

    \b
    llmcli generate "Once upon a time"
    llmcli generate --preset poem "the harbor in winter"
    llmcli generate --lines -f openings.txt --max-new-tokens 40
    llmcli generate --jsonl --prompt "Sentiment of {text}:" < reviews.jsonl
    """
    format = input.format()
    if prompt is not None and preset is not None:
        raise UsageError("--prompt cannot be used with --preset")
    fields = structure.job_fields(input, generation)
    chosen, defaults = load_preset(preset)
    parameters = {"fields": input.roles("text"), "full_text": full_text, **build_prompt_parameters(prompt), **chosen}
    job = model.job("generate", parameters, generation, defaults=defaults, fields=fields)
    records = input.read(texts) if input.parquet else read_prompts(texts, input.files, format)
    return run(job, records, output.spec(input, texts))
