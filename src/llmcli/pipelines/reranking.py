"""Pairs of query and text -> relevance, by a cross-encoder. A transformers.Pipeline."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from llmcli.io.units import round_float32
from llmcli.models import encoders
from llmcli.pipelines.base import Inputs, Parameters
from llmcli.pipelines.classification import SequenceClassificationPipeline
from llmcli.pipelines.embedding import make_activation


class RerankingPipeline(SequenceClassificationPipeline):
    """Compute how relevant a text is to a query, as `CrossEncoder` of sentence-transformers does.

    The steps are those of the base class. postprocess returns {"score": the logit after the model's activation}.
    """

    truncation = "longest_first"

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        config, own = self.model.config, encoders.read_settings(Path(self.model.name_or_path))
        own = own if own.get("model_type") == "CrossEncoder" else {}
        older = getattr(config, "sentence_transformers", {}).get("activation_fn")
        oldest = getattr(config, "sbert_ce_default_activation_function", None)
        self._activation = make_activation(own.get("activation_fn"), older, oldest, default=torch.nn.Sigmoid)
        self._prompt = encoders.read_prompts(own)[None]

    @classmethod
    def find_incompatibility(cls, config: PreTrainedConfig) -> str | None:
        reason = None if config.num_labels == 1 else f"of this kind have {config.num_labels} labels, not one"
        return super().find_incompatibility(config) or reason

    def _sanitize_parameters(self, query: str = "") -> Parameters:
        return {"query": query}, {}, {}

    def preprocess(self, text: str, query: str = "", **_: object) -> Iterator[Inputs]:  # type: ignore[override]
        yield from super().preprocess({"text": self._prompt + query, "pair": text})

    def postprocess(self, rows: Sequence[Inputs]) -> Inputs:
        output = super().postprocess(rows)
        score = self._activation(torch.tensor(output.pop("logits")[0])).item()
        return {"score": round_float32(score), **output}
