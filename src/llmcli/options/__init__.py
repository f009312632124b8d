"""The options that commands share: one declaration each, in groups that are the sections of --help."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llmcli import config, console
from llmcli.errors import UsageError
from llmcli.io.formats import InputFormat
from llmcli.io.output import OutputFormat, OutputSpec
from llmcli.job import Job, LoadOptions
from llmcli.models import generation, registry, store
from llmcli.options import completion

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        autocompletion=completion.models,
        help="Registry alias, folder, .gguf file, or hub id org/name[@revision].",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", metavar="TEMPLATE", help='Prompt made of a record\'s fields: "Classify: {text}".'),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", callback=console.be_verbose, help="Tracebacks and library warnings.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=console.be_quiet, help="Errors only on stderr.")]
Json = Annotated[bool, typer.Option("--json", help="JSON Lines out.")]
Offline = Annotated[bool, typer.Option("--offline", help="No network at all (also HF_HUB_OFFLINE=1).")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Accept pickled weights, which can run code when opened.")
]

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Temperature = Annotated[
    float | None, typer.Option(metavar="X", min=0, help="Sampling temperature; 0 is greedy and exact.")
]
TopP = Annotated[float | None, typer.Option(metavar="X", min=0, max=1, help="Nucleus sampling.")]
TopK = Annotated[int | None, typer.Option(metavar="N", min=0, help="Sample among the k likeliest tokens.")]


@dataclass
class InputOptions:
    """Input"""

    files: Annotated[
        list[str], typer.Option("--file", "-f", metavar="PATH", help="Input file, repeatable; - is stdin.")
    ] = field(default_factory=list)
    lines: Annotated[bool, typer.Option("--lines", help="A record is a line.")] = False
    null: Annotated[bool, typer.Option("--null", help="A record is a NUL-ended text.")] = False
    jsonl: Annotated[bool, typer.Option("--jsonl", help="A record is a JSON object a line; so is a result.")] = False
    csv: Annotated[bool, typer.Option("--csv", help="A record is a row; the first names the fields.")] = False
    fields: Annotated[
        list[str],
        typer.Option("--field", metavar="[ROLE=]NAME", help="Field that holds the text (default: text), repeatable."),
    ] = field(default_factory=list)

    def form(self) -> InputFormat:
        """Raises UsageError where two forms are asked for."""
        chosen = [form for form in InputFormat if getattr(self, form.value, False)]
        if len(chosen) > 1:
            raise UsageError(f"--{chosen[0].value} and --{chosen[1].value} exclude each other")
        return chosen[0] if chosen else InputFormat.WHOLE

    def roles(self, *known: str) -> dict[str, str]:
        """Role -> field name, e.g. {"text": "review"}; the first known role is the default one."""
        roles = {role: role for role in known}
        for item in self.fields:
            role, _, name = item.rpartition("=")
            role = role or known[0]
            if role not in roles:
                raise UsageError(f"--field: unknown role {role!r}", hint=f"roles here: {', '.join(known)}")
            roles[role] = name
        return roles


@dataclass
class OutputOptions:
    """Output"""

    json: Json = False
    output: Annotated[Path | None, typer.Option("--output", metavar="PATH", help="Write to a new file.")] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where --output PATH ends, after a crash or an interruption.")
    ] = False
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Try records that have an error again; with --resume, PATH's too.")
    ] = False
    on_error: Annotated[
        Literal["skip", "stop"], typer.Option("--on-error", help="What a failed record does to the others.")
    ] = "skip"
    stats: Annotated[bool, typer.Option("--stats", help="A summary as JSON on stderr at the end.")] = False
    quiet: Quiet = False
    verbose: Verbose = False

    def target(self, form: InputFormat, texts: Sequence[str] = (), files: Sequence[str] = ()) -> OutputSpec:
        """Given how records are read. `texts` and `files` are the input, for --resume to know it again. Raises
        UsageError."""
        formats = {
            InputFormat.JSONL: OutputFormat.JSON,
            InputFormat.CSV: OutputFormat.CSV,
            InputFormat.LINES: OutputFormat.LINES,
            InputFormat.NULL: OutputFormat.NULL,
        }
        format = OutputFormat.JSON if self.json else formats.get(form, OutputFormat.TEXT)
        resume = None
        if self.resume:
            if not self.output:
                raise UsageError("--resume goes with --output PATH")
            if format is OutputFormat.TEXT:
                raise UsageError(
                    "--resume has to tell records apart", hint="with --json, or a record form like --jsonl"
                )
            from llmcli.io.resume import fingerprint

            resume = fingerprint(list(texts), list(files))
        return OutputSpec(
            format=format,
            path=self.output,
            resume=resume,
            retry=self.retry_errors,
            stop_on_error=self.on_error == "stop",
            stats=self.stats,
        )


@dataclass
class ModelOptions:
    """Model"""

    model: Model = None
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            autocompletion=completion.devices,
            help="auto, cpu, cuda[:N], mps or xpu (also LLMCLI_DEVICE).",
        ),
    ] = None
    dtype: Annotated[config.DType | None, typer.Option(help="Precision of the weights (also LLMCLI_DTYPE).")] = None
    quantize: Annotated[
        Literal["none", "int8", "int4"], typer.Option(help="Weights of fewer bits, on the CPU; made once and kept.")
    ] = "none"
    batch_size: Annotated[
        str, typer.Option(metavar="N|auto", help="Records in one forward pass.", show_default=True)
    ] = "auto"
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Main memory that the weights may take, e.g. 8GB.")
    ] = None
    offload_folder: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Put weights that do not fit in memory on this disk.")
    ] = None
    keep_alive: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Keep it warm in a worker, e.g. 10m; 0: none (also LLMCLI_KEEP_ALIVE)."),
    ] = None
    offline: Offline = False
    allow_pickle: AllowPickle = False
    trust_remote_code: TrustRemoteCode = False

    def name(self, task: str, **languages: str | None) -> str:
        """The model asked for, or the task's default: of several the first that is cached, else the first that can be
        pulled. `languages`, source and target, are part of some names. Raises ModelUnavailable."""
        if self.model is not None:
            return self.model
        return store.choose(registry.default_names(task, **languages), self.load_options())

    def load_options(self) -> LoadOptions:
        """The options laid over the environment and the configuration file."""
        settings = config.settings()
        return LoadOptions(
            device=config.checked_device(self.device or settings.device),
            dtype=self.dtype or settings.dtype,
            quantize=self.quantize,
            max_memory=config.size_in_bytes(self.max_memory) if self.max_memory else None,
            offload_folder=str(self.offload_folder) if self.offload_folder else None,
            offline=self.offline or settings.offline,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )

    def kept(self) -> float | None:
        """Seconds that a worker keeps the model; None where nobody says."""
        duration = self.keep_alive or config.settings().keep_alive
        return config.seconds(duration) if duration else None

    def batch(self) -> int | None:
        """Records a batch, None for auto."""
        if self.batch_size == "auto":
            return None
        if not self.batch_size.isdecimal() or int(self.batch_size) < 1:
            raise UsageError(f"--batch-size takes a number from 1 up, or auto; not {self.batch_size!r}")
        return int(self.batch_size)


@dataclass
class CommonGenerationOptions:
    """Generation"""

    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "--max-tokens",
            metavar="N",
            min=1,
            help="Most tokens to generate (generate: 128, chat: 512; else by the model).",
        ),
    ] = None
    min_new_tokens: Annotated[int | None, typer.Option(metavar="N", min=0, help="Fewest tokens to generate.")] = None
    temperature: Temperature = None
    top_p: TopP = None
    repetition_penalty: Annotated[float | None, typer.Option(metavar="X", help="Above 1 discourages repetition.")] = (
        None
    )
    num_beams: Annotated[int | None, typer.Option(metavar="N", min=1, help="Beam search.")] = None
    num_return_sequences: Annotated[
        int | None, typer.Option("--num-return-sequences", "-n", metavar="N", min=1, help="Answers a record.")
    ] = None
    stop: Annotated[
        list[str], typer.Option(metavar="TEXT", help="Stop before this text, repeatable; it is not printed.")
    ] = field(default_factory=list)
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Repeats a sampled run of the same command.")
    ] = None
    option: Annotated[
        list[str],
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="Any other GenerationConfig field, repeatable."),
    ] = field(default_factory=list)
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut a text that is longer than the model takes.")] = (
        False
    )

    def generation(self) -> dict[str, Any]:
        """The GenerationConfig fields that the user gave, under GenerationConfig's names."""
        given = dataclasses.asdict(self)
        own = ("stop", "seed", "option", "truncate")
        explicit = {name: value for name, value in given.items() if name not in own and value is not None}
        if "" in self.stop:
            raise UsageError("--stop: an empty text is everywhere")
        if self.stop:
            explicit["stop_strings"] = self.stop
        return generation.greedy(explicit | dict(map(key_value, self.option)))


@dataclass
class GenerationOptions(CommonGenerationOptions):
    """Generation"""

    top_k: TopK = None


@dataclass
class ServedModelOptions(ModelOptions):
    """Model"""

    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="A server that speaks the OpenAI protocol runs the model.")
    ] = None
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, help="Requests under way at the server.")] = 16

    def name(self, task: str, **languages: str | None) -> str:
        """As of a model that runs here; or the server's own, if it has but one."""
        if self.model is None and self.endpoint:
            from llmcli.engines.endpoint import only_model

            return only_model(self.endpoint)
        return super().name(task, **languages)

    def job(
        self,
        task: str,
        generation: CommonGenerationOptions,
        parameters: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        **languages: str | None,
    ) -> Job:
        """A job that generates text. `defaults` stand under the options that the user gave."""
        return Job(
            task=task,
            model=self.name(task, **languages),
            generation={**(defaults or {}), **generation.generation()},
            parameters=parameters,
            load_options=self.load_options(),
            batch_size=self.batch(),
            seed=generation.seed,
            truncate=generation.truncate,
            endpoint=self.endpoint,
            concurrency=self.concurrency,
            keep_alive=self.kept(),
        )


def key_value(item: str) -> tuple[str, Any]:
    """`top_k=5` -> ("top_k", 5). Values are read as JSON, else as text."""
    key, equals, text = item.partition("=")
    if not equals:
        hint = f"to write to a file: --output {item}" if re.search(r"[./\\]", item) else None
        raise UsageError(f"-o takes KEY=VALUE, not {item!r}", hint=hint)
    try:
        return key, json.loads(text)
    except json.JSONDecodeError:
        return key, {"True": True, "False": False, "None": None}.get(text, text)
