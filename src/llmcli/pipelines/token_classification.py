"""Texts -> names, places and whatever else a token-classification head knows. A transformers.Pipeline."""

from collections.abc import Iterator, Sequence

import torch
import transformers

from llmcli.io.units import round_float32
from llmcli.pipelines.base import HeadPipeline, Inputs, Parameters, check_finite, check_tokens, cut_windows


class TokenClassificationPipeline(HeadPipeline, transformers.TokenClassificationPipeline):  # type: ignore[misc]
    """Find entities, as the pipeline token-classification does, in windows that overlap as with its `stride`.

    For a batch of B windows, of one text or of several, the longest of P tokens, and L labels:

    preprocess   for each window input_ids, P of them, and what else the tokenizer makes; sentence, the whole text
    _forward     logits, float32 (B, P, L); what preprocess gave, in lists of B
    postprocess  [{"entity_group" or "entity", "score", "word", "start", "end"}] of one text
    """

    auto_class = "AutoModelForTokenClassification"
    needs_offsets = True

    def check_model_type(self, supported: object) -> None:
        """Accept the classes of models with code of their own."""

    def _sanitize_parameters(self, aggregation: str = "simple") -> Parameters:
        _, _, postprocess = super()._sanitize_parameters(aggregation_strategy=aggregation)
        return {}, {}, postprocess

    def preprocess(self, text: str, **_: object) -> Iterator[Inputs]:
        encoding = self.tokenizer(text, return_special_tokens_mask=True, return_offsets_mapping=True)
        check_tokens(encoding["input_ids"])
        rows = {name: encoding[name] for name in [*self.input_names, "special_tokens_mask", "offset_mapping"]}
        parts = encoding.sequence_ids(0)
        size = self.context_length or len(parts)
        for window in cut_windows(rows, parts, size, overlap=min(size // 4, 128)):
            yield {**window, "sentence": text}

    def postprocess(self, windows: Sequence[Inputs], **settings: object) -> list[Inputs]:
        outputs = []
        for window in windows:
            logits = window["logits"][:, : len(window["input_ids"])]  # without padding
            check_finite(logits)
            mask = torch.tensor([window["special_tokens_mask"]])
            rows = {name: [window[name]] for name in ("input_ids", "offset_mapping")}
            outputs.append({**rows, "logits": logits, "special_tokens_mask": mask, "sentence": window["sentence"]})
        entities = super().postprocess(outputs, **settings)
        entities = [{**entity, "score": round_float32(entity["score"])} for entity in entities]
        return [{name: value for name, value in entity.items() if name != "index"} for entity in entities]
