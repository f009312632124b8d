"""Texts, or pairs of texts -> logits of the labels of a sequence-classification head. A transformers.Pipeline."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from llmcli.errors import RecordError, UsageError
from llmcli.pipelines import base
from llmcli.pipelines.base import HeadPipeline, Inputs, Parameters


class SequenceClassificationPipeline(HeadPipeline):
    """Compute the logits of labels, as the pipelines text-classification and zero-shot-classification do.

    For a batch of B rows, of one text or of several, the longest of P tokens, and L labels:

    preprocess   for each row input_ids, P of them, and what else the tokenizer makes; cut: tokens that do not fit
    _forward     logits, float32 (B, L); what preprocess gave, in lists of B
    postprocess  {"logits": a list of L numbers for each row} of one text; "truncated", if tokens did not fit

    If text and `pair` are too long together, the text alone is truncated, or read in windows with `long`.
    """

    auto_class = "AutoModelForSequenceClassification"
    truncation = "only_first"  # of two texts that are too long together

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self._config = self.model.config.get_text_config()
        self._names_padding = self._config.pad_token_id in range(getattr(self._config, "vocab_size", sys.maxsize))

    def _sanitize_parameters(self, long: str = "truncate") -> Parameters:
        return {"long": long}, {}, {}

    def preprocess(self, inputs: Mapping[str, str], long: str = "truncate", **_: object) -> Iterator[Inputs]:
        """Yield one row or, if `long` is not "truncate", the windows of a text that is too long."""
        pair = [inputs["pair"]] if "pair" in inputs else []
        encoding = self.tokenizer(inputs["text"], *pair)
        length, is_fast = len(encoding["input_ids"]), self.tokenizer.is_fast
        base.check_tokens(encoding["input_ids"])
        limit, overlap = self.context_length or length, 0
        if length > limit:
            others = len(self.tokenizer("", *pair)["input_ids"]) if self.truncation == "only_first" else 0
            if others >= limit:
                message = f"hypothesis has {others} tokens, which leaves no room for the text: the maximum is {limit}"
                raise RecordError("context_length_exceeded", message)
            overlap = (limit - others) // 8
            if long == "truncate":
                encoding = self.tokenizer(inputs["text"], *pair, truncation=self.truncation, max_length=limit)
            elif not is_fast:
                raise UsageError(f"--long {long} requires a tokenizer that returns the positions of its tokens")
        rows = {name: encoding[name] for name in self.input_names}
        cut = length - len(rows["input_ids"])
        parts = encoding.sequence_ids(0) if is_fast else [0] * (length - cut)
        for window in base.cut_windows(rows, parts, limit, overlap, is_full=True):
            yield {**window, "cut": cut}

    def pad(self, rows: Sequence[Sequence[int]], *, fill: int | None = None, **settings: Any) -> Any:
        """Pad rows. A causal model reads the last token that is not `pad_token_id`; without one, the last of all."""
        if fill is None and not self._names_padding:
            last = {row[-1] for row in rows}
            self._config.pad_token_id = next(token for token in count() if token not in last)
        return super().pad(rows, fill=self._config.pad_token_id if fill is None else fill, **settings)

    def postprocess(self, rows: Sequence[Inputs]) -> Inputs:
        logits = [row["logits"][0].tolist() for row in rows]
        base.check_finite(logits)
        return {"logits": logits, **({"truncated": rows[0]["cut"]} if rows[0]["cut"] else {})}
