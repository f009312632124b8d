"""Texts -> how likely a causal language model finds them. A transformers.Pipeline."""

import math
import os.path
from collections.abc import Iterator, Mapping, Sequence

import torch

from llmcli.compat.cache import cache_argument, key_value_cache
from llmcli.compat.torch import read_memory
from llmcli.errors import UsageError
from llmcli.io.units import round_float32
from llmcli.models.memory import available_memory
from llmcli.pipelines.base import CausalTextPipeline, Inputs, Parameters, as_batch, check_finite, check_tokens, make_row
from llmcli.pipelines.spelling import first_token_bytes, token_texts

BYTES_PER_LOGIT = 16  # of free memory, for each number that a model with a cache returns at once
LOGITS = 2**27  # of these numbers on a CPU at most: 0.5 GB in float32
SLICE = 2**22  # of these, looked at together: a CPU's caches hold no more


class ScoringPipeline(CausalTextPipeline):
    """Compute log probabilities and perplexity.

    For a batch of B windows, of one text or of several, the longest of P tokens:

    preprocess   for each window input_ids, P of them; targets, the token that follows each; scored, which of these are
                 scored here; ids, all tokens of the text; begin, the first that is the text's own and not its
                 condition's; size, in bytes, of what is scored of the text
    _forward     logprobs, natural logarithms, float32 (B, P); what preprocess gave, in lists of B
    postprocess  {"logprob", "perplexity", "bits_per_byte", "tokens"} of one text; "token_logprobs" if asked for

    A text that is longer than the model's context is read through windows that begin every `stride` tokens; each token
    is scored in the first that holds it. Bits per byte: L. Gao et al., The Pile, arXiv 2101.00027, section 3.1; of the
    bytes of those tokens that are scored.
    """

    def _sanitize_parameters(self, stride: int | None = None, token_logprobs: bool = False) -> Parameters:
        return {"stride": stride}, {}, {"token_logprobs": token_logprobs}

    def preprocess(self, inputs: Mapping[str, str], stride: int | None = None, **_: object) -> Iterator[Inputs]:
        """Yield the windows of `text` after `condition`, `stride` tokens apart."""
        text, condition = inputs["text"], inputs["condition"]
        ids = self.tokenizer(condition + text)["input_ids"]
        before = self.tokenizer(condition)["input_ids"] if condition else []
        begin = len(os.path.commonprefix([ids, before]))  # noqa: RUF071  # of tokens
        check_tokens(ids)
        size = self.context_length or max(len(ids), 2)
        if stride and self.context_length and stride >= size:
            raise UsageError(
                f"invalid --stride {stride}: windows of this model have {size} tokens",
                hint="with a smaller stride windows overlap, so that each token has some before it",
            )
        bytes_scored = len(text.encode()) - (0 if begin else first_token_bytes(self.tokenizer, ids[0]))
        shared = {"ids": make_row(ids), "begin": begin, "size": bytes_scored}
        for start, end, known in windows(len(ids), max(begin, 1), size, stride or size // 2):
            window = ids[start:end]  # Nobody asks what would follow its last token.
            read, targets = window[:-1] or window, window[1:] or window
            scored = slice(known - start - 1, end - start - 1)
            yield {"input_ids": make_row(read), "targets": make_row(targets), "scored": scored, **shared}

    def _forward(self, inputs: Inputs) -> Inputs:
        batch = as_batch(inputs)
        (ids, mask), (targets, _) = self.pad(batch["input_ids"]), self.pad(batch["targets"])
        length = ids.shape[1]
        is_cpu = self.device.type == "cpu"
        free = available_memory() if is_cpu else read_memory(self.device)[2]
        logits = min(free // BYTES_PER_LOGIT, LOGITS if is_cpu else free)
        if self.model.tp_size:  # All processes read parts of the same length.
            logits = LOGITS
        width = max(1, logits // (len(ids) * self.model.config.get_text_config().vocab_size))
        cache = key_value_cache(self.model) if width < length and self.can_read_in_parts(length) else None
        settings = cache_argument(self.model, cache) or {"use_cache": False}
        parts = []
        for start in range(0, length, width if cache else length):
            part = slice(start, start + (width if cache else length))
            output = self.model(input_ids=ids[:, part], attention_mask=mask[:, : part.stop], **settings)
            parts.append(_target_logprobs(output.logits, targets[:, part], SLICE if is_cpu else logits // 8))
        return {"logprobs": torch.cat(parts, dim=1).numpy(force=True), **inputs}

    def postprocess(self, windows: Sequence[Inputs], token_logprobs: bool = False) -> Inputs:
        ids, begin, size = (windows[0][name] for name in ("ids", "begin", "size"))
        scored = [value for window in windows for value in window["logprobs"][0, window["scored"]].tolist()]
        logprob = math.fsum(scored)
        try:
            perplexity = math.exp(-logprob / len(scored)) if scored else None
        except (OverflowError, ValueError):
            perplexity = math.inf
        check_finite([logprob, perplexity or 0])
        fields: Inputs = {
            "logprob": _round(logprob),
            "perplexity": _round(perplexity),
            "bits_per_byte": _round(-logprob / math.log(2) / size if scored and size > 0 else None),
            "tokens": len(ids) - begin,
        }
        if token_logprobs:
            own = ids[begin:].tolist()
            logprobs = [None] * (len(own) - len(scored)) + [*map(_round, scored)]
            rows = zip(token_texts(self.tokenizer, own), own, logprobs, strict=True)
            fields["token_logprobs"] = [{"token": text, "id": id, "logprob": value} for text, id, value in rows]
        return fields


def windows(length: int, first: int, size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield begin and end of each window, and the first token that is scored in it; `first` is that of all."""
    known = first
    for begin in range(0, length, stride):
        end = min(begin + size, length)
        if end > known or end == length:
            yield begin, end, known
            known = end
        if end == length:
            break


def _target_logprobs(logits: torch.Tensor, targets: torch.Tensor, numbers: int) -> torch.Tensor:
    """Return the log probability of each target (B, P), from logits (B, P, V), `numbers` of them at a time."""
    size = max(1, numbers // logits.shape[-1])
    parts = zip(logits.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
    losses = [torch.nn.functional.cross_entropy(part.float(), of, reduction="none") for part, of in parts]
    return -torch.cat(losses).view(targets.shape)


def _round(value: float | None) -> float | None:
    return None if value is None else round_float32(value)
