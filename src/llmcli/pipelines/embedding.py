"""Texts -> vectors, by an encoder. A transformers.Pipeline."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import linear, normalize
from transformers import PreTrainedConfig

from llmcli.errors import ModelUnavailableError, UsageError
from llmcli.job import JsonObject
from llmcli.models import encoders, loading
from llmcli.pipelines import base
from llmcli.pipelines.base import Inputs, Parameters, TextPipeline

POOLING = {  # modes by their older names, in the order in which their vectors are joined
    "cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean_tokens": "weightedmean", "lasttoken": "lasttoken",
}  # fmt: skip
Features = dict[str, torch.Tensor]  # of B texts: token_embeddings (B, P, D), sentence_embedding (B, D), ...


class EmbeddingPipeline(TextPipeline):
    """Compute the vector of a text, by the modules of sentence-transformers that the model's directory lists.

    For a batch of B texts, the longest of P tokens, in D dimensions:

    preprocess   input_ids, P of them; prompt_length, of these before the text; cut: tokens that --truncate took away
    _forward     vectors, float32 (B, D); what preprocess gave, in lists of B
    postprocess  {"embedding": D numbers, or the first `dimensions` of them, "usage"} of one text

    A text may have a `role` of its own, query or document, for which the model may have a prompt: {"text", "role"}.
    """

    auto_class = "AutoModel"
    auto_classes = dict.fromkeys(("t5", "mt5", "umt5"), "AutoModelForTextEncoding")  # without the decoder
    ignorable_weight_prefix = "pooler."

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self._encoder = encoders.Encoder(Path(self.model.name_or_path))
        self.context_length = self._encoder.context_length
        self._modules = [
            (kind, config, _load_weights(folder, str(self.device)) if kind == "Dense" else {})
            for kind, config, folder in self._encoder.modules
        ]
        self._normalizes = any(name == "Normalize" for name, _, _ in self._encoder.modules)
        self._prompt_lengths = {role: self._count_prompt_tokens(role) for role in self._encoder.prompts}
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        for prompt in self._encoder.prompts.values():  # Names of special tokens would be read as text.
            if any(token.special and token.content in prompt for token in added):
                raise ModelUnavailableError(f"{self.model.name_or_path}: prompt {prompt!r} has a special token")

    @classmethod
    def find_incompatibility(cls, config: PreTrainedConfig) -> str | None:
        has_decoder = getattr(config, "is_encoder_decoder", False) and config.model_type not in cls.auto_classes
        return "are not encoders" if has_decoder else None

    def _sanitize_parameters(
        self, role: str | None = None, dimensions: int | None = None, normalize: bool = False
    ) -> Parameters:
        return {"role": role}, {}, {"dimensions": dimensions, "normalize": normalize}

    def preprocess(self, inputs: str | Mapping[str, str], truncate: bool = False, role: str | None = None) -> Inputs:
        text, role = (inputs, role) if isinstance(inputs, str) else (inputs["text"], inputs["role"])
        text = self._encoder.add_prompt(text, role)
        if not truncate:
            base.check_length(text, self.context_length, self.count_tokens)
        row = self.tokenize(text, self.context_length, truncate=truncate)
        base.check_tokens(row["input_ids"])
        return {**row, "prompt_length": self._prompt_lengths[role]}

    def _count_prompt_tokens(self, role: str | None) -> int:
        """Return the tokens of a prompt, without those that end every text."""
        prompt = self._encoder.add_prompt("", role)
        ids = self.tokenizer(prompt)["input_ids"] if prompt else []
        return len(ids) - sum(id in self.tokenizer.all_special_ids for id in ids[-1:])

    def _forward(self, inputs: Inputs) -> Inputs:
        batch = base.as_batch(inputs)
        ids, mask = self.pad(batch["input_ids"])  # on the right: a decoder's tokens do not see what follows them
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        lengths = torch.tensor(batch["prompt_length"], device=self.device)
        features = {"token_embeddings": states, "attention_mask": mask, "prompt_length": lengths}
        with loading.translated_errors(Path(self.model.name_or_path)):
            for module in self._modules:
                _run_module(features, *module)
        return {"vectors": features["sentence_embedding"].numpy(force=True), **inputs}

    def postprocess(self, output: Inputs, dimensions: int | None = None, normalize: bool = False) -> Inputs:
        (vector,) = output["vectors"]
        base.check_finite(vector)
        if dimensions and dimensions > len(vector):
            raise UsageError(f"--dimensions {dimensions} exceeds the {len(vector)} dimensions of the model's vectors")
        vector = vector[: dimensions or self._encoder.dimensions]
        if normalize or (dimensions and self._normalizes):
            vector = vector / max(np.linalg.norm(vector), 1e-12)
        fields: Inputs = {"embedding": vector.tolist()}
        if output["cut"]:
            fields["truncated"] = output["cut"]
        return {**fields, "usage": {"prompt_tokens": len(output["input_ids"])}}


def make_activation(*names: str | None, default: type[nn.Module]) -> nn.Module:
    """Return the activation that the first name names, or the default if there is no name."""
    name = next(filter(None, names), None)
    kind = getattr(nn, name.rpartition(".")[2], None) if name and name.startswith("torch.nn.") else None
    if name and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ModelUnavailableError(f"activation {name}, which is custom code, is not supported")
    return (kind or default)()


def _load_weights(folder: Path, device: str) -> Features:
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors", device).items()}


def _run_module(features: Features, kind: str, config: JsonObject, weights: Features) -> None:
    """Change the features of a batch as a module of sentence-transformers does."""
    source = config.get("module_input_name") or "sentence_embedding"
    target = config.get("module_output_name") or source
    if kind == "Pooling":
        features["sentence_embedding"] = _pool(features, config)
    elif kind == "Normalize":
        features[target] = normalize(features[source], dim=-1)
    elif kind == "Dense":
        values, activation = features[source], make_activation(config.get("activation_function"), default=nn.Tanh)
        features[target] = activation(linear(values, weights["linear.weight"], weights.get("linear.bias")))
        if config.get("use_residual"):
            projection = weights.get("residual.weight")
            features[target] += values if projection is None else linear(values, projection)


def _pool(features: Features, config: JsonObject) -> torch.Tensor:
    """Return the vectors of texts (B, D), or several of each joined."""
    states, mask = features["token_embeddings"], features["attention_mask"]
    if not config.get("include_prompt", True):
        mask = mask * (torch.arange(mask.shape[1], device=mask.device) >= features["prompt_length"].unsqueeze(1))
    modes = config.get("pooling_mode") or [POOLING[name] for name in POOLING if config.get(f"pooling_mode_{name}")]
    modes = [modes] if isinstance(modes, str) else modes or ["mean"]
    return torch.cat([_pool_by(mode, states, mask) for mode in modes], dim=-1)


def _pool_by(mode: str, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return one vector for each row of states (B, P, D) where the mask (B, P) is 1: (B, D)."""
    weights = mask.unsqueeze(-1).float()
    match mode:
        case "cls" | "lasttoken":
            index = mask.argmax(1) if mode == "cls" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
            return states[torch.arange(len(states), device=states.device), index]
        case "max":
            return states.masked_fill(weights == 0, -torch.inf).amax(1)
        case "weightedmean":  # Later tokens count more: in a decoder, they have seen more.
            weights = weights * torch.arange(1, mask.shape[1] + 1, device=mask.device).view(1, -1, 1)
        case "mean_sqrt_len_tokens":
            return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9).sqrt()
        case mode if mode != "mean":
            raise ModelUnavailableError(f"pooling by {mode} is not supported")
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
