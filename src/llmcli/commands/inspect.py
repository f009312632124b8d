"""llmcli inspect: inspect the tokens, the next-token probabilities and the attention of a model."""

from dataclasses import dataclass, field
from typing import Annotated

from typer import Argument, Option, Typer

from llmcli import config, console, engines
from llmcli.engines.local import suspended_garbage_collection
from llmcli.errors import LlmcliError, UsageError
from llmcli.io.formats import InputFormat
from llmcli.io.output import to_json
from llmcli.io.records import open_inputs, read_records, warn_if_likely_mistake
from llmcli.io.units import format_probability
from llmcli.job import Job, JsonObject, LoadOptions, Record
from llmcli.models import adapters, generation, loading, registry, store
from llmcli.options import FigureOptions, ModelOptions, completion, expand_options
from llmcli.options.expand import Command
from llmcli.options.generation import Temperature, TopK, TopP
from llmcli.options.model import AllowPickle, Offline, TrustRemoteCode
from llmcli.pipelines.spelling import tokens_of

app = Typer(help="Inspect tokens, probabilities and attention.", no_args_is_help=True, rich_markup_mode=None)
Text = Annotated[str | None, Argument(metavar="TEXT", show_default=False)]
File = Annotated[str | None, Option("--file", "-f", metavar="PATH", help="Read TEXT from PATH; use - for stdin.")]


@dataclass
class TokenizerOptions:
    """Model"""

    models: Annotated[list[str], Option("--model", "-m", metavar="NAME", autocompletion=completion.models,
        help="Model alias, Hub ID, directory or .gguf file; repeatable.")] = field(default_factory=list)  # fmt: skip
    offline: Offline = False
    allow_pickle: AllowPickle = False
    trust_remote_code: TrustRemoteCode = False

    def load_options(self) -> LoadOptions:
        is_offline = self.offline or config.settings().offline
        return LoadOptions(offline=is_offline, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)


@app.command(cls=Command)
@expand_options
def tokens(text: Text = None, file: File = None, *, model: TokenizerOptions, output: FigureOptions) -> None:
    """Show how a text is split into tokens.

    Repeat -m to compare models side by side.

    \b
    llmcli inspect tokens "Antidisestablishmentarianism"
    llmcli inspect tokens "你好，世界" -m smollm2 -m gemma3-270m
    """
    text, options = _read_text(text, file), model.load_options()
    tokens = {}
    rows: list[tuple[str, ...]] = []
    for name in model.models or [store.choose(registry.default_names("inspect"), options)]:
        folder, found = adapters.find_weights(name, None, options)
        with suspended_garbage_collection():
            tokenizer = loading.tokenizer(folder, found)
        tokens[name] = tokens_of(tokenizer, text)
        rows += [(name, str(i), str(token["id"]), to_json(token["token"])) for i, token in enumerate(tokens[name])]
    objects = [{"text": text, "tokens": of_model, "model": name} for name, of_model in tokens.items()]
    output.show(lambda figures, width, _: figures.draw_tokens(tokens, width), objects, rows, f"Tokens of {text!r}")


@app.command("next", cls=Command)
@expand_options
def next_token(
    text: Text = None,
    file: File = None,
    limit: Annotated[int, Option("--limit", "-n", metavar="N", min=1, help="Number of tokens to show.")] = 10,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    *, model: ModelOptions, output: FigureOptions,
) -> None:  # fmt: skip
    """Show the most likely next tokens.

    The figure has the probabilities of the model, and those after temperature, top-p and top-k. A text longer than the
    context length loses its beginning.

    \b
    llmcli inspect next "The capital of France is"
    llmcli inspect next "Once upon a" --temperature 2 --limit 20
    """
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling = generation.greedy({name: value for name, value in options.items() if value is not None})
    text = _read_text(text, file)
    record = _run(model.job("inspect_next", {"limit": limit}, defaults=sampling, truncate=True), text)
    names = ("probability", "sampling_probability")
    rows = [(*(format_probability(token[key]) for key in names), to_json(token["token"])) for token in record["next"]]
    title = f"Next tokens after {text!r}"
    output.show(lambda figures, width, _: figures.draw_next_tokens(record, width), [record], rows, title)


@app.command(cls=Command)
@expand_options
def attention(
    text: Text = None,
    file: File = None,
    layer: Annotated[int | None, Option(metavar="N", min=0,
        help="Layer index, from 0 (default: mean over layers).")] = None,
    head: Annotated[int | None, Option(metavar="N", min=0,
        help="Head index, from 0 (default: mean over heads).")] = None,
    *, model: ModelOptions, output: FigureOptions,
) -> None:  # fmt: skip
    """Show the attention weights of a text.

    The weights are softmax(QKᵀ/√d). Each row is a token that attends (query); each column is a token that is attended
    to (key).

    \b
    llmcli inspect attention "The cat sat on the mat because it was tired"
    llmcli inspect attention "She gave him her book" --layer 1 --head 2 --svg attention.svg
    """
    text = _read_text(text, file)
    record = _run(model.job("inspect_attention", {"layer": layer, "head": head}), text)
    layers = f"mean of {record['layers']} layers" if layer is None else f"layer {layer}"
    heads = f"mean of {record['heads']} heads" if head is None else f"head {head}"
    weights = zip(record["tokens"], record["attention"], strict=True)
    rows = [(to_json(token), *map(format_probability, row)) for token, row in weights]
    output.show(
        lambda figures, width, has_colors: figures.draw_attention(record, f"{layers}, {heads}", width, has_colors),
        [record], rows, f"Attention in {text!r}",
    )  # fmt: skip


def _read_text(text: str | None, file: str | None) -> str:
    if text is not None and file is not None:
        raise UsageError("TEXT cannot be used with -f")
    if text is not None:
        warn_if_likely_mistake([text])
        return text
    (record,) = read_records(open_inputs([], [] if file is None else [file]), InputFormat.WHOLE)
    if record.failure:
        raise LlmcliError(record.failure.message)
    return str(record.fields["text"])


def _run(job: Job, text: str) -> JsonObject:
    (result,) = engines.engine_for(job).run(job, [Record({"text": text})])
    if result.failure:
        raise LlmcliError(result.failure.message)
    if count := result.output.get("truncated"):
        console.warning(f"truncated by {count} tokens at the beginning")
    return {"text": text, **result.output, "model": job.model}
