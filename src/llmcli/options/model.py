"""Options for choosing a model, and for how and where it runs."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from typer import Option

from llmcli import config
from llmcli.errors import UsageError
from llmcli.io.units import parse_duration, parse_shard, parse_size
from llmcli.job import Job, JsonObject, LoadOptions
from llmcli.models import adapters, registry, store
from llmcli.options import completion
from llmcli.options.generation import CommonGenerationOptions, parse_key_value

Model = Annotated[str | None, Option("--model", "-m", metavar="NAME", autocompletion=completion.models,
    help="Model alias, Hub ID (org/name[@revision]), directory or .gguf file.")]  # fmt: skip
Offline = Annotated[bool, Option("--offline", help="Do not download models. [env: HF_HUB_OFFLINE]")]
AllowPickle = Annotated[bool, Option("--allow-pickle", help="Allow pickle weights, which can run code when loaded.")]
TrustRemoteCode = Annotated[bool, Option("--trust-remote-code",
    help="Allow Python code shipped with the model to run.")]  # fmt: skip


@dataclass
class ModelOptions:
    """Model"""

    # fmt: off
    model: Model = None
    adapter: Annotated[str | None, Option(metavar="PATH|ID",
        help="LoRA adapter to merge into the model: directory or Hub ID.")] = None
    device: Annotated[str | None, Option(metavar="DEVICE", autocompletion=completion.devices,
        help="Device: auto, cpu, cuda[:N], mps or xpu. [env: LLMCLI_DEVICE]")] = None
    dtype: Annotated[config.DType | None, Option(help="Data type of the weights. [env: LLMCLI_DTYPE]")] = None
    quantize: Annotated[Literal["none", "int8", "int4"], Option(
        help="Quantize the weights, on a CPU or a CUDA GPU.")] = "none"
    max_memory: Annotated[str | None, Option(metavar="SIZE", help="Maximum RAM for model weights, e.g. 8GB.")] = None
    offload_folder: Annotated[Path | None, Option(metavar="PATH",
        help="Directory for weights that do not fit in memory.")] = None
    keep_alive: Annotated[str | None, Option(metavar="DURATION",
        help="Keep the model loaded in a worker, e.g. 10m; 0 to disable. [env: LLMCLI_KEEP_ALIVE]")] = None
    offline: Offline = False
    allow_pickle: AllowPickle = False
    trust_remote_code: TrustRemoteCode = False
    # fmt: on

    def job(
        self, task: str, parameters: JsonObject, generation: CommonGenerationOptions | None = None, *,
        defaults: JsonObject = MappingProxyType({}), fields: JsonObject = MappingProxyType({}), truncate: bool = False,
        **languages: str | None,
    ) -> Job:  # fmt: skip
        """Return the job that the options describe.

        Args:
            task: Name of a module of `llmcli.tasks`.
            parameters: What the task understands.
            generation: Generation options of a task that generates text.
            defaults: GenerationConfig values under those that the user gave.
            fields: More fields of the job.
            truncate: Whether to truncate long inputs, if there are no generation options.
            languages: Source and target language; the names of some default models contain them.
        """
        keep_alive = self.keep_alive or config.settings().keep_alive
        job = Job(
            task=task,
            model=self.model_name(task.partition("_")[0], **languages),  # inspect_next shares the default of inspect
            generation={**defaults, **(generation.config() if generation else {})},
            parameters=parameters,
            adapter=self.adapter,
            load_options=self.load_options(),
            seed=generation.seed if generation else None,
            truncate=generation.truncate if generation else truncate,
            keep_alive=parse_duration(keep_alive) if keep_alive else None,
            **fields,
        )
        return self._complete(job)

    def _complete(self, job: Job) -> Job:
        return job  # Subclasses add their options.

    def model_name(self, task: str, **languages: str | None) -> str:
        if self.model is not None:
            return self.model
        if self.adapter is not None:
            if self.trust_remote_code or self.allow_pickle:
                raise UsageError("--adapter requires -m with --trust-remote-code and --allow-pickle")
            return adapters.find_base(self.adapter, self.load_options())
        return store.choose(registry.default_names(task, **languages), self.load_options())

    def load_options(self) -> LoadOptions:
        """Return the options, completed from the environment and the configuration file."""
        settings = config.settings()
        return LoadOptions(
            device=config.validate_device(self.device or settings.device), dtype=self.dtype or settings.dtype,
            quantize=self.quantize, max_memory=parse_size(self.max_memory) if self.max_memory else None,
            offload_folder=str(self.offload_folder) if self.offload_folder else None,
            offline=self.offline or settings.offline, allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip


@dataclass
class BatchModelOptions(ModelOptions):
    """Model"""

    batch_size: Annotated[str, Option(metavar="N|auto",
        help="Records per batch, or auto to tune it during the run.")] = "auto"  # fmt: skip
    tensor_parallel: Annotated[bool, Option("--tensor-parallel",
        help="Split each layer among the processes of torchrun.")] = False  # fmt: skip
    shard: Annotated[str | None, Option(metavar="I/N", rich_help_panel="Input",
        help="Run only the records whose number modulo N is I, from 0.")] = None  # fmt: skip

    def load_options(self) -> LoadOptions:
        options = super().load_options()
        if self.tensor_parallel and config.world_size() == 1:
            hint = "start it with torchrun: `torchrun --nproc_per_node 2 -m llmcli ...`"
            raise UsageError("--tensor-parallel requires several processes", hint)
        if self.tensor_parallel and (self.quantize != "none" or self.offload_folder or getattr(self, "endpoint", None)):
            raise UsageError("--tensor-parallel cannot be used with --quantize, --offload-folder or --endpoint")
        return replace(options, tensor_parallel=self.tensor_parallel)

    def _complete(self, job: Job) -> Job:
        job = super()._complete(job)
        if self.shard is not None:
            if config.world_size() > 1:
                raise UsageError("--shard cannot be used with torchrun", hint="it distributes the records itself")
            job = replace(job, shard=parse_shard(self.shard))
        if self.batch_size == "auto":
            return job
        if not self.batch_size.isdecimal() or int(self.batch_size) < 1:
            raise UsageError(f"invalid --batch-size {self.batch_size!r}: expected a positive integer or 'auto'")
        return replace(job, batch_size=int(self.batch_size))


@dataclass
class ServedModelOptions(BatchModelOptions):
    """Model"""

    endpoint: Annotated[list[str], Option(metavar="URL",
        help="URL of an OpenAI-compatible server to use; repeatable.")] = field(default_factory=list)  # fmt: skip
    concurrency: Annotated[int, Option(metavar="N", min=1, help="Maximum concurrent requests to each endpoint.")] = 16

    def _complete(self, job: Job) -> Job:
        job = super()._complete(job)
        return replace(job, endpoint=tuple(dict.fromkeys(self.endpoint)), concurrency=self.concurrency)

    def model_name(self, task: str, **languages: str | None) -> str:
        if self.endpoint and self.adapter:
            hint = "pass the name by which the server knows the adapter: -m NAME"
            raise UsageError("--adapter cannot be used with --endpoint", hint)
        if self.model is None and self.endpoint:
            from llmcli.engines.servers import only_model

            return only_model(self.endpoint)
        return super().model_name(task, **languages)


@dataclass
class ChatModelOptions(ServedModelOptions):
    """Model"""

    think: Annotated[bool | None, Option("--think/--no-think", show_default=False, rich_help_panel="Chat template",
        help="Turn thinking before the answer on or off.")] = None  # fmt: skip
    template_option: Annotated[list[str], Option(metavar="KEY=VALUE", rich_help_panel="Chat template",
        help="Set a variable of the chat template; repeatable.")] = field(default_factory=list)  # fmt: skip

    def _complete(self, job: Job) -> Job:
        options = dict(parse_key_value(item, "--template-option") for item in self.template_option)
        if self.think and (job.constraint or job.schema_field):
            raise UsageError(f"--think cannot be used with --{next(iter(job.constraint or ('schema-field',)))}")
        return replace(super()._complete(job), think=self.think, template_options=options)
