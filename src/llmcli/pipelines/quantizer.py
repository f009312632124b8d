"""Weight-only quantization as a quantization method of transformers, and bfloat16 layers packed for oneDNN."""

import inspect
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcli import console
from llmcli.compat.torch import can_pack_bfloat16, cpu_capability
from llmcli.compat.transformers import WeightQuantizer, float32_modules, mark_quantized, replace_module
from llmcli.errors import ModelUnavailableError, UsageError
from llmcli.job import LoadOptions
from llmcli.models import loading
from llmcli.models.store import quantized as copies
from llmcli.pipelines.base import TextPipeline
from llmcli.pipelines.linears import Int4Linear, Int8Linear, PackedLinear, QuantizedLinear

METHOD = "llmcli-weight-only"
get_source = cache(inspect.getsource)
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


def quantized(folder: Path, load_options: LoadOptions, pipeline_type: type[TextPipeline]) -> Path:
    """Return a directory with the same model, quantized as the options say; it is made if it does not exist."""
    scheme, device = load_options.quantize, loading.choose_device(load_options.device)
    if device != "cpu":
        raise UsageError(
            f"--quantize {scheme} requires the CPU, and the model would be loaded on {device}",
            hint="pass --device cpu; or, if the model is too large for the GPU, --offload-folder PATH",
        )
    if (dtype := load_options.dtype) not in ("auto", "bfloat16"):
        raise UsageError(f"--quantize {scheme} requires bfloat16, not --dtype {dtype}", hint="leave --dtype out")
    if load_options.offload_folder:
        raise UsageError("--quantize cannot be used with --offload-folder")
    config = loading.read_config(folder, load_options)
    if getattr(config, "quantization_config", None):
        raise UsageError(f"{folder} is already quantized", hint="leave --quantize out")

    def make(target: Path) -> None:
        console.notice(f"quantizing the weights to {scheme}, once")
        # From the weights as they are: rounding to bfloat16 first would lose some of them.
        dtype = str(config.dtype or "float32").removeprefix("torch.")
        model, _ = loading.load(folder, replace(load_options, dtype=dtype), pipeline_type)
        if not quantize(model, scheme):
            raise UsageError(f"{folder} has no layer that can be {scheme}", hint="leave --quantize out")
        model.save_pretrained(target)

    return copies.get_or_create(folder, f"{scheme}-{pipeline_type.auto_class}-{cpu_capability()}", make)


def quantize(model: PreTrainedModel, scheme: str) -> bool:
    """Replace the layers of a loaded model that the kernels can multiply; False if there are none."""
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
    return bool(layers)


def pack(model: PreTrainedModel) -> None:
    """Pack the bfloat16 layers if oneDNN has kernels for it. Weights that an embedding shares then exist twice."""
    if not can_pack_bfloat16():
        return
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            is_plain = type(module) is nn.Linear and module.weight.dtype == torch.bfloat16
            if is_plain and not _reads_weight(model, name):
                model.set_submodule(name, PackedLinear(module.weight, module.bias))


def _reads_weight(model: PreTrainedModel, name: str) -> bool:
    """Return whether the model's own code multiplies by the weights of that layer itself, as Mamba's does."""
    parent, _, child = name.rpartition(".")
    try:
        source = get_source(sys.modules[type(model.get_submodule(parent)).__module__])
    except (OSError, TypeError):  # built in, or compiled
        return False
    return bool(re.search(rf"\bself\.{child}\.weight\b(?!\.(?:dtype|device))", source))
