"""Texts -> vectors, by an encoder: mean or first-token pooling, of length one. A transformers.Pipeline."""

from pathlib import Path
from typing import Any

import torch
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from llmcli.errors import RecordError
from llmcli.models import sentence_encoder
from llmcli.pipelines import lengths, rows


class EmbeddingPipeline(rows.RowPipeline, Pipeline):  # type: ignore[misc]  # transformers has no types
    """What the steps hand to each other, for a batch of B texts, the longest of P tokens, in D dimensions:

    preprocess   input_ids, P of them; cut: tokens that --truncate took away
    _forward     vectors, float32 (B, D), of Euclidean length 1; what preprocess gave, in lists of B
    postprocess  {"embedding": D numbers, "usage"} of one text

    The pooling is what the model's sentence-transformers configuration says, the mean where it says nothing.
    """

    auto_class = "AutoModel"
    spare = "pooler."  # a head for another task, that many checkpoints lack

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        folder = Path(self.model.name_or_path)
        self.takes_first_token = sentence_encoder.pooling(folder) == "cls_token"
        self.context_length = sentence_encoder.window(folder)

    @staticmethod
    def check(config: Any) -> str | None:
        """Why a model of that configuration cannot be used."""
        return "are no encoders" if getattr(config, "is_encoder_decoder", False) else None

    def _sanitize_parameters(self, truncate: bool = False) -> tuple[Any, Any, Any]:
        return {"truncate": truncate}, {}, {}

    def preprocess(self, text: str, truncate: bool = False) -> dict[str, Any]:
        """Token ids of one text. One that is longer than the context raises RecordError or, with `truncate`, loses
        its end."""
        if not truncate:
            lengths.check(text, self.context_length, lambda text: len(self.tokenizer(text)["input_ids"]))
        ids = self.tokenizer(text)["input_ids"]
        length = len(ids)
        if length > self.context_length and not truncate:
            raise RecordError(
                "context_length_exceeded",
                f"the text has {length} tokens, the model takes {self.context_length}",
                hint="shorten it, or let --truncate cut its end",
            )
        if length > self.context_length:  # once more: the token that ends every text has to stay
            ids = self.tokenizer(text, truncation=True, max_length=self.context_length)["input_ids"]
        return {"input_ids": rows.row(ids), "cut": length - len(ids)}

    def _forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        left = self.tokenizer.padding_side == "left"
        ids, mask = rows.padded(rows.listed(inputs)["input_ids"], self.tokenizer.pad_token_id, self.device, left=left)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weights = mask.unsqueeze(-1).float()
        pooled = states[:, 0] if self.takes_first_token else (states * weights).sum(1) / weights.sum(1)
        vectors = torch.nn.functional.normalize(pooled, dim=-1)
        return {"vectors": vectors.numpy(force=True), **inputs}

    def postprocess(self, output: dict[str, Any]) -> dict[str, Any]:
        """The fields of a result."""
        cut = {"truncated": output["cut"]} if output["cut"] else {}
        usage = {"prompt_tokens": len(output["input_ids"])}
        return {"embedding": output["vectors"][0].tolist(), **cut, "usage": usage}


PIPELINE_REGISTRY.register_pipeline("llmcli-embedding", pipeline_class=EmbeddingPipeline)
