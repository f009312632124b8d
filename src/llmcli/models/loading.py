"""A ready directory -> model and tokenizer. Loads models, and chooses device and data type."""

import logging
import math
import os
import re
import tomllib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcli import console
from llmcli.config import world_size
from llmcli.errors import LlmcliError, ModelTooLargeError, ModelUnavailableError, UsageError
from llmcli.job import LoadOptions
from llmcli.models import adapters
from llmcli.models.devices import device_error, is_out_of_memory
from llmcli.models.memory import available_memory, keep_freed_memory

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmcli.pipelines.base import TextPipeline

FLOATS = {"F64", "F32", "F16", "BF16"}  # what dtype applies to; other tensors stay as they are
QUANTIZED_BYTES = {"int8": 1, "int4": 0.5625}  # of a weight with its share of the scale, in bitsandbytes
QUANTIZED_NAME = re.compile(r"(?!.*\bexperts\b).*\.\d+\.")  # of the matrices that it quantizes
HEADROOM = 0.9  # of the free memory for weights; the rest is for activations and the KV cache


def load(
    folder: Path, load_options: LoadOptions, pipeline_type: "type[TextPipeline]",
    quantization: "BitsAndBytesConfig | None" = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":  # fmt: skip
    """Load a model for a pipeline of that class, and its tokenizer. `quantization` applies while it is loaded."""
    weights = _weights(folder, load_options)
    import torch

    from llmcli.compat.transformers import share_keys_and_values, tensor_parallel_settings

    device = choose_device(load_options.device)
    if device == "cpu":
        keep_freed_memory()
        share_keys_and_values()
    dtype = choose_dtype(load_options.dtype, device, load_options.one_stream)
    size = _size(weights, torch.finfo(dtype).bits // 8, QUANTIZED_BYTES[load_options.quantize] if quantization else 0)
    config = read_config(folder, load_options)
    parts = world_size() if load_options.tensor_parallel else 1
    device_map, max_memory = _device_map(load_options, device, size // parts)
    placement: dict[str, Any] = {"device_map": device_map, "max_memory": max_memory}
    if parts > 1 and not (placement := tensor_parallel_settings(config, parts, architectures()["split"])):
        hint = "--tensor-parallel requires a tested architecture whose heads can be divided by the number of processes"
        raise ModelUnavailableError(f"this {config.model_type} model cannot be split among {parts} processes", hint)
    tokenizer = _load_tokenizer(folder, load_options)
    model, report = _from_pretrained(
        pipeline_type.auto_classes.get(config.model_type, pipeline_type.auto_class),
        folder,
        load_options,
        config=config,
        dtype=dtype,
        **placement,
        offload_folder=load_options.offload_folder,
        quantization_config=quantization,
        use_safetensors=not load_options.allow_pickle or weights[0].suffix == ".safetensors",
        output_loading_info=True,
        ignore_mismatched_sizes=load_options.adapter is not None,
        adapter_kwargs={"subfolder": "no-adapter"},  # With peft, transformers would apply an adapter that it finds.
    )
    spare = tuple(filter(None, (*adapters.read_shapes(load_options), pipeline_type.ignorable_weight_prefix)))
    absent = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    if missing := sorted(name for name in absent if not name.startswith(spare)):
        others = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ModelUnavailableError(
            f"weights in {folder} are incomplete: missing {missing[0]}{others}",
            hint="the model is not of the kind that this task requires, or the files are damaged",
        )
    if "disk" in list((getattr(model, "hf_device_map", None) or {}).values())[:1]:
        raise ModelUnavailableError("memory does not hold the first layer of the model", hint="increase --max-memory")
    model = adapters.merge(model, load_options)
    rows = getattr(model.config.get_text_config(), "vocab_size", None) or math.inf
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:  # any token will do, as it is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return model, tokenizer


def tokenizer(folder: Path, load_options: LoadOptions) -> "PreTrainedTokenizerBase":
    quiet_libraries()
    return _load_tokenizer(folder, load_options)


def _load_tokenizer(folder: Path, load_options: LoadOptions) -> "PreTrainedTokenizerBase":
    loaded = _from_pretrained("AutoTokenizer", adapters.tokenizer_folder(folder, load_options), load_options)
    if not isinstance(limit := getattr(loaded, "model_max_length", None), int | float):
        raise ModelUnavailableError(f"{folder}: invalid model_max_length {limit!r} of the tokenizer")
    return loaded


def read_config(folder: Path, load_options: LoadOptions) -> "PreTrainedConfig":
    return adapters.adapt_config(_from_pretrained("AutoConfig", folder, load_options), load_options)


def _from_pretrained(auto_class: str, folder: Path, load_options: LoadOptions, **settings: object) -> Any:
    import transformers

    settings |= {"trust_remote_code": load_options.trust_remote_code, "local_files_only": True}
    with translated_errors(folder):
        return getattr(transformers, auto_class).from_pretrained(folder, **settings)


@contextmanager
def translated_errors(folder: Path) -> Iterator[None]:
    """Turn whatever a library raises at the files of a model into ModelUnavailableError."""
    try:
        yield
    except LlmcliError:
        raise
    except Exception as exc:
        if error := device_error(exc):
            raise error from exc
        if is_out_of_memory(exc):
            raise
        lines = [line.strip() for line in str(exc).splitlines() if line.strip()] or [type(exc).__name__]
        text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        if type(exc).__name__ == "SafetensorError":
            raise _damaged(folder, text) from exc
        message, hint = f"failed to load {folder}: {text}", "rerun with -v for the traceback"
        if "trust_remote_code" in str(exc):
            message, hint = f"{folder} requires custom code", "if you trust it, pass --trust-remote-code"
        elif "instantiate the backend tokenizer" in text:
            message, hint = f"{folder} has no tokenizer that can be read", "expected tokenizer.json beside config.json"
        raise ModelUnavailableError(message, hint=hint) from exc


def quiet_libraries() -> None:
    """Silence transformers and accelerate, unless -v is given. Call it before the first import of transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if console.verbose:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def choose_device(name: str) -> str:
    """Return the device; for `auto` the accelerator, or else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    default = accelerator.type if accelerator else "cpu"
    if name == "auto":
        return default
    kind, _, index = name.partition(":")
    if kind == "cpu":  # cpu:0 too
        return kind
    if kind != default or (index and int(index) >= torch.accelerator.device_count()):
        raise UsageError(f"device {name!r} is not available", hint="run `llmcli env` to list devices")
    return name


def choose_dtype(name: str, device: str, one_stream: bool = False) -> "torch.dtype":
    """Return the data type: for `auto` bfloat16 if the hardware has it; else float16, on a CPU float32.

    A CPU without it multiplies float32 faster, but a single row waits for the memory, which bfloat16 halves.
    """
    import torch

    from llmcli.compat.torch import has_fast_bfloat16

    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.startswith("xpu"):
        return torch.bfloat16
    if device.startswith("mps"):
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    return torch.bfloat16 if has_fast_bfloat16() or one_stream else torch.float32


def _weights(folder: Path, load_options: LoadOptions) -> list[Path]:
    # A directory may also have the same weights in another layout (consolidated.safetensors).
    if safetensors := sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors")):
        return safetensors
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not pickled:
        raise ModelUnavailableError(f"{folder} has no weights (*.safetensors)")
    if not load_options.allow_pickle:
        raise ModelUnavailableError(
            f"{folder} has only pickled weights ({pickled[0].name}), which can run code when opened",
            hint="if you trust whoever made them, pass --allow-pickle",
        )
    return pickled


def _size(weights: list[Path], float_bytes: int, quantized_bytes: float = 0) -> int:
    """Return the bytes that the weights take once loaded, from the files' headers."""
    from safetensors import SafetensorError, safe_open

    total = 0.0
    for file in weights:
        if file.suffix != ".safetensors":
            total += file.stat().st_size
            continue
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # it is no dict
                    tensor = tensors.get_slice(name)
                    kind = tensor.get_dtype()  # F32, BF16, I64, F8_E4M3, BOOL, ...
                    bits = re.search(r"\d+", kind)
                    width = float_bytes if kind in FLOATS else int(bits[0]) / 8 if bits else 1
                    shape = tensor.get_shape()
                    if quantized_bytes and kind in FLOATS and len(shape) == 2 and QUANTIZED_NAME.match(name):
                        width = quantized_bytes
                    total += math.prod(shape) * width
        except (SafetensorError, OSError) as exc:
            raise _damaged(file, str(exc)) from exc
    return int(total)


def _device_map(
    load_options: LoadOptions, device: str, size: int
) -> tuple[str | dict[str, str], dict[int | str, int] | None]:
    """Return device_map and max_memory. Raises ModelUnavailableError if `size` bytes of weights do not fit."""
    import torch

    from llmcli.compat.torch import read_memory

    kind, _, index = device.partition(":")
    memory = load_options.max_memory or available_memory()
    if kind != "cpu" and load_options.quantize != "none":
        memory = 0  # bitsandbytes has no layers in main memory
    spread = load_options.device == "auto" and kind in ("cuda", "xpu") and not index
    free: dict[int | str, int] = {}  # by accelerator
    if kind == "mps":  # Its memory is the main memory.
        free["mps"], memory = min(memory, read_memory(torch.device(device))[2]), 0
    elif kind != "cpu":
        free[int(index or 0)] = read_memory(torch.device(kind, int(index or 0)))[2]
    if spread and size > HEADROOM * free[0]:  # The others stay untouched otherwise: a context takes memory.
        free |= {i: read_memory(torch.device(kind, i))[2] for i in range(1, torch.accelerator.device_count())}
    # transformers leaves headroom itself, but only on a single GPU, and if it is given no limits.
    limits = {place: int(HEADROOM * room) for place, room in free.items()}
    limits["cpu"] = memory if load_options.max_memory else int(HEADROOM * memory)
    if load_options.offload_folder:
        Path(load_options.offload_folder).mkdir(parents=True, exist_ok=True)
        return "auto", limits
    available = sum((limits if spread else free or {"cpu": memory}).values())
    if size > available:
        from rich.filesize import decimal

        # A worker can unload other models to make room, but that does not help against --max-memory.
        error = ModelUnavailableError if load_options.max_memory else ModelTooLargeError
        raise error(
            f"model requires {decimal(size)} of memory, but only {decimal(available)} is available",
            hint="use a smaller model or --dtype bfloat16, or run it from disk, slowly: --offload-folder PATH",
        )
    if not spread or size <= limits[0]:
        return {"": device}, None
    if size > sum(limits[place] for place in free):
        console.warning("model does not fit in GPU memory; a part of it stays in main memory, which is slow")
    return "auto", limits


def _damaged(path: Path, reason: str) -> ModelUnavailableError:
    return ModelUnavailableError(
        f"weights in {path} are damaged: {reason}",
        hint="fetch them again: `llmcli models rm NAME`, then `llmcli models pull NAME`; or save your own model again",
    )


@cache
def architectures() -> dict[str, Any]:
    """Return what architectures.toml says."""
    return tomllib.loads((Path(__file__).parent / "architectures.toml").read_text(encoding="utf-8"))


def max_positions(read: Callable[[str], Any]) -> int | None:
    """Return the number of tokens that a model has positions for, by a function that reads its configuration."""
    kind = read("model_type")
    length = read(architectures()["position_names"].get(kind, "max_position_embeddings"))
    if not length or length <= 0:
        return None
    padding = read("pad_token_id")
    is_offset = kind in architectures()["offset_positions"]
    return int(length - (1 if padding is None else padding) - 1) if is_offset else int(length)
