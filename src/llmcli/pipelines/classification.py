"""Texts, or pairs of texts -> logits of the labels of a sequence-classification head. A transformers.Pipeline."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING

from llmcli.errors import RecordError, UsageError
from llmcli.pipelines import base
from llmcli.pipelines.base import HeadPipeline, Inputs, Parameters, make_row

if TYPE_CHECKING:
    import torch

OVERLAP = 8  # An eighth of a window is at least in the next one too.


class SequenceClassificationPipeline(HeadPipeline):
    """Compute the logits of labels, as the pipelines text-classification and zero-shot-classification do.

    For a batch of B rows, of one text or of several, the longest of P tokens, and L labels:

    preprocess   for each row input_ids, P of them, and what else the tokenizer makes; cut: tokens that do not fit
    _forward     logits, float32 (B, L); what preprocess gave, in lists of B
    postprocess  {"logits": a list of L numbers for each row} of one text; "truncated", if tokens did not fit

    If text and `pair` are too long together, the text alone is truncated, or read in windows with `long`.
    """

    auto_class = "AutoModelForSequenceClassification"
    head, head_name = "SequenceClassification", "sequence-classification"

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self._config = self.model.config.get_text_config()
        self._names_padding = self._config.pad_token_id in range(self._config.vocab_size)

    def _sanitize_parameters(self, long: str = "truncate") -> Parameters:
        return {"long": long}, {}, {}

    def preprocess(self, inputs: Mapping[str, str], long: str = "truncate", **_: object) -> Iterator[Inputs]:
        """Yield one row or, if `long` is not "truncate", the windows of a text that is too long."""
        pair = [inputs["pair"]] if "pair" in inputs else []
        encoding = self.tokenizer(inputs["text"], *pair)
        names, length = ("input_ids", *self.input_names), len(encoding["input_ids"])
        base.check_tokens(encoding["input_ids"])
        maximum = base.position_limit(self.model.config, self.tokenizer) or length
        if length > maximum and (others := len(self.tokenizer("", *pair)["input_ids"])) >= maximum:
            raise RecordError(
                "context_length_exceeded", f"the hypothesis has {others} tokens, the model reads at most {maximum}"
            )
        if length > maximum and long == "truncate":
            encoding = self.tokenizer(inputs["text"], *pair, truncation="only_first", max_length=maximum)
        rows = {name: make_row(encoding[name]) for name in names}
        cut = length - len(rows["input_ids"])
        if length - cut <= maximum:
            yield {**rows, "cut": cut}
            return
        if not self.tokenizer.is_fast:
            raise UsageError(f"--long {long} requires a tokenizer that returns the positions of its tokens")
        parts = encoding.sequence_ids(0)
        begin, own = parts.index(0), parts.count(0)
        room = maximum - (length - own)
        overlap = room // OVERLAP
        steps = -(-(own - room) // (room - overlap))  # between windows, all of one length: each counts the same
        for start in (begin + step * (own - room) // steps for step in range(steps + 1)):
            end = begin + own
            yield {name: row[:begin] + row[start : start + room] + row[end:] for name, row in rows.items()} | {"cut": 0}

    def pad(
        self, rows: Sequence[Sequence[int]], *, left: bool = False, fill: int | None = None
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return input_ids and attention_mask, int64 (B, P), with padding that the model recognizes.

        A causal model reads the last token that is not its configuration's `pad_token_id`. If that is not given, it
        reads the last token, whatever it is.
        """
        if fill is None and not self._names_padding:
            last = {row[-1] for row in rows}
            self._config.pad_token_id = next(token for token in count() if token not in last)
        return super().pad(rows, left=left, fill=self._config.pad_token_id if fill is None else fill)

    def _forward(self, inputs: Inputs) -> Inputs:
        return {"logits": self.run_model(inputs).logits.float().numpy(force=True), **inputs}

    def postprocess(self, rows: Sequence[Inputs]) -> Inputs:
        logits = [row["logits"][0].tolist() for row in rows]
        base.check_finite(logits)
        return {"logits": logits, **({"truncated": rows[0]["cut"]} if rows[0]["cut"] else {})}
