"""Prompts and labels -> how likely a causal language model answers with each label. A transformers.Pipeline."""

import copy
import math
import os.path
from collections import defaultdict
from collections.abc import Mapping
from typing import Any
from unicodedata import east_asian_width

import numpy as np
import torch

from llmcli.compat.cache import filled_cache
from llmcli.errors import UsageError
from llmcli.pipelines import base
from llmcli.pipelines.base import Inputs, Parameters
from llmcli.pipelines.causal import CausalPipeline
from llmcli.pipelines.running import Prefix
from llmcli.tasks import Prompt
from llmcli.tasks.fields import FilledTemplate

Tokens = tuple[int, ...]
TAIL_TOKENS = 3  # of a prompt's end: what else precedes them does not change how the tokens of a label are divided
MIN_SHARE = 2**-24  # of a probability in float32


class LabelPipeline(CausalPipeline):
    """Compute the log probability of each label as the answer to a prompt.

    For a batch of B prompts, the longest of P tokens, with at most L labels each:

    preprocess   input_ids, P of them; labels, the tokens that follow these for each label; length, of both; cut: tokens
                 that --truncate took away
    _forward     logprobs, natural logarithms, float64 (B, L); what preprocess gave, in lists of B
    postprocess  {"logprobs"} of one prompt: of an answer that begins with a label, and with no longer one

    The labels form a tree of tokens. The batch reads the prompts, and then each token from which the tree goes on: one
    pass if each label is a token. Keys and values are kept on the way down if the model has nothing else to keep.
    """

    _tokens: tuple[object, int, list[Tokens]] = None, 0, []  # of the last labels: see `_encode_labels`

    def _sanitize_parameters(self, *_: Any, **__: Any) -> Parameters:
        return {}, {}, {}

    def preprocess(self, inputs: Mapping[str, Any], truncate: bool = False, **_: object) -> Inputs:  # type: ignore[override]
        """Return the tokens of `prompt` and of its `labels`.

        With `truncate`, a prompt that is too long loses the end of what it does not share with the prompt `empty`.
        """
        context = self.context_length
        ids = self.read_prompt(inputs["prompt"], None if truncate else context, can_think=False)[0]
        dropped, labels = self._encode_labels(tuple(inputs["labels"]), inputs["prompt"], ids)
        ids = ids[: len(ids) - dropped] or self.read_prompt("", None, can_think=False)[0]
        length = len(ids) + max(map(len, labels)) - 1  # Nobody asks what would follow a label.
        cut = max(0, length - context) if context else 0
        if cut and truncate:
            empty = self.read_prompt(inputs["empty"], None, can_think=False)[0]
            pairs = [ids, empty[: len(empty) - dropped]], [ids[::-1], empty[: len(empty) - dropped][::-1]]
            head, tail = (len(os.path.commonprefix(pair)) for pair in pairs)  # noqa: RUF071  # of tokens
            if cut <= len(ids) - tail - head:
                ids, length = ids[: len(ids) - tail - cut] + ids[len(ids) - tail :], length - cut
        if context and length > context:
            raise base.too_long("prompt with its labels", length, context)
        return {"input_ids": base.make_row(ids), "labels": labels, "length": length, "cut": cut}

    def _encode_labels(self, labels: tuple[str, ...], prompt: Prompt, ids: list[int]) -> tuple[int, list[Tokens]]:
        """Return how many tokens of a prompt's end change where a label follows, and what follows instead for each."""
        key = labels, isinstance(prompt, str) and ids[-TAIL_TOKENS:]
        if key == self._tokens[0]:
            return self._tokens[1:]
        if isinstance(prompt, str):
            rows = [tuple(self.chat_template.encode_text(_join(prompt, label))) for label in labels]
            dropped = len(ids) - len(os.path.commonprefix([tuple(ids), *rows]))  # noqa: RUF071  # of tokens
            rows = [row[len(ids) - dropped :] for row in rows]
        else:
            dropped, rows = 0, [self._encode_answer(label) for label in labels]
        first = dict[Tokens, str]()
        for label, tokens in zip(labels, rows, strict=True):
            if not tokens or first.setdefault(tokens, label) != label:
                same = f"the tokens of {first[tokens]!r}" if tokens else "no tokens"
                raise UsageError(f"label {label!r} has {same} in this model")
        self._tokens = key, dropped, rows
        return dropped, rows

    def _encode_answer(self, label: str) -> Tokens:
        """Return the tokens of a label that begins an answer. Names of special tokens in it are text."""
        label = self.chat_template.answer_space + label
        newline, line, alone = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", f"\n{label}", label)
        )  # SentencePiece puts a space before the beginning of a text, but not after a newline.
        return tuple(line[len(newline) :] if line[: len(newline)] == newline else alone)

    def _forward(self, inputs: Inputs, *_: Any, prefix: Prefix | None = None, **__: Any) -> Inputs:
        rows, config = base.as_batch(inputs)["labels"], copy.copy(self.model.generation_config)
        children = defaultdict[Tokens, set[int]](set)
        for label in {label for labels in rows for label in labels}:
            for i, token in enumerate(label):
                children[label[:i]].add(token)
        config.do_sample = False
        ids, mask, cache = self._begin(inputs, config, prefix)
        start, length, maximum = ids.shape[1], ids.shape[1] + max(map(len, children)), self.max_shared_tokens
        known = dict[Tokens, list[float]]()  # of the last token of a path: its log probabilities in all rows
        for path in sorted(children):  # depth first
            if path and cache is not None and (surplus := cache.get_seq_length() - start - len(path) + 1):
                cache.crop(-surplus)
            end = torch.tensor(path, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
            output = self._read_next(
                torch.cat([ids, end], 1), torch.cat([mask, torch.ones_like(end)], 1), config, cache
            )
            cache = filled_cache(output) if maximum is None or length < maximum else None
            config.prefill_chunk_size, tokens, logits = None, list(children[path]), output.logits[0].float()
            logprobs = logits[:, tokens] - logits.logsumexp(-1, keepdim=True)
            known |= zip([(*path, token) for token in tokens], logprobs.T.tolist(), strict=True)
        logprobs = np.full((len(rows), max(map(len, rows))), np.nan)
        for i, labels in enumerate(rows):
            logprobs[i, : len(labels)] = [sum(known[label[: k + 1]][i] for k in range(len(label))) for label in labels]
        return {"logprobs": logprobs, **inputs}

    def postprocess(self, output: Inputs, **_: object) -> Inputs:  # type: ignore[override]
        labels = output["labels"]
        logprobs = dict(zip(labels, output["logprobs"][0].tolist(), strict=False))  # Other rows may have more labels.
        base.check_finite([*logprobs.values()])
        order = sorted(labels)
        for i in reversed(range(len(order))):  # longer labels first
            longer, end = 0.0, i + 1
            while end < len(order) and order[end][: len(order[i])] == order[i]:
                longer += math.exp(logprobs[order[end]] - logprobs[order[i]])
                end += 1
            logprobs[order[i]] += math.log(max(1 - longer, MIN_SHARE))
        fields: Inputs = {"logprobs": [logprobs[label] for label in labels]}
        return {**fields, "truncated": output["cut"]} if output["cut"] else fields


def _join(prompt: str, label: str) -> str:
    """Return a prompt that goes on with a label, after a space if the script has spaces."""
    is_apart = prompt[-1:].isspace() or label[:1].isspace() or east_asian_width(prompt[-1:] or " ") in "FW"
    pieces = ["" if is_apart else " ", label]
    return FilledTemplate([*prompt.pieces, *pieces]) if isinstance(prompt, FilledTemplate) else prompt + "".join(pieces)
