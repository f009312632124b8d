"""A ready folder -> model and tokenizer. The one place that loads models and chooses device and dtype."""

import logging
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

from llmcli import console
from llmcli.errors import LlmcliError, ModelTooLargeError, ModelUnavailableError, UsageError
from llmcli.job import LoadOptions
from llmcli.models import malloc

FLOATS = {"F64", "F32", "F16", "BF16"}  # what dtype applies to; other tensors stay as they are
UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "bytes": 1}


def load(folder: Path, load_options: LoadOptions, head: Any) -> tuple[Any, Any]:
    """A model and its tokenizer. `head`, a pipeline class, says which of transformers' auto classes loads it
    (`auto_class`), and the prefix of weights it can do without (`spare`).

    Raises ModelUnavailable: weights damaged, incomplete, pickled, or too big for the memory there is; UsageError: a
    device that is not here.
    """
    weights = _weights(folder, load_options)
    import torch
    import transformers

    device = choose_device(load_options.device)
    if device == "cpu":
        malloc.keep()
        # Attention reads keys and values that several heads share where they are, and not from copies for each head.
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    dtype = choose_dtype(load_options.dtype, device)
    size = _size(weights, torch.finfo(dtype).bits // 8)
    device_map, max_memory = _device_map(load_options, device, size)
    common = _common(load_options)
    config = read_config(folder, load_options)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **common)
        model, report = getattr(transformers, head.auto_class).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=load_options.offload_folder,
            use_safetensors=not load_options.allow_pickle or weights[0].suffix == ".safetensors",
            output_loading_info=True,
            **common,
        )
    except (LlmcliError, MemoryError):
        raise
    except Exception as exc:
        raise _translated(exc, folder) from exc
    if missing := sorted(key for key in report["missing_keys"] if not (head.spare and key.startswith(head.spare))):
        raise ModelUnavailableError(
            f"{folder}: the weights are incomplete: {missing[0]}" + (" and others are" if missing[1:] else " is")
            + " missing",
            hint="the model is not of the kind that this task takes, or the files are damaged",
        )  # fmt: skip
    if "disk" in list((getattr(model, "hf_device_map", None) or {}).values())[:1]:
        raise ModelUnavailableError(
            "the memory given does not hold the model's first layer", hint="give it more --max-memory"
        )
    model.eval()
    if tokenizer.pad_token_id is None:  # any token will do, where the attention mask hides it
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return model, tokenizer


def tokenizer(folder: Path, load_options: LoadOptions) -> Any:
    """The tokenizer alone. Raises ModelUnavailable."""
    quiet_libraries()
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **_common(load_options))
    except Exception as exc:
        raise _translated(exc, folder) from exc


def read_config(folder: Path, load_options: LoadOptions) -> Any:
    """The model's configuration. Raises ModelUnavailable."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, **_common(load_options))
    except Exception as exc:
        raise _translated(exc, folder) from exc


def quiet_libraries() -> None:
    """Keep transformers and its friends off our stderr, unless -v asks for them. Imports nothing heavy
    that is not needed anyway: call it before the first import of transformers."""
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
    """`auto` is the accelerator that is here, else the CPU. Raises UsageError for one that is not here."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = accelerator.type if accelerator else "cpu"
    if name == "auto":
        return here
    kind, _, index = name.partition(":")
    if kind != "cpu" and (kind != here or (index and int(index) >= torch.accelerator.device_count())):
        raise UsageError(f"there is no device {name} here", hint="`llmcli env` shows what there is")
    return name


def choose_dtype(name: str, device: str) -> Any:
    """`auto`: on an accelerator bfloat16 where it has it, else float16; on a CPU bfloat16 where the
    processor multiplies it in hardware, else float32."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.startswith("xpu"):
        return torch.bfloat16
    if device.startswith("mps"):
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


def _common(load_options: LoadOptions) -> dict[str, Any]:
    return {"trust_remote_code": load_options.trust_remote_code, "local_files_only": True}


def _weights(folder: Path, load_options: LoadOptions) -> list[Path]:
    """The weight files. Raises ModelUnavailable where there are none that may be opened."""
    # Beside model.safetensors, or its shards, may lie the same weights in another layout (consolidated.safetensors).
    if safetensors := sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors")):
        return safetensors
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not pickled:
        raise ModelUnavailableError(f"{folder} holds no weights (*.safetensors)")
    if not load_options.allow_pickle:
        raise ModelUnavailableError(
            f"{folder} has only pickled weights ({pickled[0].name}), which can run code when opened",
            hint="--allow-pickle takes them, if you trust whoever made them",
        )
    return pickled


def _size(weights: list[Path], float_bytes: int) -> int:
    """Bytes that the weights take once loaded, from the files' headers. Raises ModelUnavailable if damaged."""
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
                    total += math.prod(tensor.get_shape()) * width
        except (SafetensorError, OSError) as exc:
            raise _damaged(file, str(exc)) from exc
    return int(total)


def _device_map(load_options: LoadOptions, device: str, size: int) -> tuple[Any, dict[Any, int] | None]:
    """What to tell accelerate. Raises ModelUnavailable where `size` bytes do not fit and may not go to disk."""
    import psutil
    import torch

    memory = load_options.max_memory or psutil.virtual_memory().available
    spread = load_options.device == "auto" and device == "cuda"
    gpus: dict[Any, int] = {}
    if device.startswith("cuda"):
        indices = range(torch.cuda.device_count()) if spread else [torch.device(device).index or 0]
        gpus = {i: torch.cuda.mem_get_info(i)[0] for i in indices}
    if load_options.offload_folder:
        Path(load_options.offload_folder).mkdir(parents=True, exist_ok=True)
        return "auto", {**gpus, "cpu": memory}
    room = sum(gpus.values()) + (0 if gpus and not spread else memory)
    if size > room:
        what = (
            ModelUnavailableError if load_options.max_memory else ModelTooLargeError
        )  # others that make room help only the machine
        raise what(
            f"the model needs {_readable(size)} of memory and {_readable(room)} may be used",
            hint="take a smaller model, --dtype bfloat16, or let it run from disk, slowly: --offload-folder PATH",
        )
    if spread and size > 0.9 * gpus[0]:  # the rest is for activations and the cache of keys and values
        return "auto", None
    return {"": device}, None


def _translated(exc: Exception, folder: Path) -> ModelUnavailableError:
    """transformers' or safetensors' exception as one of ours."""
    text = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
    if type(exc).__name__ == "SafetensorError":
        return _damaged(folder, text)
    if "trust_remote_code" in str(exc):
        return ModelUnavailableError(
            f"{folder} wants to run Python code of its own", hint="--trust-remote-code lets it, if you trust it"
        )
    return ModelUnavailableError(f"{folder} cannot be loaded: {text}", hint="-v shows the whole story")


def _damaged(path: Path, why: str) -> ModelUnavailableError:
    return ModelUnavailableError(
        f"the weights in {path} are damaged: {why}",
        hint="get them again: `llmcli models rm NAME`, then `models pull NAME`; or save your own folder anew",
    )


def _readable(size: int) -> str:
    """1_230_000_000 -> `1.2 GB`."""
    return next(f"{size / unit:.1f} {name}" for name, unit in UNITS.items() if size >= unit or unit == 1)
