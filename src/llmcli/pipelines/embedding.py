"""Texts -> vectors, by an encoder: mean or first-token pooling, of length one. A transformers.Pipeline."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmcli.models import sentence_encoder
from llmcli.pipelines import base
from llmcli.pipelines.base import Inputs, Parameters, TextPipeline

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class EmbeddingPipeline(TextPipeline):
    """Compute the vector of a text, pooled as the model's sentence-transformers configuration says (default: mean).

    For a batch of B texts, the longest of P tokens, in D dimensions:

    preprocess   input_ids, P of them; cut: tokens that --truncate took away
    _forward     vectors, float32 (B, D), of Euclidean length 1; what preprocess gave, in lists of B
    postprocess  {"embedding": D numbers, "usage"} of one text
    """

    auto_class = "AutoModel"
    ignorable_weight_prefix = "pooler."  # a head for another task, which many checkpoints lack

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        folder = Path(self.model.name_or_path)
        self.takes_first_token = sentence_encoder.pooling(folder) == "cls_token"
        self.context_length = sentence_encoder.window(folder)

    @staticmethod
    def find_incompatibility(config: "PreTrainedConfig") -> str | None:
        return "are not encoders" if getattr(config, "is_encoder_decoder", False) else None

    def _sanitize_parameters(self, truncate: bool = False) -> Parameters:
        return {"truncate": truncate}, {}, {}

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])

    def preprocess(self, text: str, truncate: bool = False) -> Inputs:
        if not truncate:
            base.check_length(text, self.context_length, self.count_tokens)
        ids = self.tokenizer(text)["input_ids"]
        base.check_tokens(ids)
        length = len(ids)
        if length > self.context_length:
            if not truncate:
                raise base.too_long("text", length, self.context_length)
            # Tokenize again, so that the token that ends every text stays.
            ids = self.tokenizer(text, truncation=True, max_length=self.context_length)["input_ids"]
        return {"input_ids": base.make_row(ids), "cut": length - len(ids)}

    def _forward(self, inputs: Inputs) -> Inputs:
        ids, mask = self.pad(base.as_batch(inputs)["input_ids"], left=self.tokenizer.padding_side == "left")
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
