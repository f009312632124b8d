"""What PEFT keeps to itself: the layers of an adapter, and weights that it leaves out without an error."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from llmcli import console
from llmcli.errors import ModelUnavailableError, UsageError

NAME = "default"  # of the adapter in a model


def merge_adapter(model: PreTrainedModel, folder: Path, settings: Mapping[str, object]) -> PreTrainedModel:
    """Merge an adapter into the weights of a model. An adapter that does not fit raises what PEFT raises."""
    if any(type(p) is not nn.Parameter or p.is_meta or p.element_size() < 2 for p in model.parameters()):
        hint = "leave out --tensor-parallel, --offload-folder and, on a GPU, --quantize; or pass another base model"
        raise UsageError("an adapter requires weights that are whole, in memory and not quantized", hint)
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode, config.task_type = True, None  # The classes for tasks differ in how they are called.
    if ignored := sorted(name for name, value in settings.items() if value and not hasattr(config, name)):
        console.warning(f"adapter has settings that this version of PEFT ignores: {', '.join(ignored)}")
    adapted = peft.get_peft_model(model, config, NAME)
    names = getattr(model, "_checkpoint_conversion_mapping", None)  # of older versions of the model's code
    weights = peft.load_peft_weights(str(folder), device="cpu", key_mapping=names)
    result = peft.set_peft_model_state_dict(adapted, weights, NAME)
    missing = [name for name in result.missing_keys if adapted.base_model.prefix in name]
    if unknown := [*result.unexpected_keys, *missing]:
        message = f"adapter {folder} does not fit the model: {unknown[0]} is only in one of them"
        raise ModelUnavailableError(message, hint=f"it was trained on {settings.get('base_model_name_or_path')}")
    _untie(adapted)
    merged = adapted.base_model.merge_and_unload(safe_merge=True)
    layers = merged.get_output_embeddings(), merged.get_input_embeddings()
    if len({id(getattr(layer, "weight", None)) for layer in layers}) > 1:
        merged.config.tie_word_embeddings = False
    return merged.requires_grad_(False).eval()


def _untie(adapted: nn.Module) -> None:
    """Give adapted layers weights of their own. A merge into tied weights would change the other layer too."""
    modules = list(adapted.modules())
    owners = Counter(id(weight) for module in modules for weight in module.parameters(recurse=False))
    for layer in (module.get_base_layer() for module in modules if isinstance(module, BaseTunerLayer)):
        for name, weight in list(layer.named_parameters(recurse=False)):
            if owners[id(weight)] > 1:
                setattr(layer, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
