"""llmcli qa: answer a question from a text."""

from dataclasses import dataclass
from typing import Annotated

import typer

from llmcli.errors import ExitStatus
from llmcli.io.records import questions
from llmcli.options import CommonGenerationOptions, InputOptions, OutputOptions, Prompt, ServedModelOptions
from llmcli.options.expand import expand_options
from llmcli.run import run
from llmcli.tasks.templates import build_prompt_parameters


@dataclass
class AnswerOptions:
    """Answers cut out of the text (models with a question-answering head)"""

    top_k: Annotated[int | None, typer.Option(metavar="N", min=1, help="How many answers.")] = None
    max_answer_len: Annotated[int | None, typer.Option(metavar="N", min=1, help="Most tokens of an answer.")] = None
    doc_stride: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens that two windows of a long text share.")
    ] = None
    max_seq_len: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens of a window, the question included.")
    ] = None
    allow_no_answer: Annotated[
        bool, typer.Option("--allow-no-answer", help="An empty answer where that is the likeliest.")
    ] = False


@expand_options
def qa(
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", show_default=False)] = None,
    context: Annotated[
        str | None, typer.Option("--context", "-c", metavar="TEXT", help="The text to find the answer in.")
    ] = None,
    prompt: Prompt = None,
    *,
    input: InputOptions,
    answers: AnswerOptions,
    generation: CommonGenerationOptions,
    model: ServedModelOptions,
    output: OutputOptions,
) -> ExitStatus:
    """Answer QUESTION from a text: -c TEXT, all -f files together, or stdin.

    Records (--jsonl, --csv) have a question and a context; QUESTION and -c stand in where they lack one.

    \b
    llmcli qa "Who repaired the clock?" -c "The clock was repaired by an apprentice."
    llmcli qa "How do I undo a commit?" -f manual.txt -f faq.md
    llmcli qa --jsonl -m deepset/roberta-base-squad2 < questions.jsonl
    """
    form = input.form()
    target = output.target(form, [text for text in (question, context) if text is not None], input.files)
    roles = input.roles("question", "context")
    records, documents = questions(question, context, input.files, form, roles, retry=output.retry_errors)
    parameters = {
        "fields": roles,
        "documents": documents,
        "top_k": answers.top_k,
        "max_answer_len": answers.max_answer_len,
        "doc_stride": answers.doc_stride,
        "max_seq_len": answers.max_seq_len,
        "handle_impossible_answer": answers.allow_no_answer or None,
    }
    job = model.job("qa", generation, parameters | build_prompt_parameters(prompt))
    return run(job, records, target)
