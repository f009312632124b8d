"""Texts -> how much each token attends to each. Two transformers.Pipelines."""

import torch
from transformers import PreTrainedConfig

from llmcli.compat.transformers import eager_attention
from llmcli.errors import ModelUnavailableError, RecordError, UsageError
from llmcli.pipelines import base
from llmcli.pipelines.base import CausalTextPipeline, Inputs, Parameters, TextPipeline, as_batch, check_finite, make_row
from llmcli.pipelines.spelling import token_texts

MAX_TOKENS = 512  # The weights of all heads grow with the square of the length.


class AttentionPipeline(TextPipeline):
    """Compute attention weights, with the base model of any encoder or decoder.

    For a batch of B texts of T tokens, with a model of L layers of H heads:

    preprocess   input_ids, T of them
    _forward     attentions, float32 (B, L, H, T, T): softmax(QKᵀ/√d), a row for each token that attends
    postprocess  {"tokens": T texts, "attention": T lists of T numbers, "layers": L, "heads": H}; the attention of one
                 `layer` and `head`, from 0, or the mean over those that are not named
    """

    auto_class = "AutoModel"
    ignorable_weight_prefix = "pooler."

    @staticmethod
    def find_incompatibility(config: PreTrainedConfig) -> str | None:
        return "have an encoder and a decoder" if getattr(config, "is_encoder_decoder", False) else None

    def _sanitize_parameters(self, layer: int | None = None, head: int | None = None) -> Parameters:
        return {}, {}, {"layer": layer, "head": head}

    def preprocess(self, text: str, truncate: object = None) -> Inputs:
        maximum = min(MAX_TOKENS, base.position_limit(self.model.config) or MAX_TOKENS)
        ids = self.tokenizer(text)["input_ids"]
        if not 0 < len(ids) <= maximum:
            raise RecordError("context_length_exceeded", f"text has {len(ids)} tokens, expected 1 to {maximum}")
        return {"input_ids": make_row(ids)}

    def _forward(self, inputs: Inputs) -> Inputs:
        ids, mask = self.pad(as_batch(inputs)["input_ids"])
        with eager_attention(self.model):
            output = self.model(input_ids=ids, attention_mask=mask, output_attentions=True)
        attentions = getattr(output, "attentions", None)
        if not attentions or any(layer is None for layer in attentions):
            raise ModelUnavailableError(f"{self.model.config.model_type} models do not return attention weights")
        return {"attentions": torch.stack(list(attentions), 1).float().numpy(force=True), **inputs}

    def postprocess(self, output: Inputs, layer: int | None = None, head: int | None = None) -> Inputs:
        (weights,) = output["attentions"]
        layers, heads = weights.shape[:2]
        for name, index, count in (("layer", layer, layers), ("head", head, heads)):
            if index is not None and index >= count:
                raise UsageError(f"invalid --{name} {index}: this model has {count}, from 0 to {count - 1}")
        weights = weights.mean(0) if layer is None else weights[layer]
        weights = weights.mean(0) if head is None else weights[head]
        check_finite(weights)
        texts = token_texts(self.tokenizer, output["input_ids"].tolist())
        return {"tokens": texts, "attention": weights.tolist(), "layers": layers, "heads": heads}


class CausalAttentionPipeline(AttentionPipeline):
    """The same on the weights that a causal model generates with, which a worker may have loaded."""

    auto_class = CausalTextPipeline.auto_class
    find_incompatibility = staticmethod(CausalTextPipeline.find_incompatibility)
