"""Texts -> names, places and whatever else a token-classification head knows. A transformers.Pipeline."""

from collections.abc import Iterator, Sequence

import torch
import transformers

from llmcli.pipelines import base
from llmcli.pipelines.base import HeadPipeline, Inputs, Parameters, make_row

MAX_OVERLAP_TOKENS = 128
FIELDS = ("entity_group", "entity", "score", "word", "start", "end")


class TokenClassificationPipeline(HeadPipeline, transformers.TokenClassificationPipeline):  # type: ignore[misc]
    """Find entities, as the pipeline token-classification does, in windows that overlap by `stride` tokens.

    For a batch of B windows, of one text or of several, the longest of P tokens, and L labels:

    preprocess   for each window input_ids, P of them, and what else the tokenizer makes; sentence, the whole text
    _forward     logits, float32 (B, P, L); what preprocess gave, in lists of B
    postprocess  [{"entity_group" or "entity", "score", "word", "start", "end"}] of one text
    """

    auto_class = "AutoModelForTokenClassification"
    head, head_name = "TokenClassification", "token-classification"
    needs_offsets = True

    def check_model_type(self, supported: object) -> None:
        """Accept the classes of models with code of their own."""

    def _sanitize_parameters(self, aggregation: str = "simple", stride: int | None = None) -> Parameters:
        _, _, postprocess = super()._sanitize_parameters(aggregation_strategy=aggregation)
        return {"stride": stride}, {}, postprocess

    def preprocess(self, text: str, stride: int | None = None, **_: object) -> Iterator[Inputs]:
        # Windows are cut here: tokenizers 0.23.1 and 0.23.2 return only the first two.
        encoding = self.tokenizer(text, return_special_tokens_mask=True, return_offsets_mapping=True)
        rows = {name: make_row(encoding[name]) for name in ("input_ids", "special_tokens_mask", *self.input_names)}
        rows["offset_mapping"] = encoding["offset_mapping"]
        parts = encoding.sequence_ids(0)
        begin = parts.index(0) if 0 in parts else len(parts)
        end = begin + parts.count(0)
        size = base.position_limit(self.model.config, self.tokenizer) or len(parts)
        overlap = min(size // 4, MAX_OVERLAP_TOKENS) if stride is None else stride
        room = size - len(parts) + end - begin
        for start in base.window_starts(begin, end, room, overlap):
            stop = min(start + room, end)
            window = {name: row[:begin] + row[start:stop] + row[end:] for name, row in rows.items()}
            yield {**window, "sentence": text, "is_last": stop == end}

    def _forward(self, inputs: Inputs) -> Inputs:
        return {"logits": self.run_model(inputs).logits.float().cpu(), **inputs}

    def postprocess(self, windows: Sequence[Inputs], **settings: object) -> list[Inputs]:
        outputs = []
        for window in windows:
            logits = window["logits"][:, : len(window["input_ids"])]  # without padding
            base.check_finite(logits)
            rows = {name: [window[name]] for name in ("input_ids", "offset_mapping")}
            mask = torch.tensor([window["special_tokens_mask"]])
            outputs.append({**rows, "logits": logits, "special_tokens_mask": mask, "sentence": window["sentence"]})
        entities = super().postprocess(outputs, **settings)
        fields = [{name: entity[name] for name in FIELDS if name in entity} for entity in entities]
        return [{**entity, "score": float(entity["score"])} for entity in fields]
