"""Texts -> vectors, by an encoder: mean or first-token pooling, of length one. A transformers.Pipeline."""

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from llmcli.models import loading
from llmcli.pipelines import base
from llmcli.pipelines.base import Inputs, Parameters, TextPipeline


class EmbeddingPipeline(TextPipeline):
    """Compute the vector of a text, pooled as the model's sentence-transformers configuration says (default: mean).

    For a batch of B texts, the longest of P tokens, in D dimensions:

    preprocess   input_ids, P of them; cut: tokens that --truncate took away
    _forward     vectors, float32 (B, D), of Euclidean length 1; what preprocess gave, in lists of B
    postprocess  {"embedding": D numbers, "usage"} of one text
    """

    auto_class = "AutoModel"
    ignorable_weight_prefix = "pooler."

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        folder = Path(self.model.name_or_path)
        self.takes_first_token = loading.embedding_pooling(folder) == "cls_token"
        self.context_length = loading.embedding_context_length(folder)

    @staticmethod
    def find_incompatibility(config: PreTrainedConfig) -> str | None:
        return "are not encoders" if getattr(config, "is_encoder_decoder", False) else None

    def _sanitize_parameters(self, truncate: bool = False) -> Parameters:
        return {"truncate": truncate}, {}, {}

    def preprocess(self, text: str, truncate: bool = False) -> Inputs:
        if not truncate:
            base.check_length(text, self.context_length, self.count_tokens)
        inputs = self.tokenize(text, self.context_length, truncate=truncate)
        base.check_tokens(inputs["input_ids"])
        return inputs

    def _forward(self, inputs: Inputs) -> Inputs:
        ids, mask = self.pad(base.as_batch(inputs)["input_ids"])  # on the right: the first token stays in its place
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weights = mask.unsqueeze(-1).float()
        pooled = states[:, 0] if self.takes_first_token else (states * weights).sum(1) / weights.sum(1)
        return {"vectors": torch.nn.functional.normalize(pooled, dim=-1).numpy(force=True), **inputs}

    def postprocess(self, output: Inputs) -> Inputs:
        (vector,) = output["vectors"]
        base.check_finite(vector)
        fields: Inputs = {"embedding": vector.tolist()}
        if output["cut"]:
            fields["truncated"] = output["cut"]
        return {**fields, "usage": {"prompt_tokens": len(output["input_ids"])}}
