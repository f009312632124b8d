"""A question and a context -> the passage of the context that answers it. A transformers.Pipeline."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmcli.errors import RecordError, UsageError
from llmcli.pipelines import base
from llmcli.pipelines.base import HeadPipeline, Inputs, Parameters

if TYPE_CHECKING:
    from tokenizers import Encoding

    Floats = np.ndarray[tuple[int], np.dtype[np.float32]]
    Bools = np.ndarray[tuple[int], np.dtype[np.bool_]]

DEFAULT_WINDOW_TOKENS = 384
DEFAULT_STRIDE_TOKENS = 128


class ExtractiveQaPipeline(HeadPipeline):
    """Answer questions with passages of a context, which is read through overlapping windows if it is long.

    For a batch of B windows, of one question or of several, the longest of P tokens:

    preprocess   for each window input_ids, P of them, and token_type_ids; p_mask: whether each token is barred from
                 answers; encoding, of question and whole context; tokens, those of the context that the window holds;
                 shift, from their place in the window to that in the encoding; context; is_last
    _forward     start, end: logits, float32 (B, P); what preprocess gave, in lists of B
    postprocess  {"answer", "score", "start", "end"}, from all windows of one question; "answers", best first, if more
                 than one was asked for

    The answers and their scores are those of the pipeline of Transformers 4, which Transformers 5 removed.
    """

    auto_class = "AutoModelForQuestionAnswering"
    needs_offsets = True

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        # As they were trained: models that are padded on the left have the question after the context.
        self.is_question_first = self.tokenizer.padding_side == "right"

    def _sanitize_parameters(self, **settings: object) -> Parameters:
        windows: Inputs = {name: settings.pop(name) for name in ("doc_stride", "max_seq_len") if name in settings}
        return windows, {}, settings

    def preprocess(
        self, inputs: Mapping[str, str], doc_stride: int | None = None, max_seq_len: int | None = None, **_: object
    ) -> Iterator[Inputs]:
        """Yield windows of at most `max_seq_len` tokens, the question included, that overlap by `doc_stride` tokens."""
        for name in ("question", "context"):
            if not inputs[name].strip():
                raise RecordError("empty", f"the {name} is empty")
        size, stride = self._window(doc_stride, max_seq_len)
        names = ("question", "context") if self.is_question_first else ("context", "question")
        # Windows are cut here: tokenizers 0.23.1 and 0.23.2 return only the first two.
        encoding = self.tokenizer(*(inputs[name] for name in names)).encodings[0]
        parts, part, cls = encoding.sequence_ids, names.index("context"), self.tokenizer.cls_token_id
        length = parts.count(part)
        room = size - (len(parts) - length)
        if room <= stride and room < length:
            raise RecordError(
                "context_length_exceeded",
                f"the question has {parts.count(1 - part)} tokens, which leaves room for {max(room, 0)} of the context"
                f" in windows of {size} that overlap by {stride}",
                hint="shorten it, or use longer windows or less overlap",
            )
        # The [CLS] token takes the probability of there being no answer: it has its share of the softmax.
        barred = [own != part and token != cls for own, token in zip(parts, encoding.ids, strict=True)]
        rows = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids, "p_mask": barred}
        for window in base.cut_windows(rows, parts, size, stride, part):
            yield {**window, "encoding": encoding, "context": inputs["context"]}

    def _window(self, doc_stride: int | None, max_seq_len: int | None) -> tuple[int, int]:
        """Return size and overlap."""
        maximum = base.position_limit(self.model.config, self.tokenizer) or sys.maxsize
        size = min(maximum, DEFAULT_WINDOW_TOKENS) if max_seq_len is None else max_seq_len
        stride = min(size // 2, DEFAULT_STRIDE_TOKENS) if doc_stride is None else doc_stride
        if size > maximum:
            raise UsageError(f"windows of {size} tokens exceed the model's maximum of {maximum}")
        if not 0 <= stride < size - self.tokenizer.num_special_tokens_to_add():
            raise UsageError(f"windows of {size} tokens cannot overlap by {stride}")
        return size, stride

    def _forward(self, inputs: Inputs) -> Inputs:
        output = self.run_model(inputs)
        start, end = (logits.float().numpy(force=True) for logits in (output.start_logits, output.end_logits))
        return {"start": start, "end": end, **inputs}

    def postprocess(
        self,
        windows: Sequence[Inputs],
        top_k: int = 1,
        max_answer_len: int = 15,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
    ) -> Inputs:
        """Return the best passages. Equal texts are one, with the place of the first and the sum of the scores."""
        if min(top_k, max_answer_len) < 1:
            raise UsageError("number and length of answers must be at least 1")
        count = 2 * top_k + 10 if align_to_words else top_k  # Spans of the same words become one answer.
        answers, nulls = dict[str, dict[str, Any]](), list[float]()
        for window in windows:
            context, length = window["context"], len(window["p_mask"])
            start, end = window["start"][0, :length], window["end"][0, :length]  # without padding
            barred = np.array(window["p_mask"], bool)
            start, end = _probabilities(start, barred), _probabilities(end, barred)
            base.check_finite([start, end])
            nulls.append((start[0] * end[0]).item())
            start[0] = end[0] = 0  # [CLS]
            for first, last, score in _best_spans(start, end, barred, count, max_answer_len):
                begin, stop = _place(window, first, last, align_to_words)
                text = context[begin:stop]
                span = answers.setdefault(text.lower(), {"answer": text, "score": 0.0, "start": begin, "end": stop})
                span["score"] += score
        spans = list(answers.values())
        if handle_impossible_answer:
            spans.append({"answer": "", "score": min(nulls), "start": 0, "end": 0})
        spans = sorted(spans, key=lambda span: span["score"], reverse=True)[:top_k]
        best = spans[0] if spans else {"answer": None, "score": 0.0, "start": None, "end": None}
        return {**best, "answers": spans} if top_k > 1 else {**best}


def _place(window: Inputs, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    """Return begin and end of a span of tokens in the context: of whole words, if the tokenizer knows words."""
    encoding: Encoding = window["encoding"]
    tokens: range = window["tokens"]
    first, last = first + window["shift"], last + window["shift"]
    if not (first in tokens and last in tokens):
        return 0, 0  # [CLS] at the end
    words = encoding.token_to_word(first), encoding.token_to_word(last)
    if align_to_words and None not in words:
        while first > tokens.start and encoding.token_to_word(first - 1) == words[0]:
            first -= 1
        while last < tokens.stop - 1 and encoding.token_to_word(last + 1) == words[1]:
            last += 1
    return encoding.token_to_chars(first)[0], encoding.token_to_chars(last)[1]  # type: ignore[index]  # in the context


def _probabilities(logits: "Floats", barred: "Bools") -> "Floats":
    logits = np.where(barred, np.float32(-10000), logits)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()  # type: ignore[no-any-return]


def _best_spans(
    start: "Floats", end: "Floats", barred: "Bools", count: int, max_tokens: int
) -> Iterator[tuple[int, int, float]]:
    """Yield first token, last token and score of the `count` most likely spans, best first."""
    scores = np.tril(np.triu(np.outer(start, end)), max_tokens - 1).ravel()
    order = np.argmax(scores, keepdims=True) if count == 1 else np.arange(len(scores))
    if count < len(order):
        order = np.argpartition(-scores, count)[:count]
    for at in order[np.argsort(-scores[order])].tolist():
        first, last = divmod(at, len(start))
        # A short context brings spans that touch a barred token.
        if scores[at] > 0 and not (barred[first] or barred[last]):
            yield first, last, float(scores[at])
