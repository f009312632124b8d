"""Weight-only quantization as a method of transformers' own: a folder that `save_pretrained` wrote after `quantize`
is one that `from_pretrained` loads. And bfloat16 layers repacked for oneDNN."""

import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcli import console
from llmcli.errors import ModelUnavailableError, UsageError
from llmcli.job import LoadOptions
from llmcli.models import loading
from llmcli.models.store import quantized as copies
from llmcli.pipelines.linears import Int4Linear, Int8Linear, PackedLinear, QuantizedLinear

METHOD = "llmcli-weight-only"
LAYERS: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}


@register_quantization_config(METHOD)
class WeightOnlyConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no types
    """`scheme` is int8 or int4; `layers` the class, by its scheme, of each layer that is quantized, by its name;
    `processor` that of the kernels that the weights are in the order of."""

    def __init__(self, scheme: str, layers: dict[str, str], processor: str, **_: Any) -> None:
        self.quant_method, self.scheme, self.layers, self.processor = METHOD, scheme, layers, processor


@register_quantizer(METHOD)
class WeightOnlyQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers has no types
    """Loads what `quantize` made."""

    is_trainable = False

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config = self.quantization_config
        if config.processor != processor():
            raise ModelUnavailableError(
                f"the quantized weights are for {config.processor}, this processor is {processor()}"
            )
        for name, scheme in config.layers.items():
            _replace(model, name, LAYERS[scheme].blank(model.get_submodule(name)))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.align()


def quantized(folder: Path, load_options: LoadOptions, head: Any) -> Path:
    """A folder with the same model, quantized as `placement` says, made if there is none. Raises UsageError where the
    options or the model do not allow it, and what `loading.load` raises."""
    scheme, device = load_options.quantize, loading.choose_device(load_options.device)
    if device != "cpu":
        raise UsageError(
            f"--quantize {scheme} is for the CPU, and the model would go to {device}",
            hint="--device cpu; or leave it out, and a model that is too big for the GPU: --offload-folder PATH",
        )
    if load_options.dtype not in ("auto", "bfloat16"):
        raise UsageError(
            f"--quantize {scheme} multiplies in bfloat16, not {load_options.dtype}", hint="leave --dtype out"
        )
    if load_options.offload_folder:
        raise UsageError("--quantize and --offload-folder exclude each other")
    about = loading.read_config(folder, load_options)
    if getattr(about, "quantization_config", None):
        raise UsageError(f"{folder} is quantized already", hint="leave --quantize out")

    def make(target: Path) -> None:
        console.notice(f"quantizing the weights to {scheme}, once")
        # from what the weights are, not from what rounding to bfloat16 leaves of them
        dtype = str(about.dtype or "float32").removeprefix("torch.")
        model, _ = loading.load(folder, replace(load_options, dtype=dtype), head)
        if not quantize(model, scheme):
            raise UsageError(f"{folder} has no layer that can be {scheme}", hint="leave --quantize out")
        model.save_pretrained(target)

    return copies.ready(folder, f"{scheme}-{head.auto_class}-{processor()}", make)


def quantize(model: Any, scheme: str) -> bool:
    """Replace the layers of a loaded model that the kernels take; those that the model wants in float32 stay, and all
    else becomes bfloat16. False where there are none to replace.

    Of a language model the last layer, from states to logits, is int8 in any case: int4 there costs more perplexity
    than in all other layers, and is no faster to speak of.
    """
    head = model.get_output_embeddings()
    skipped = HfQuantizer.get_modules_to_not_convert(model, [], model._keep_in_fp32_modules)
    layers: dict[str, str] = {}
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            kind = "int8" if module is head else scheme
            may = not any(part in skipped for part in name.split(".")) and not _reads_weight(model, name)
            if may and LAYERS[kind].takes(module):
                layers[name] = kind
                _replace(model, name, LAYERS[kind].of(module))
    model.to(torch.bfloat16)
    model.config.quantization_config = WeightOnlyConfig(scheme, layers, processor())
    model.hf_quantizer = WeightOnlyQuantizer(model.config.quantization_config)
    return bool(layers)


def processor() -> str:
    """What the order of packed weights depends on."""
    name: str = torch.backends.cpu.get_cpu_capability()
    return name


def pack(model: Any) -> None:
    """Replace the bfloat16 layers of a loaded model by packed ones, where oneDNN has kernels for them. What an
    embedding shares with the last layer is then there twice."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            is_plain = type(module) is nn.Linear and module.weight.dtype == torch.bfloat16
            if is_plain and not _reads_weight(model, name):
                model.set_submodule(name, PackedLinear(module.weight, module.bias))


def _reads_weight(model: Any, name: str) -> bool:
    """Whether the model's own code takes the weights out of that layer, as Mamba's does, to multiply them itself."""
    parent, _, child = name.rpartition(".")
    source = _source(type(model.get_submodule(parent)).__module__)
    return bool(re.search(rf"\bself\.{child}\.weight\b(?!\.(?:dtype|device))", source))


@cache
def _source(module: str) -> str:
    file = getattr(sys.modules[module], "__file__", None)
    return Path(file).read_text(encoding="utf-8") if file and file.endswith(".py") else ""


def _replace(model: Any, name: str, layer: nn.Module) -> None:
    """Put the layer in the model. What it was tied to stays."""
    model.set_submodule(name, layer)
    model.all_tied_weights_keys.pop(f"{name}.weight", None)
