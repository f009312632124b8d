"""Quantized weights, by bitsandbytes on GPUs and by a method of our own on CPUs; weights packed for oneDNN."""

import inspect
import logging
import re
import sys
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcli import console
from llmcli.compat.torch import cpu_capability, packable_dtypes
from llmcli.compat.transformers import WeightQuantizer, float32_modules, mark_quantized, replace_module
from llmcli.errors import ModelUnavailableError, UsageError
from llmcli.job import LoadOptions
from llmcli.models import loading
from llmcli.models.store import quantized as copies
from llmcli.pipelines.base import TextPipeline
from llmcli.pipelines.linears import Int4Linear, Int8Linear, PackedLinear, QuantizedLinear, WideningLinear

METHOD = "llmcli-weight-only"
LAYERS: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}


@register_quantization_config(METHOD)
class WeightOnlyConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no types
    """The scheme of a model and of each quantized layer, int8 or int4, and the CPU capability of the packed weights."""

    def __init__(self, scheme: str, layers: dict[str, str], processor: str, **_: object) -> None:
        self.quant_method, self.scheme, self.layers, self.processor = METHOD, scheme, layers, processor


@register_quantizer(METHOD)
class WeightOnlyQuantizer(WeightQuantizer):
    def before_loading(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        if config.processor != cpu_capability():
            raise ModelUnavailableError(f"weights are quantized for {config.processor}, this CPU is {cpu_capability()}")
        for name, scheme in config.layers.items():
            replace_module(model, name, LAYERS[scheme](model.get_submodule(name)))

    def after_loading(self, model: PreTrainedModel) -> None:
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.align()


def check_options(folder: Path, load_options: LoadOptions, device: str) -> None:
    """Raise UsageError if a model cannot be quantized on that device as the options say."""
    scheme, dtype = load_options.quantize, load_options.dtype
    if device != "cpu" and not device.startswith("cuda"):
        message = f"--quantize {scheme} requires the CPU or CUDA, and the model would be loaded on {device}"
        raise UsageError(message, hint="pass --device cpu")
    if device != "cpu" and not find_spec("bitsandbytes"):
        hint = "run `pip install 'llmcli[quantize]'`, or pass --device cpu"
        raise UsageError(f"--quantize {scheme} on a GPU requires bitsandbytes, which is not installed", hint)
    if dtype not in ("auto", "bfloat16", *["float16"] * (device != "cpu")):
        raise UsageError(f"--quantize {scheme} requires bfloat16, not --dtype {dtype}", hint="leave --dtype out")
    if load_options.offload_folder:
        raise UsageError("--quantize cannot be used with --offload-folder")
    if getattr(loading.read_config(folder, load_options), "quantization_config", None):
        raise UsageError(f"{folder} is already quantized", hint="leave --quantize out")


def bitsandbytes_config(load_options: LoadOptions, device: str) -> BitsAndBytesConfig:
    """Return how a GPU's weights are quantized while they are loaded."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # It warns when int8 rounds activations to float16.
    if load_options.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = loading.choose_dtype(load_options.dtype, device)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def check_layers(model: PreTrainedModel, folder: Path, scheme: str) -> None:
    """Raise UsageError if no layer of the model has been quantized."""
    if not any(parameter.dtype in (torch.int8, torch.uint8) for parameter in model.parameters()):
        raise UsageError(f"{folder} has no layer that can be {scheme}", hint="leave --quantize out")


def make_copy(folder: Path, load_options: LoadOptions, pipeline_type: type[TextPipeline]) -> Path:
    """Return a directory with the same model, quantized for this CPU; it is made if it does not exist."""
    scheme = load_options.quantize

    def make(target: Path) -> None:
        console.notice(f"quantizing the weights to {scheme}, once")
        # From the weights as they are: rounding to bfloat16 first would lose some of them.
        dtype = str(loading.read_config(folder, load_options).dtype or "float32").removeprefix("torch.")
        model, tokenizer = loading.load(folder, replace(load_options, dtype=dtype), pipeline_type)
        quantize(model, scheme)
        check_layers(model, folder, scheme)
        model.save_pretrained(target)
        if load_options.adapter:
            tokenizer.save_pretrained(target)

    variant = f"{scheme}-{pipeline_type.auto_class}-{cpu_capability()}"
    return copies.get_or_create(folder, variant, make, load_options.adapter)


def quantize(model: PreTrainedModel, scheme: str) -> None:
    """Replace the layers of a loaded model that the kernels can multiply."""
    head, layers = model.get_output_embeddings(), dict[str, str]()
    skipped = float32_modules(model)
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            # From states to logits, int4 costs more perplexity than in all other layers, and is hardly faster.
            layer = "int8" if module is head else scheme
            is_skipped = any(part in skipped for part in name.split(".")) or _reads_weight(model, name)
            if not is_skipped and LAYERS[layer].can_replace(module):
                layers[name] = layer
                replace_module(model, name, LAYERS[layer].from_linear(module))
    model.to(torch.bfloat16)
    mark_quantized(model, WeightOnlyQuantizer(WeightOnlyConfig(scheme, layers, cpu_capability())))


def pack(model: PreTrainedModel) -> None:
    """Pack the layers that oneDNN multiplies faster. Weights that an embedding shares then exist twice."""
    dtypes, head, total = packable_dtypes(), model.get_output_embeddings(), model.num_parameters()
    with torch.no_grad():
        for name in [name for name, _ in model.named_modules()]:  # A list of modules would keep all weights in memory.
            module = model.get_submodule(name)
            if type(module) is not nn.Linear or _reads_weight(model, name):
                continue
            if module.weight.dtype == torch.bfloat16 and torch.bfloat16 not in dtypes:
                module.__class__ = WideningLinear
            # The head of a small model with many tokens is most of it, and twice as large in float32 as in bfloat16.
            is_large = module is head and module.weight.dtype == torch.float32 and 2 * module.weight.numel() > total
            if module.weight.dtype in dtypes and not is_large:
                model.set_submodule(name, PackedLinear(module.weight, module.bias))


def _reads_weight(model: PreTrainedModel, name: str) -> bool:
    """Return whether the model's own code uses the weights of that layer itself, as that of Mamba and RWKV does."""
    parent, _, child = name.rpartition(".")
    return _mentions_weight(type(model.get_submodule(parent)).__module__, child)


@cache
def _mentions_weight(module: str, child: str) -> bool:
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError):  # built in, or compiled
        return False
    # Initialization does not matter: weights are loaded here.
    use = rf"^(?!.*init).*\.{child}\.weight\b(?!\.(?:dtype|device))"
    return bool(re.search(use, source, re.MULTILINE))
