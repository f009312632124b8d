"""llmcli score: how likely a model finds a text."""

import math
from dataclasses import replace
from typing import Annotated, Any

import typer

from llmcli import console
from llmcli.errors import ExitStatus, UsageError
from llmcli.io.formats import InputFormat
from llmcli.io.output import OutputFormat, is_terminal, share, to_json
from llmcli.io.records import read, sources
from llmcli.job import Job, Result
from llmcli.options import InputOptions, ModelOptions, OutputOptions
from llmcli.options.expand import expand_options
from llmcli.run import run

TOKENS = "token_logprobs"
BRIEF = 60  # characters of a text that is no line of a file


@expand_options
def score(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT", default_factory=list, show_default=False)],
    condition: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Score the text behind this field's, joined as they are."),
    ] = None,
    max_perplexity: Annotated[
        float | None, typer.Option(metavar="X", min=1, help="Only records whose perplexity is at most this.")
    ] = None,
    min_perplexity: Annotated[
        float | None, typer.Option(metavar="X", min=1, help="Only records whose perplexity is at least this.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens from window to window over a long text (default: half of one)."),
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show how likely each token is.")] = False,
    *,
    input: InputOptions,
    model: ModelOptions,
    output: OutputOptions,
) -> ExitStatus:
    """Print each text's perplexity, and the text. Lower is likelier.

    --json gives all: logprob (natural logarithm), perplexity, bits per byte, tokens. The first token has nothing before
    it and is not scored; what has no other has no perplexity, shown as -, and passes no filter.

    With --max-perplexity or --min-perplexity, text mode prints the texts that pass, and no numbers. Where none does,
    the exit code is 1, as grep's. In bfloat16 a score varies by a few percent with its batch: --dtype float32 is
    exact.

    \b
    llmcli score "The cat sat on the mat." "The cat mat on sat the."
    llmcli score --lines -f corpus.txt | sort -n
    llmcli score --lines --max-perplexity 1000 < corpus.txt > clean.txt
    llmcli score --jsonl --field answer --condition question < pairs.jsonl
    llmcli score --tokens "The cat sat on the moon."
    """
    form, roles = input.form(), input.roles("text")
    target = output.target(form, texts, input.files)
    is_text = target.format not in (OutputFormat.JSON, OutputFormat.CSV)
    filters = max_perplexity is not None or min_perplexity is not None
    if condition is not None and form not in (InputFormat.JSONL, InputFormat.CSV):
        raise UsageError("--condition names a field of the records", hint="which have fields with --jsonl or --csv")
    if tokens and is_text and (form is not InputFormat.WHOLE or filters):
        raise UsageError("--tokens shows whole texts", hint=f"--json gives the tokens of records: {TOKENS}")

    unscored = 0

    def finish(result: Result) -> Result:
        nonlocal unscored
        if result.record.has_error:
            return result
        if result.failure:
            return replace(result, dropped=filters and is_text)
        if tokens:  # an empty text has none
            result = replace(result, output={**result.output, TOKENS: result.output.get(TOKENS, [])})
        perplexity = result.output["perplexity"]
        unscored += filters and perplexity is None
        passes = not filters or (
            perplexity is not None and (min_perplexity or 0) <= perplexity <= (max_perplexity or math.inf)
        )
        text = result.record.fields[roles["text"]]
        if form is InputFormat.WHOLE and not filters:
            text = result.record.file or " ".join(text.split())[:BRIEF]
        if tokens and is_text:
            text = _heat(text, result.output[TOKENS], for_people=is_terminal() and not output.output)
        return replace(result, text=text if filters else f"{_shown(perplexity)}\t{text}", dropped=not passes)

    parameters: dict[str, Any] = {"fields": roles, "condition": condition, "stride": stride, TOKENS: tokens}
    parameters |= {"max_perplexity": max_perplexity, "min_perplexity": min_perplexity}
    job = Job(
        task="score",
        model=model.name("score"),
        parameters=parameters,
        load_options=model.load_options(),
        batch_size=model.batch(),
        keep_alive=model.kept(),
    )
    status = run(job, read(sources(texts, input.files), form), replace(target, finish=finish, filters=filters))
    if unscored:
        console.notice(f"records of fewer than two tokens pass no filter: {unscored}")
    return status


def _heat(text: str, tokens: list[dict[str, Any]], *, for_people: bool) -> str:
    """The tokens, coloured by how likely they are; without colours, a line each behind the text."""
    if not for_people:
        chances = [None if token["logprob"] is None else math.exp(token["logprob"]) for token in tokens]
        rows = zip(map(share, chances), tokens, strict=True)
        return "\n".join([text, *(f"{chance}\t{to_json(token['token'])}" for chance, token in rows)])
    from llmcli.draw import figures

    screen = figures.screen()
    if figures.has_colours(screen):
        return figures.drawn(figures.heat(tokens), screen)
    return f"{text}\n{figures.drawn(figures.likelihoods(tokens, screen.width), screen)}"


def _shown(perplexity: float | None) -> str:
    """With as many digits as mean something."""
    if perplexity is None:
        return "-"
    return f"{perplexity:.{2 if perplexity < 100 else 1 if perplexity < 1000 else 0}f}"
