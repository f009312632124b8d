"""Pairs of query and text -> relevance, by a cross-encoder. A transformers.Pipeline."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from llmcli.io.units import round_float32
from llmcli.models import encoders
from llmcli.pipelines import base
from llmcli.pipelines.base import Inputs, Parameters
from llmcli.pipelines.classification import SequenceClassificationPipeline
from llmcli.pipelines.encoder_layers import make_activation


class RerankingPipeline(SequenceClassificationPipeline):
    """Compute how relevant a text is to a query, as `CrossEncoder` of sentence-transformers does.

    For a batch of B pairs, the longest of P tokens:

    preprocess   input_ids, P of them, and what else the tokenizer makes; cut: tokens that do not fit
    _forward     logits, float32 (B, 1); what preprocess gave, in lists of B
    postprocess  {"score": the logit after the model's activation} of one pair; "truncated", if tokens did not fit

    If query and text are too long together, the longer one is truncated.
    """

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self._encoder = encoders.read_cross_encoder(Path(self.model.name_or_path))
        limits = self._encoder.context_length, self.context_length
        self.context_length = min(filter(None, limits), default=None)
        config = self.model.config
        self._activation = make_activation(
            self._encoder.activation,
            (getattr(config, "sentence_transformers", None) or {}).get("activation_fn"),
            getattr(config, "sbert_ce_default_activation_function", None),
            default=torch.nn.Sigmoid,
        )

    @classmethod
    def find_incompatibility(cls, config: PreTrainedConfig) -> str | None:
        reason = super().find_incompatibility(config)
        return reason or (f"of this kind have {config.num_labels} labels, not one" if config.num_labels != 1 else None)

    def _sanitize_parameters(self, **_: object) -> Parameters:
        return {}, {}, {}

    def preprocess(self, inputs: Mapping[str, str], **_: object) -> Iterator[Inputs]:  # type: ignore[override]
        """Yield the one row of a `query` and a `text`."""
        pair = self._encoder.prompts.get(None, "") + inputs["query"], inputs["text"]
        if self._encoder.lowers_case:
            pair = encoders.lower(pair[0]), encoders.lower(pair[1])
        encoding = self.tokenizer(*pair)
        length = len(encoding["input_ids"])
        base.check_tokens(encoding["input_ids"])
        if self.context_length and length > self.context_length:
            encoding = self.tokenizer(*pair, truncation="longest_first", max_length=self.context_length)
        rows = {name: encoding[name] for name in self.input_names}
        yield {**rows, "cut": length - len(rows["input_ids"])}

    def postprocess(self, rows: Sequence[Inputs]) -> Inputs:
        (row,) = rows
        score = self._activation(row["logits"][0])[0].item()
        base.check_finite(score)
        return {"score": round_float32(score), **({"truncated": row["cut"]} if row["cut"] else {})}
