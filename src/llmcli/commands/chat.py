"""llmcli chat: answer a message, a file of conversations, or a person at the terminal."""

import sys
from typing import Annotated

import typer

from llmcli.errors import ExitStatus
from llmcli.io.output import OutputSpec
from llmcli.io.records import prompts
from llmcli.options import GenerationOptions, InputOptions, OutputOptions, Prompt, ServedModelOptions
from llmcli.options.expand import expand_options
from llmcli.run import run
from llmcli.tasks.templates import build_prompt_parameters


@expand_options
def chat(
    text: Annotated[str | None, typer.Argument(metavar="TEXT", show_default=False)] = None,
    prompt: Prompt = None,
    system: Annotated[str | None, typer.Option("--system", "-s", metavar="TEXT", help="System message.")] = None,
    *,
    input: InputOptions,
    generation: GenerationOptions,
    model: ServedModelOptions,
    output: OutputOptions,
) -> ExitStatus:
    """Answer through the model's chat template. Without TEXT at a terminal: a conversation.

    \b
    llmcli chat "Name three colours"
    git diff | llmcli chat "Write a commit message" -f -
    llmcli chat --jsonl < conversations.jsonl        fields: messages, or text
    llmcli chat                                      /system, /clear, /exit
    """
    form = input.form()
    target = output.target(form, [text] if text is not None else [], input.files)
    parameters = {"fields": input.roles("text", "messages"), "system": system} | build_prompt_parameters(prompt)
    job = model.job("chat", generation, parameters)
    is_plain = target == OutputSpec() and not prompt
    if text is None and not input.files and is_plain and sys.stdin and sys.stdin.isatty():
        from llmcli.repl import converse

        return converse(job)
    return run(job, prompts([text] if text is not None else [], input.files, form), target)
