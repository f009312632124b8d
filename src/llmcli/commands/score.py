"""llmcli score: compute the perplexity of texts."""

import math
from dataclasses import dataclass, replace
from typing import Annotated

from typer import Option

from llmcli import console
from llmcli.errors import ExitStatus, UsageError
from llmcli.io.formats import InputFormat
from llmcli.io.output import HAVE_FIELDS, is_terminal, to_json
from llmcli.io.units import format_probability
from llmcli.job import JsonObject, Result
from llmcli.options import BatchModelOptions, InputOptions, OutputOptions, Texts, expand_options
from llmcli.run import run
from llmcli.text.terminal import sanitize

TOKENS = "token_logprobs"
EXCERPT_CHARACTERS = 60  # of a text that is not a line of a file


@expand_options
def score(
    texts: Texts,
    condition: Annotated[str | None, Option(metavar="FIELD",
        help="Field to use as the prefix that the text is conditioned on.")] = None,
    max_perplexity: Annotated[float | None, Option(metavar="X", min=1,
        help="Keep only records with perplexity <= X.")] = None,
    min_perplexity: Annotated[float | None, Option(metavar="X", min=1,
        help="Keep only records with perplexity >= X.")] = None,
    stride: Annotated[int | None, Option(metavar="N", min=1,
        help="Sliding-window stride in tokens (default: half the context).")] = None,
    tokens: Annotated[bool, Option("--tokens", help="Show the probability of each token.")] = False,
    *, input: InputOptions, model: BatchModelOptions, output: OutputOptions,
) -> ExitStatus:  # fmt: skip
    """Compute the perplexity of texts.

    Lower means more likely. --json adds the log-probability (natural logarithm), bits per byte and the number of
    tokens. The first token has no context and is not scored. A text with fewer than two tokens has no perplexity (shown
    as -) and never passes a filter.

    With --max-perplexity or --min-perplexity, text mode prints the texts that pass, without numbers. If none passes,
    the exit code is 1, as for grep. In bfloat16, a perplexity varies by a few percent with its batch: use --dtype
    float32 for exact results.

    \b
    llmcli score "The cat sat on the mat." "The cat mat on sat the."
    llmcli score --lines -f corpus.txt | sort -n
    llmcli score --lines --max-perplexity 1000 < corpus.txt > clean.txt
    llmcli score --jsonl --field answer --condition question < pairs.jsonl
    llmcli score --tokens "The cat sat on the moon."
    """
    format, roles = input.format(), input.roles("text")
    spec = output.spec(input, texts)
    is_text = spec.format not in HAVE_FIELDS
    finisher = ScoreFinisher(
        field=roles["text"], minimum=min_perplexity, maximum=max_perplexity, is_text=is_text,
        shows_excerpt=format is InputFormat.WHOLE, shows_tokens=tokens,
        for_terminal=is_terminal() and not spec.path,
    )  # fmt: skip
    if condition is not None and not format.has_fields:
        raise UsageError("--condition requires records with fields", hint="use --jsonl, --csv or --parquet")
    if tokens and is_text and (format is not InputFormat.WHOLE or finisher.is_filter):
        raise UsageError("--tokens requires whole texts", hint=f"--json writes the tokens of records in {TOKENS}")
    parameters = {"fields": roles, "condition": condition, "stride": stride, TOKENS: tokens}
    filters = {"max_perplexity": max_perplexity, "min_perplexity": min_perplexity}
    job = model.job("score", parameters | filters)
    records = input.read(texts)
    is_styled = tokens and is_text and finisher.for_terminal
    spec = replace(spec, finish=finisher.finish, is_filter=finisher.is_filter, is_styled=is_styled)
    status = run(job, records, spec)
    if finisher.unscored:
        console.notice(f"records with fewer than two tokens pass no filter: {finisher.unscored}")
    return status


@dataclass
class ScoreFinisher:
    """Filter results by perplexity, and give them their text."""

    field: str
    minimum: float | None
    maximum: float | None
    is_text: bool
    shows_excerpt: bool
    shows_tokens: bool
    for_terminal: bool
    unscored: int = 0  # records without a perplexity that the filter has dropped

    @property
    def is_filter(self) -> bool:
        return self.minimum is not None or self.maximum is not None

    def finish(self, result: Result) -> list[Result]:
        """Return the result with its text; nothing if it does not pass the filter."""
        if result.is_carried_over:
            return [result]
        if result.failure:
            return [] if self.is_filter and self.is_text else [result]
        if self.shows_tokens:  # The result of an empty text has none.
            result = replace(result, output={TOKENS: [], **result.output})
        perplexity = result.output["perplexity"]
        if not self.is_filter:
            digits = 2 if (perplexity or 0) < 100 else 1 if perplexity < 1000 else 0  # those that are significant
            shown = "-" if perplexity is None else f"{perplexity:.{digits}f}"
            return [replace(result, text=f"{shown}\t{self._describe(result)}")]
        self.unscored += perplexity is None
        if perplexity is None or not (self.minimum or 0) <= perplexity <= (self.maximum or math.inf):
            return []
        return [replace(result, text=result.record.fields[self.field])]

    def _describe(self, result: Result) -> str:
        text: str = result.record.fields[self.field]
        if self.shows_excerpt:
            text = result.record.file or " ".join(text.split())[:EXCERPT_CHARACTERS]
        if self.shows_tokens and self.is_text:
            return _format_tokens(text, result.output[TOKENS], for_terminal=self.for_terminal)
        return text


def _format_tokens(text: str, tokens: list[JsonObject], *, for_terminal: bool) -> str:
    """Return the tokens in colors that show how likely they are; outside a terminal, one line per token."""
    if not for_terminal:
        probabilities = [None if token["logprob"] is None else math.exp(token["logprob"]) for token in tokens]
        rows = zip(map(format_probability, probabilities), tokens, strict=True)
        return "\n".join([text, *(f"{probability}\t{to_json(token['token'])}" for probability, token in rows)])
    from llmcli.draw import figures

    screen = figures.terminal()
    if figures.has_colors(screen):
        return figures.render(figures.heat_map(tokens), screen)
    return f"{sanitize(text)}\n{figures.render(figures.probability_table(tokens, screen.width), screen)}"
