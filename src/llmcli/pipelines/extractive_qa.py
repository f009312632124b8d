"""A question and a context -> the passage of the context that answers it. A transformers.Pipeline."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import ChunkPipeline

from llmcli.errors import ModelUnavailableError, RecordError, UsageError
from llmcli.pipelines import rows

NO_ANSWER = {"answer": None, "score": 0.0, "start": None, "end": None}


class ExtractiveQaPipeline(rows.RowPipeline, ChunkPipeline):  # type: ignore[misc]  # transformers has no types
    """A long context is read through windows that overlap. What the steps hand to each other, for a batch of B windows,
    of one question or of several, the longest of P tokens:

    preprocess   for each window input_ids, P of them; p_mask: whether each token is barred from answers; encoding, as
                 the tokenizer made it; context; is_last
    _forward     start, end: logits, float32 (B, P); what preprocess gave, in lists of B
    postprocess  {"answer", "score", "start", "end"}, from all windows of one question; "answers", best first, where
                 more than one was asked for

    The answers and their scores are those of transformers 4, whose pipeline for this is gone from transformers 5.
    """

    auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if not self.tokenizer.is_fast:
            raise ModelUnavailableError(
                f"{self.model.name_or_path}: the tokenizer does not tell where in a text its tokens stand",
                hint="take a model that has a tokenizer.json",
            )
        # As they were trained: models that are padded on the left have the question behind the context.
        self.is_question_first = self.tokenizer.padding_side == "right"
        self.model.config.use_cache = False  # a decoder's cache would serve later tokens, and there are none

    @staticmethod
    def check(config: Any) -> str | None:
        """Why a model of that configuration cannot be used."""
        usable = any(name.endswith("ForQuestionAnswering") for name in config.architectures or ())
        return None if usable else "of this kind have no question-answering head"

    def _sanitize_parameters(
        self, doc_stride: int | None = None, max_seq_len: int | None = None, **answering: Any
    ) -> tuple[Any, Any, Any]:
        windows = {"doc_stride": doc_stride, "max_seq_len": max_seq_len}
        return {name: value for name, value in windows.items() if value is not None}, {}, answering

    def preprocess(
        self,
        asked: Mapping[str, str],
        doc_stride: int | None = None,
        max_seq_len: int | None = None,
        truncate: object = None,
    ) -> Iterator[dict[str, Any]]:
        """Windows of at most `max_seq_len` tokens, the question's among them, that share `doc_stride` tokens of the
        context with their neighbours. `truncate` changes nothing: they cover the whole context, none of it is cut."""
        for name in ("question", "context"):
            if not asked[name].strip():
                raise RecordError("empty", f"the {name} is empty")
        size, stride = self._window(asked, doc_stride, max_seq_len)
        order = ("question", "context") if self.is_question_first else ("context", "question")
        windows = self.tokenizer(
            *(asked[name] for name in order),
            truncation="only_second" if self.is_question_first else "only_first",
            max_length=size,
            stride=stride,
            return_overflowing_tokens=True,
        ).encodings
        first, cls = order.index("context"), self.tokenizer.cls_token_id
        for window in windows:
            # The [CLS] token takes the probability of there being no answer: it has its share of the softmax.
            barred = [
                part != first and token != cls for part, token in zip(window.sequence_ids, window.ids, strict=True)
            ]
            yield {
                "input_ids": rows.row(window.ids),
                "p_mask": rows.row(barred),
                "encoding": window,
                "context": asked["context"],
                "is_last": window is windows[-1],
            }

    def _window(self, asked: Mapping[str, str], doc_stride: int | None, max_seq_len: int | None) -> tuple[int, int]:
        """Size and overlap. Raises UsageError where they cannot be, RecordError where this question cannot be asked
        with them: tokenizers would panic, or never come to the context's end."""
        most = self.tokenizer.model_max_length
        size = min(most, 384) if max_seq_len is None else max_seq_len
        stride = min(size // 2, 128) if doc_stride is None else doc_stride
        if size > most:
            raise UsageError(f"windows of {size} tokens are too long, the model takes {most}")
        if not 0 <= stride < size - self.tokenizer.num_special_tokens_to_add():
            raise UsageError(f"windows of {size} tokens cannot overlap by {stride}")
        tokens = self._count(asked["question"])
        room = size - tokens - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room <= stride and room < self._count(asked["context"]):
            raise RecordError(
                "context_length_exceeded",
                f"the question has {tokens} tokens, which leaves room for {max(room, 0)} of the context in windows of"
                f" {size} that overlap by {stride}",
                hint="shorten it, or take longer windows or less overlap",
            )
        return size, stride

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        batch, pad, left = rows.listed(inputs), self.tokenizer.pad_token_id, not self.is_question_first
        ids, mask = rows.padded(batch["input_ids"], pad, self.device, left=left)
        known = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self.tokenizer.model_input_names:
            types = [encoding.type_ids for encoding in batch["encoding"]]
            known["token_type_ids"], _ = rows.padded(types, 0, self.device, left=left)
        output = self.model(**{name: known[name] for name in self.tokenizer.model_input_names})
        start, end = (logits.float().numpy(force=True) for logits in (output.start_logits, output.end_logits))
        return {"start": start, "end": end, **inputs}

    def postprocess(
        self,
        windows: Sequence[Mapping[str, Any]],
        top_k: int = 1,
        max_answer_len: int = 15,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
    ) -> dict[str, Any]:
        """The fields of a result. Equal texts, wherever they stand, are one answer, that has the place of the first
        and the sum of the scores; `handle_impossible_answer` lets an empty one, with the score of none, take part."""
        if min(top_k, max_answer_len) < 1:
            raise UsageError("answers must be one or more, and of one token or more")
        count = 2 * top_k + 10 if align_to_words else top_k  # for spans of the same words become one answer
        answers: dict[str, dict[str, Any]] = {}
        nulls = []
        for window in windows:
            encoding, context = window["encoding"], window["context"]
            own = slice(len(encoding)) if self.is_question_first else slice(-len(encoding), None)  # no padding
            start, end, barred = window["start"][0, own], window["end"][0, own], np.array(window["p_mask"], bool)
            start, end = _probabilities(start, barred), _probabilities(end, barred)
            nulls.append((start[0] * end[0]).item())
            start[0] = end[0] = 0  # [CLS]
            for first, last, score in _best_spans(start, end, barred, count, max_answer_len):
                begin, stop = self._place(encoding, first, last, align_to_words)
                text = context[begin:stop]
                answer = answers.setdefault(text.lower(), {"answer": text, "score": 0.0, "start": begin, "end": stop})
                answer["score"] += score
        impossible = {"answer": "", "score": min(nulls), "start": 0, "end": 0}
        found = [*answers.values(), *([impossible] if handle_impossible_answer else [])]
        found = sorted(found, key=lambda answer: answer["score"], reverse=True)[:top_k]
        best = found[0] if found else NO_ANSWER
        return {**best, "answers": found} if top_k > 1 else {**best}

    def _place(self, encoding: Any, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
        """Where in the context the span from token to token stands: of whole words, if the tokenizer knows words."""
        words = (encoding.token_to_word(first), encoding.token_to_word(last))
        if align_to_words and None not in words:
            spans = [encoding.word_to_chars(word, int(self.is_question_first)) for word in words]
            if None not in spans:
                return spans[0][0], spans[1][1]
        return encoding.offsets[first][0], encoding.offsets[last][1]


PIPELINE_REGISTRY.register_pipeline("llmcli-extractive_qa", pipeline_class=ExtractiveQaPipeline)


def _probabilities(logits: Any, barred: Any) -> Any:
    """The softmax over the tokens that are not barred."""
    logits = np.where(barred, np.float32(-10000), logits)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _best_spans(start: Any, end: Any, barred: Any, count: int, longest: int) -> Iterator[tuple[int, int, float]]:
    """First token, last token and score of the `count` likeliest spans of at most `longest` tokens, best first; those
    that touch a barred token, which a short context brings, are left out."""
    scores = np.tril(np.triu(np.outer(start, end)), longest - 1).ravel()
    if count == 1:
        order = np.argmax(scores, keepdims=True)
    elif count < len(scores):
        order = np.argpartition(-scores, count)[:count]
        order = order[np.argsort(-scores[order])]
    else:
        order = np.argsort(-scores)
    for at in order.tolist():
        first, last = divmod(at, len(start))
        if scores[at] > 0 and not (barred[first] or barred[last]):
            yield first, last, float(scores[at])
