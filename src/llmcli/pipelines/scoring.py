"""Texts -> how likely a causal language model finds them. A transformers.Pipeline."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.pipelines import PIPELINE_REGISTRY

from llmcli.errors import RecordError, UsageError
from llmcli.pipelines import rows
from llmcli.pipelines.cache import growing
from llmcli.pipelines.head import CausalHead
from llmcli.pipelines.spelling import size_of, token_texts

LOGITS = 2**27  # numbers that a model with a cache may give at once: 0.5 GB in float32
SLICE = 2**22  # of these that are looked at together: a processor's caches hold no more


class ScoringPipeline(CausalHead):
    """What the steps hand to each other, for a batch of B windows, of one text or of several, the longest of P tokens:

    preprocess   for each window input_ids, P of them; targets, the token that follows each; scored, which of these are
                 scored here; ids, all tokens of the text; begin, the first that is the text's own and not its
                 condition's; size, in bytes, of what is scored of the text
    _forward     logprobs, natural logarithms, float32 (B, P); what preprocess gave, in lists of B
    postprocess  {"logprob", "perplexity", "bits_per_byte", "tokens"} of one text; "token_logprobs" where asked for

    A text that is longer than the model's context is read through windows that begin every `stride` tokens; each token
    is scored in the first that holds it. (The sliding window of "Perplexity of fixed-length models" in transformers'
    documentation.) Bits per byte: L. Gao et al., The Pile, arXiv 2101.00027, section 3.1; of the bytes of those tokens
    that are scored.
    """

    def _sanitize_parameters(self, stride: int | None = None, token_logprobs: bool = False) -> tuple[Any, Any, Any]:
        return {"stride": stride}, {}, {"token_logprobs": token_logprobs}

    def preprocess(
        self, asked: Mapping[str, str], stride: int | None = None, truncate: object = None
    ) -> Iterator[dict[str, Any]]:
        """The windows of `text`, behind `condition`, which may be empty. `truncate` changes nothing: they cover all of
        it. Raises UsageError for a stride that leaves tokens out."""
        text, condition = asked["text"], asked["condition"]
        ids = self.tokenizer(condition + text)["input_ids"]
        before = self.tokenizer(condition)["input_ids"] if condition else []
        begin = len(os.path.commonprefix([ids, before]))  # noqa: RUF071  # of lists, not of paths
        if not ids:
            raise RecordError("no_tokens", "the text has no tokens")
        size = self.context_length or max(len(ids), 2)
        if stride and self.context_length and stride >= size:
            raise UsageError(
                f"--stride {stride}: windows of this model have {size} tokens",
                hint="a smaller one has them overlap, so that each token has some before it",
            )
        size_scored = len(text.encode()) - (0 if begin else size_of(self.tokenizer, ids[0]))
        about = {"ids": rows.row(ids), "begin": begin, "size": size_scored}
        for start, end, known in windows(len(ids), max(begin, 1), size, stride or size // 2):
            window = ids[start:end]  # what would follow its last token is not asked
            read, targets = window[:-1] or window, window[1:] or window
            scored = slice(known - start - 1, end - start - 1)
            yield {"input_ids": rows.row(read), "targets": rows.row(targets), "scored": scored, **about}

    def _forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        batch, pad = rows.listed(inputs), self.tokenizer.pad_token_id
        ids, mask = rows.padded(batch["input_ids"], pad, self.device)
        targets, _ = rows.padded(batch["targets"], pad, self.device)
        return {"logprobs": self._logprobs(ids, mask, targets).numpy(force=True), **inputs}

    def _logprobs(self, ids: Any, mask: Any, targets: Any) -> Any:
        """Of each target, float32 (B, P), given what stands before it."""
        config, length = self.model.config.get_text_config(), ids.shape[1]
        width = max(1, LOGITS // (len(ids) * config.vocab_size))
        cache = self._cache() if width < length else None
        if cache is None:
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return _of_targets(logits, targets)
        found = []
        for at in range(0, length, width):
            own = slice(at, at + width)
            output = self.model(input_ids=ids[:, own], attention_mask=mask[:, : own.stop], past_key_values=cache)
            found.append(_of_targets(output.logits, targets[:, own]))
        return torch.cat(found, dim=1)

    def _cache(self) -> Any:
        """For a window that is read in parts; None where the model keeps anything else than keys and values."""
        model = self.model
        if found := growing(model, model.generation_config):
            return found
        found = DynamicCache(config=model.config.get_text_config(decoder=True))
        return found if found.layers and all(isinstance(layer, DynamicLayer) for layer in found.layers) else None

    def postprocess(self, windows: Sequence[Mapping[str, Any]], token_logprobs: bool = False) -> dict[str, Any]:
        """The fields of a result. Raises RecordError where the model's numbers are none."""
        ids, begin, size = (windows[0][name] for name in ("ids", "begin", "size"))
        scored = [each for window in windows for each in window["logprobs"][0, window["scored"]].tolist()]
        logprob = math.fsum(scored)
        try:
            perplexity = math.exp(-logprob / len(scored)) if scored else None
        except (OverflowError, ValueError):
            perplexity = math.inf
        if not math.isfinite(logprob) or perplexity == math.inf:
            raise RecordError("not_finite", "the model's probabilities are no numbers", hint="try --dtype float32")
        fields = {
            "logprob": _rounded(logprob),
            "perplexity": _rounded(perplexity),
            "bits_per_byte": _rounded(-logprob / math.log(2) / size if scored and size > 0 else None),
            "tokens": len(ids) - begin,
        }
        if token_logprobs:
            own = ids[begin:].tolist()
            texts, logprobs = token_texts(self.tokenizer, own), [None] * (len(own) - len(scored)) + scored
            fields["token_logprobs"] = [
                {"token": text, "id": token, "logprob": _rounded(each)}
                for text, token, each in zip(texts, own, logprobs, strict=True)
            ]
        return fields


PIPELINE_REGISTRY.register_pipeline("llmcli-scoring", pipeline_class=ScoringPipeline)


def windows(length: int, first: int, size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """The windows of so many tokens: where each begins and ends, and the first token that is scored in it. `first` is
    the first of all."""
    known = first
    for begin in range(0, length, stride):
        end = min(begin + size, length)
        if end > known or end == length:
            yield begin, end, known
            known = end
        if end == length:
            break


def _of_targets(logits: Any, targets: Any) -> Any:
    size = max(1, SLICE // logits.shape[-1])
    parts = zip(logits.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
    losses = [torch.nn.functional.cross_entropy(some.float(), of, reduction="none") for some, of in parts]
    return -torch.cat(losses).view(targets.shape)


def _rounded(value: float | None) -> float | None:
    """To the digits that float32 is good for."""
    return None if value is None else float(f"{value:.6g}")
