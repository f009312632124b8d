"""Texts -> how much each token attends to each. A transformers.Pipeline."""

from typing import Any

import torch
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from llmcli.errors import ModelUnavailableError, RecordError, UsageError
from llmcli.pipelines import rows
from llmcli.pipelines.spelling import token_texts

MOST = 512  # tokens: the weights of all heads grow with their square


class AttentionPipeline(rows.RowPipeline, Pipeline):  # type: ignore[misc]  # transformers has no types
    """What the steps hand to each other, for a batch of B texts of T tokens, with a model of L layers of H heads:

    preprocess   input_ids, T of them
    _forward     attentions, float32 (B, L, H, T, T): softmax(QKᵀ/√d), a row for each token that attends
    postprocess  {"tokens": T texts, "attention": T lists of T numbers, "layers": L, "heads": H}; the attention of one
                 `layer` and `head`, from 0, or the mean over those that are not named
    """

    auto_class = "AutoModel"
    spare = "pooler."

    @staticmethod
    def check(config: Any) -> str | None:
        """Why a model of that configuration cannot be used."""
        return "have an encoder and a decoder" if getattr(config, "is_encoder_decoder", False) else None

    def _sanitize_parameters(self, layer: int | None = None, head: int | None = None) -> tuple[Any, Any, Any]:
        return {}, {}, {"layer": layer, "head": head}

    def preprocess(self, text: str, truncate: object = None) -> dict[str, Any]:
        """Raises RecordError for a text that is too long to be looked at."""
        config = self.model.config.get_text_config()
        most = min(MOST, getattr(config, "max_position_embeddings", None) or MOST)
        ids = self.tokenizer(text)["input_ids"]
        if not 0 < len(ids) <= most:
            raise RecordError(
                "context_length_exceeded", f"the text has {len(ids)} tokens: from 1 to {most} can be shown"
            )
        return {"input_ids": rows.row(ids)}

    def _forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        ids, mask = rows.padded(rows.listed(inputs)["input_ids"], self.tokenizer.pad_token_id, self.device)
        usual = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")  # the others never have the weights as a whole
        try:
            output = self.model(input_ids=ids, attention_mask=mask, output_attentions=True)
        finally:
            self.model.set_attn_implementation(usual)
        found = getattr(output, "attentions", None)
        if not found or any(layer is None for layer in found):
            raise ModelUnavailableError(f"{self.model.config.model_type} models do not tell their attention")
        return {"attentions": torch.stack(list(found), 1).float().numpy(force=True), **inputs}

    def postprocess(self, output: dict[str, Any], layer: int | None = None, head: int | None = None) -> dict[str, Any]:
        """The fields of a result. Raises UsageError for a layer or a head that is not there."""
        (weights,) = output["attentions"]
        layers, heads = weights.shape[:2]
        for name, asked, there in (("layer", layer, layers), ("head", head, heads)):
            if asked is not None and asked >= there:
                raise UsageError(f"--{name} {asked}: this model has {there}, from 0 to {there - 1}")
        weights = weights.mean(0) if layer is None else weights[layer]
        weights = weights.mean(0) if head is None else weights[head]
        texts = token_texts(self.tokenizer, output["input_ids"].tolist())
        return {"tokens": texts, "attention": weights.tolist(), "layers": layers, "heads": heads}


PIPELINE_REGISTRY.register_pipeline("llmcli-attention", pipeline_class=AttentionPipeline)
