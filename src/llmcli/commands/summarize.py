"""llmcli summarize: say the same in fewer words."""

from typing import Annotated

import typer

from llmcli.errors import ExitStatus
from llmcli.io.records import read, sources
from llmcli.options import GenerationOptions, InputOptions, OutputOptions, Prompt, ServedModelOptions
from llmcli.options.expand import expand_options
from llmcli.run import run
from llmcli.tasks.templates import build_prompt_parameters


@expand_options
def summarize(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT", default_factory=list, show_default=False)],
    prompt: Prompt = None,
    *,
    input: InputOptions,
    generation: GenerationOptions,
    model: ServedModelOptions,
    output: OutputOptions,
) -> ExitStatus:
    """Summarize each TEXT, of any length.

    One that is longer than the model takes is summarized in parts, then the parts together.

    \b
    llmcli summarize -f report.txt
    man rsync | llmcli summarize --max-new-tokens 80
    llmcli summarize -m facebook/bart-large-cnn --jsonl --field article < news.jsonl
    """
    form = input.form()
    job = model.job("summarize", generation, {"fields": input.roles("text")} | build_prompt_parameters(prompt))
    return run(job, read(sources(texts, input.files), form), output.target(form, texts, input.files))
