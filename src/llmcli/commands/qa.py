"""llmcli qa: answer a question from a text."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated

from typer import Argument, Option

from llmcli.errors import ExitStatus, UsageError
from llmcli.io.formats import InputFormat
from llmcli.io.records import add_fields, read_documents, rename_text
from llmcli.job import JsonObject, Record
from llmcli.options import ChatModelOptions, CommonGenerationOptions, InputOptions, OutputOptions, Prompt
from llmcli.options.expand import expand_options
from llmcli.options.structure import StructureOptions
from llmcli.run import run
from llmcli.tasks.fields import build_prompt_parameters, reads_error


@dataclass
class ExtractiveOptions:
    """Extractive QA models"""

    top_k: Annotated[int | None, Option(metavar="N", min=1, help="Number of answers to return.")] = None
    max_answer_len: Annotated[int | None, Option(metavar="N", min=1, help="Maximum answer length in tokens.")] = None
    doc_stride: Annotated[int | None, Option(metavar="N", min=1,
        help="Overlap between context windows, in tokens.")] = None  # fmt: skip
    max_seq_len: Annotated[int | None, Option(metavar="N", min=1,
        help="Window length in tokens, including the question.")] = None  # fmt: skip
    allow_no_answer: Annotated[bool, Option("--allow-no-answer",
        help="Return an empty answer if it scores highest.")] = False  # fmt: skip


@expand_options
def qa(
    question: Annotated[str | None, Argument(metavar="QUESTION", show_default=False)] = None,
    context: Annotated[str | None, Option("--context", "-c", metavar="TEXT",
        help="Text that contains the answer.")] = None,
    prompt: Prompt = None,
    *, input: InputOptions, extractive: ExtractiveOptions, generation: CommonGenerationOptions,
    structure: StructureOptions, model: ChatModelOptions, output: OutputOptions,
) -> ExitStatus:  # fmt: skip
    """Answer a question from a text.

    The text is -c TEXT, all -f files together, or stdin. Records (--jsonl, --csv) have a question and a context;
    QUESTION and -c are used for records that lack them.

    \b
    llmcli qa "Who repaired the clock?" -c "The clock was repaired by an apprentice."
    llmcli qa "How do I undo a commit?" -f manual.txt -f faq.md
    llmcli qa --jsonl -m deepset/roberta-base-squad2 < questions.jsonl
    """
    constraint = structure.job_fields(input, generation)
    format = input.format()
    spec = output.spec(input, [text for text in (question, context) if text is not None])
    roles = input.roles("question", "context")
    given = {roles["question"]: question, roles["context"]: context}
    fields = {name: text for name, text in given.items() if text is not None}
    records: Iterable[Record]
    documents = None
    if question is not None and context is None and format is InputFormat.WHOLE and input.files:
        records, documents = read_documents(input.files, fields)
    else:
        retry = output.retry_errors or reads_error({"fields": roles, "prompt": prompt})
        records = _read_questions(input, fields, roles, retry=retry)
    parameters = {"fields": roles, "documents": documents or None, **asdict(extractive)}
    parameters["handle_impossible_answer"] = parameters.pop("allow_no_answer") or None
    job = model.job("qa", parameters | build_prompt_parameters(prompt), generation, fields=constraint)
    return run(job, records, spec)


def _read_questions(input: InputOptions, fields: JsonObject, roles: dict[str, str], *, retry: bool) -> Iterable[Record]:
    """Return records with a question and a context. `fields` are those that the command line gives."""
    format = input.format()
    if format.has_fields:
        return add_fields(input.read(), fields, retry=retry)
    if len(fields) == 2:
        if input.files or format is not InputFormat.WHOLE:
            raise UsageError("cannot combine QUESTION, -c and input files", hint="drop -c or the files")
        return [Record(fields)]
    if not fields:
        raise UsageError("no question", hint='e.g. llmcli qa "Who wrote it?" -f FILE')
    role = "context" if roles["question"] in fields else "question"
    return rename_text(input.read(), roles[role], fields)
