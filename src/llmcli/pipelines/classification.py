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

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self._config = self.model.config.get_text_config()
        self._names_padding = self._config.pad_token_id in range(getattr(self._config, "vocab_size", sys.maxsize))

    def _sanitize_parameters(self, long: str = "truncate") -> Parameters:
        return {"long": long}, {}, {}

    def preprocess(self, inputs: Mapping[str, str], long: str = "truncate", **_: object) -> Iterator[Inputs]:
        """Yield one row or, if `long` is not "truncate", the windows of a text that is too long."""
        pair = [inputs["pair"]] if "pair" in inputs else []
        encoding, limit = self.tokenizer(inputs["text"], *pair), self.context_length
        length = len(encoding["input_ids"])
        base.check_tokens(encoding["input_ids"])
        if limit and length > limit:
            others = len(self.tokenizer("", *pair)["input_ids"])
            if others >= limit:
                message = f"hypothesis has {others} tokens, which leaves no room for the text: the maximum is {limit}"
                raise RecordError("context_length_exceeded", message)
            if long != "truncate":
                if not self.tokenizer.is_fast:
                    raise UsageError(f"--long {long} requires a tokenizer that returns the positions of its tokens")
                windows = self.windows(encoding, self.input_names, (limit - others) // 8, is_full=True)
                yield from ({**window, "cut": 0} for window in windows)
                return
            encoding = self.tokenizer(inputs["text"], *pair, truncation="only_first", max_length=limit)
        row = {name: encoding[name] for name in self.input_names}
        yield {**row, "cut": length - len(row["input_ids"]), "is_last": True}

    def pad(self, rows: Sequence[Sequence[int]], *, fill: int | None = None, **settings: Any) -> Any:
        """Pad rows so that the model finds the last token of each, if it reads that.

        It is the last one that is not the configuration's `pad_token_id` or, if there is none, the last of all.
        """
        if fill is None and not self._names_padding:
            last = {row[-1] for row in rows}
            self._config.pad_token_id = next(token for token in count() if token not in last)
        return super().pad(rows, fill=self._config.pad_token_id if fill is None else fill, **settings)

    def postprocess(self, rows: Sequence[Inputs]) -> Inputs:
        logits = [row["logits"][0].tolist() for row in rows]
        base.check_finite(logits)
        return {"logits": logits, **({"truncated": rows[0]["cut"]} if rows[0]["cut"] else {})}
