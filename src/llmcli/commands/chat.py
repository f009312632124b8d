"""llmcli chat: answer a message, a file of conversations, or a person at the terminal."""

import sys
from typing import Annotated

from typer import Argument, Option

from llmcli.errors import ExitStatus
from llmcli.io.output import OutputSpec
from llmcli.io.records import read_prompts
from llmcli.options import ChatModelOptions, GenerationOptions, OutputOptions, Prompt, expand_options
from llmcli.options.input_output import RequestInputOptions
from llmcli.options.structure import AnswerOptions
from llmcli.run import run
from llmcli.tasks.fields import build_prompt_parameters


@expand_options
def chat(
    text: Annotated[str | None, Argument(metavar="TEXT", show_default=False)] = None,
    prompt: Prompt = None,
    system: Annotated[str | None, Option("--system", "-s", metavar="TEXT", help="System message.")] = None,
    *, input: RequestInputOptions, generation: GenerationOptions, structure: AnswerOptions, model: ChatModelOptions,
    output: OutputOptions,
) -> ExitStatus:  # fmt: skip
    """Chat with a model.

    The model's chat template is used. Without TEXT at a terminal, a conversation starts.

    \b
    llmcli chat "Name three colors"
    git diff | llmcli chat "Write a commit message" -f -
    llmcli chat --jsonl < conversations.jsonl        fields: messages, or text
    llmcli chat                                      /system, /clear, /exit
    """
    format, texts = input.format(), [] if text is None else [text]
    spec = output.spec(input, texts)
    parameters = {"fields": input.roles("text", "messages"), "system": system} | build_prompt_parameters(prompt)
    job = model.job("chat", parameters, generation, fields=structure.job_fields(input, generation))
    has_input = texts or input.files or prompt or job.shard or spec != OutputSpec()
    if not has_input and sys.stdin and sys.stdin.isatty():
        from llmcli.repl import converse

        return converse(job)
    return run(job, input.read(texts) if input.parquet else read_prompts(texts, input.files, format), spec)
