"""llmcli summarize: summarize texts of any length."""

from llmcli.errors import ExitStatus
from llmcli.options import ChatModelOptions, GenerationOptions, InputOptions, OutputOptions, Prompt, Texts
from llmcli.options.expand import expand_options
from llmcli.options.structure import StructureOptions
from llmcli.run import run
from llmcli.tasks.fields import build_prompt_parameters


@expand_options
def summarize(
    texts: Texts,
    prompt: Prompt = None,
    *, input: InputOptions, generation: GenerationOptions, structure: StructureOptions, model: ChatModelOptions,
    output: OutputOptions,
) -> ExitStatus:  # fmt: skip
    """Summarize texts of any length.

    A text longer than the context length is summarized in parts. Then the summaries are summarized together.

    \b
    llmcli summarize -f report.txt
    man rsync | llmcli summarize --max-new-tokens 80
    llmcli summarize -m facebook/bart-large-cnn --jsonl --field article < news.jsonl
    """
    parameters = {"fields": input.roles("text")} | build_prompt_parameters(prompt)
    job = model.job("summarize", parameters, generation, fields=structure.job_fields(input, generation))
    return run(job, input.read(texts), output.spec(input, texts))
