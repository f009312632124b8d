"""States of tokens -> the vector of a text: the modules of sentence-transformers that follow the transformer."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import layer_norm, linear, normalize

from llmcli.errors import ModelUnavailableError
from llmcli.models.encoders import EncoderModule, read_pooling_modes

Features = dict[str, torch.Tensor]  # of B texts: token_embeddings (B, P, D), attention_mask (B, P), ...
Layer = Callable[[Features], None]  # adds sentence_embedding (B, D), or changes it or token_embeddings
POOLING = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def make_layer(module: EncoderModule, device: torch.device) -> Layer:
    """Return what a module does to the features of a batch."""
    if module.type == "Pooling":
        modes = read_pooling_modes(module.config)
        if unknown := [mode for mode in modes if mode not in POOLING]:
            raise ModelUnavailableError(f"{module.folder}: pooling by {unknown[0]} is not supported")
        return partial(_pool, modes, includes_prompt=module.config.get("include_prompt", True))
    source = module.config.get("module_input_name") or "sentence_embedding"
    target = module.config.get("module_output_name") or source
    compute = _make_function(module, device)

    def apply(features: Features) -> None:
        features[target] = compute(features[source])

    return apply


def make_activation(*names: str | None, default: type[nn.Module]) -> nn.Module:
    """Return the activation that the first name names, or the default if there is no name."""
    name = next(filter(None, names), None)
    kind = getattr(nn, name.rpartition(".")[2], None) if name and name.startswith("torch.nn.") else None
    if name and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ModelUnavailableError(f"activation {name}, which is custom code, is not supported")
    return (kind or default)()


def _make_function(module: EncoderModule, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    if module.type == "Normalize":
        return partial(normalize, dim=-1)
    if module.type == "Dropout":  # which only trains
        return nn.Identity()
    if not (file := module.folder / "model.safetensors").is_file():
        hint = "pull the model again, or save it again with sentence-transformers 3 or later"
        raise ModelUnavailableError(f"'{module.folder}' has no model.safetensors", hint)
    weights = {name: tensor.float() for name, tensor in load_file(file, device=str(device)).items()}
    if module.type == "LayerNorm":
        weight = weights["norm.weight"]
        return partial(layer_norm, normalized_shape=weight.shape, weight=weight, bias=weights["norm.bias"])
    activation = make_activation(module.config.get("activation_function"), default=nn.Tanh)
    weight, bias = weights["linear.weight"], weights.get("linear.bias")

    def compute(values: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = activation(linear(values, weight, bias))
        if not module.config.get("use_residual"):
            return output
        return output + (linear(values, weights["residual.weight"]) if "residual.weight" in weights else values)

    return compute


def _pool(modes: Sequence[str], features: Features, *, includes_prompt: bool) -> None:
    mask = features["attention_mask"]
    if not includes_prompt:
        positions = torch.arange(mask.shape[1], device=mask.device)
        mask = mask * (positions >= features["prompt_length"].unsqueeze(1))
    pooled = [_pool_by(mode, features["token_embeddings"], mask) for mode in modes]
    features["sentence_embedding"] = torch.cat(pooled, dim=-1)


def _pool_by(mode: str, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return one vector for each row of states (B, P, D) where the mask (B, P) is 1: (B, D)."""
    if mode in ("cls", "lasttoken"):
        index = mask.argmax(1) if mode == "cls" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return states[torch.arange(len(states), device=states.device), index]
    weights = mask.unsqueeze(-1).float()
    if mode == "max":
        return states.masked_fill(weights == 0, -torch.inf).amax(1)
    if mode == "weightedmean":  # Later tokens count more: in a decoder, they have seen more.
        weights = weights * torch.arange(1, mask.shape[1] + 1, device=mask.device).view(1, -1, 1)
    count = weights.sum(1).clamp(min=1e-9)
    return (states * weights).sum(1) / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)
