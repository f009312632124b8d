"""Log-probabilities of new tokens under the model's own distribution, in the shape of OpenAI's."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.utils import ModelOutput

from llmcli.io.units import round_float32
from llmcli.pipelines.base import Inputs, check_finite
from llmcli.pipelines.spelling import CONTEXT_TOKENS, speller

OUTPUTS = "token_logprobs", "best_logprobs", "best_tokens"
MIN_LOGPROB = -9999.0  # OpenAI's, for a token that the model excludes: JSON has no infinity


class TokenLogprobs(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Note the log-probability of each new token, and of the most likely ones. Ends nothing.

    It is that of the model's logits, whatever temperature, constraint or other settings make of them. As a context
    manager, it sees each forward pass of the model; of its logits, only those of one step are kept.
    """

    def __init__(self, model: PreTrainedModel, alternatives: int) -> None:
        self._model, self._alternatives = model, alternatives
        self._steps = list[tuple[torch.Tensor, ...]]()

    def __enter__(self) -> "TokenLogprobs":
        self._hook = self._model.register_forward_hook(self._keep_logits)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _keep_logits(self, _module: object, _inputs: object, output: ModelOutput) -> None:
        self._logits = output.logits[:, -1]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        logits = self.__dict__.pop("_logits").float()
        self._steps.append(_measure(logits, input_ids[:, -1:].to(logits.device), self._alternatives))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def outputs(self, batch_size: int) -> Inputs:
        """Return for B prompts of N sequences of T tokens: token_logprobs (B, N, T, 1), best_* (B, N, T, K)."""
        steps = [torch.stack(values, 1).numpy(force=True) for values in zip(*self._steps, strict=True)]
        shaped = [array.reshape(batch_size, len(array) // batch_size, *array.shape[1:]) for array in steps]
        return dict(zip(OUTPUTS, shaped, strict=True))


def measure_logprobs(logits: torch.Tensor, tokens: torch.Tensor, alternatives: int) -> list[tuple[np.ndarray, ...]]:
    """Return for each row of logits (R, V) the log-probability (1,) of its token, those of the best (K,), and these."""
    measured = (values.numpy(force=True) for values in _measure(logits, tokens[:, None], alternatives))
    return list(zip(*measured, strict=True))


def stack_logprobs(steps: Sequence[tuple[np.ndarray, ...]]) -> Inputs:
    """Return what `TokenLogprobs.outputs` does, for one sequence and what was measured at each of its T tokens."""
    return {name: np.stack(values)[None, None] for name, values in zip(OUTPUTS, zip(*steps, strict=True), strict=True)}


def _measure(logits: torch.Tensor, tokens: torch.Tensor, alternatives: int) -> tuple[torch.Tensor, ...]:
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(alternatives)
    return logprobs.gather(1, tokens), best.values, best.indices


def describe_logprobs(output: Inputs, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, start: int = 0) -> Inputs:
    """Return `logprobs`, in the shape of OpenAI's chat completions, and `mean_logprob` of the first sequence.

    Of the tokens of its text, those before `start` are left out.
    """
    chosen, best, best_ids = (output[name][0, 0, : len(ids)].tolist() for name in OUTPUTS)
    logprobs = [value for (value,) in chosen]
    check_finite(logprobs)
    spell = speller(tokenizer)

    def describe(before: Sequence[int], token: int, logprob: float) -> Inputs:
        text, data = spell(before, token)
        return {"token": text, "logprob": round_float32(max(logprob, MIN_LOGPROB)), "bytes": list(data)}

    row = [*output["input_ids"][-CONTEXT_TOKENS:], *ids]  # a space may depend on the prompt
    content = list[Inputs]()
    for i, (token, logprob) in enumerate(zip(ids, logprobs, strict=True), len(row) - len(ids)):
        before = row[max(0, i - CONTEXT_TOKENS) : i]
        place = len(content)
        others = [describe(before, *pair) for pair in zip(best_ids[place], best[place], strict=True)]
        content.append({**describe(before, token, logprob), "top_logprobs": others})
    content, logprobs = content[start:], logprobs[start:]
    mean = math.fsum(logprobs) / len(logprobs) if logprobs else None
    return {"logprobs": {"content": content}, "mean_logprob": mean and round_float32(mean)}
