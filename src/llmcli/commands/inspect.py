"""llmcli inspect: see inside a model: its tokens, its next token, its attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcli import config, console, engines
from llmcli.engines.model import suspended_garbage_collection
from llmcli.errors import LlmcliError, UsageError
from llmcli.io.formats import InputFormat
from llmcli.io.output import is_terminal, print_lines, save, share, to_json
from llmcli.io.records import argument, read, sources, warn_if_likely_mistake
from llmcli.job import Job, LoadOptions, Record
from llmcli.models import generation, loading, registry, store
from llmcli.options import (
    AllowPickle,
    Json,
    ModelOptions,
    Offline,
    Quiet,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    Verbose,
    completion,
)
from llmcli.options.expand import Command, expand_options
from llmcli.pipelines.spelling import tokens_of

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(help="See inside a model: tokens, next, attention.", no_args_is_help=True, rich_markup_mode=None)
Text = Annotated[str | None, typer.Argument(metavar="TEXT", show_default=False)]
File = Annotated[str | None, typer.Option("--file", "-f", metavar="PATH", help="The text is in this file; - is stdin.")]
WIDE = 100  # columns of a picture that could have any width


@dataclass
class PictureOptions:
    """Output"""

    json: Json = False
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw it into a file, NAME.svg.")] = None
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Draw it into a page, NAME.html.")] = None
    quiet: Quiet = False
    verbose: Verbose = False

    def __post_init__(self) -> None:
        self.files = {kind: path for kind, path in (("svg", self.svg), ("html", self.html)) if path}
        for kind, path in self.files.items():
            if path.suffix != f".{kind}":  # what is there under that name is replaced: let it be a picture
                raise UsageError(f"--{kind} {path}: a picture's name ends in .{kind}")

    def put(
        self,
        objects: Sequence[Any],
        rows: Sequence[Sequence[str]],
        draw: Callable[[int | None, bool], "RenderableType"],
        title: str,
    ) -> None:
        """`draw(columns, in_colours)` into files or on a terminal; elsewhere `rows` of tab-separated values, or the
        `objects` as JSON Lines. Raises UsageError for a file that cannot be written."""
        for kind, path in self.files.items():
            from llmcli.draw import svg

            save(path, getattr(svg, kind)(draw(None, True), title))
            console.notice(f"{path} is drawn")
        if self.json:
            print_lines(map(to_json, objects))
        elif self.files:
            return
        elif is_terminal():
            from llmcli.draw import figures

            screen = figures.screen()
            print_lines([figures.drawn(draw(screen.width, figures.has_colours(screen)), screen)])
        else:
            print_lines("\t".join(row) for row in rows)


@dataclass
class TokenizerOptions:
    """Model"""

    models: Annotated[
        list[str],
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            autocompletion=completion.models,
            help="Alias, folder, .gguf file or hub id; repeatable.",
        ),
    ] = field(default_factory=list)
    offline: Offline = False
    allow_pickle: AllowPickle = False
    trust_remote_code: TrustRemoteCode = False

    def load_options(self) -> LoadOptions:
        """What of it a tokenizer needs."""
        return LoadOptions(
            offline=self.offline or config.settings().offline,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )


@app.command(cls=Command)
@expand_options
def tokens(text: Text = None, file: File = None, *, model: TokenizerOptions, output: PictureOptions) -> None:
    """Show a text's tokens: pieces, ids, special ones. -m again sets models side by side.

    \b
    llmcli inspect tokens "Antidisestablishmentarianism"
    llmcli inspect tokens "你好，世界" -m smollm2 -m gemma3-270m
    """
    text, load_options = _given(text, file), model.load_options()
    found = {}
    for name in model.models or [store.choose(registry.default_names("inspect"), load_options)]:
        spec = registry.resolve(name)
        folder = store.pull(spec, offline=load_options.offline, allow_pickle=load_options.allow_pickle)
        with suspended_garbage_collection():
            tokenizer = loading.tokenizer(folder, load_options)
        found[name] = tokens_of(tokenizer, text)

    def draw(width: int | None, in_colours: bool) -> "RenderableType":
        from llmcli.draw import figures

        return figures.pieces(found, width or len(found) * WIDE)

    rows = [
        (name, str(i), str(token["id"]), to_json(token["token"]))
        for name, tokens in found.items()
        for i, token in enumerate(tokens)
    ]
    objects = [{"text": text, "tokens": tokens, "model": name} for name, tokens in found.items()]
    output.put(objects, rows, draw, f"Tokens of {text!r}")


@app.command("next", cls=Command)
@expand_options
def next_token(
    text: Text = None,
    file: File = None,
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", min=1, help="How many tokens to show.")] = 10,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    *,
    model: ModelOptions,
    output: PictureOptions,
) -> None:
    """Show which tokens may follow a text: as the model has them, and as they are drawn.

    \b
    llmcli inspect next "The capital of France is"
    llmcli inspect next "Once upon a" --temperature 2 --limit 20
    """
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    asked = generation.greedy({name: value for name, value in given.items() if value is not None})
    text = _given(text, file)
    # What follows a text is told by its end: one that is too long loses its beginning.
    found = _asked(_job("inspect_next", model, {"limit": limit}, generation=asked, truncate=True), text)
    tokens, how = found["next"], ", ".join(f"{name} {value:g}" for name, value in found["sampling"].items())

    def draw(width: int | None, in_colours: bool) -> "RenderableType":
        from llmcli.draw import figures

        picture = figures.chances(tokens, how, width or WIDE)
        return picture if width else figures.titled(f"{found['model']}, after {text!r}", picture)

    rows = [
        (share(token["probability"]), share(token["sampling_probability"]), to_json(token["token"])) for token in tokens
    ]
    output.put([found], rows, draw, f"What follows {text!r}")


@app.command(cls=Command)
@expand_options
def attention(
    text: Text = None,
    file: File = None,
    layer: Annotated[int | None, typer.Option(metavar="N", min=0, help="One layer, from 0; else the mean.")] = None,
    head: Annotated[int | None, typer.Option(metavar="N", min=0, help="One head, from 0; else the mean.")] = None,
    *,
    model: ModelOptions,
    output: PictureOptions,
) -> None:
    """Show how much each token of a text attends to each.

    The weights are softmax(QKᵀ/√d); a row for each token that attends, a column for each that is attended to.

    \b
    llmcli inspect attention "The cat sat on the mat because it was tired"
    llmcli inspect attention "She gave him her book" --layer 1 --head 2 --svg attention.svg
    """
    text = _given(text, file)
    found = _asked(_job("inspect_attention", model, {"layer": layer, "head": head}), text)
    tokens, weights = found["tokens"], found["attention"]
    of_layers = f"mean of {found['layers']} layers" if layer is None else f"layer {layer}"
    of = f"{of_layers}, " + (f"mean of {found['heads']} heads" if head is None else f"head {head}")

    def draw(width: int | None, in_colours: bool) -> "RenderableType":
        from llmcli.draw import figures

        count = figures.fitting(tokens, width) if width else len(tokens)
        if count < len(tokens):
            console.notice(f"the screen holds the first {count} of {len(tokens)} tokens: --svg NAME.svg draws all")
        some = [row[:count] for row in weights[:count]]
        picture = figures.matrix(tokens[:count], some, of, colours=in_colours)
        return picture if width else figures.titled(found["model"], picture)

    rows = [(to_json(token), *map(share, row)) for token, row in zip(tokens, weights, strict=True)]
    output.put([found], rows, draw, f"Attention in {text!r}")


def _given(text: str | None, file: str | None) -> str:
    """TEXT as it is, or what the file or stdin says. Raises UsageError where there is nothing, or too much; LlmcliError
    for what is no text."""
    if text is not None and file is not None:
        raise UsageError("TEXT and -f exclude each other")
    if text is not None:
        warn_if_likely_mistake([text])
        return argument(text)
    (record,) = read(sources([], [] if file is None else [file]), InputFormat.WHOLE)
    if record.failure:
        raise LlmcliError(record.failure.message)
    found: str = record.fields["text"]
    return found


def _job(task: str, model: ModelOptions, parameters: dict[str, Any], **more: Any) -> Job:
    return Job(
        task=task,
        model=model.name("inspect"),
        parameters=parameters,
        load_options=model.load_options(),
        keep_alive=model.kept(),
        **more,
    )


def _asked(job: Job, text: str) -> dict[str, Any]:
    """What becomes of that text. Raises LlmcliError."""
    (result,) = engines.of(job).run(job, [Record({"text": text})])
    if result.failure:
        raise LlmcliError(result.failure.message)
    if cut := result.output.get("truncated"):
        console.notice(f"the text is longer than the model takes: {cut} tokens of its beginning are left out")
    return {"text": text, **result.output, "model": job.model}
