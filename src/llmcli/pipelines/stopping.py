"""When the rows of a batch end, beside the tokens that end an answer; and when their tokens came."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import StoppingCriteria

from llmcli.text.splitting import first_stop
from llmcli.text.thoughts import MARK_LENGTH

if TYPE_CHECKING:
    from llmcli.pipelines.answers import TokenDecoder

BYTES_OF_SPECIALS = 8  # what a stop text's last tokens may have beside it


class NewTextStopCriteria(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """End each row of a batch once its new text contains a stop text.

    transformers' own stop strings are found in the prompt's end and in special tokens too. `start` is the padded length
    of the prompts. Several rows, sequences or beams, may share a decoder.
    """

    def __init__(self, decoders: "Sequence[TokenDecoder]", stops: Sequence[str], start: int) -> None:
        self.decoders, self.stops, self.start = decoders, stops, start
        # A token is at least a byte: no stop text reaches further back, from the newest token, than this.
        self.reach = max(len(stop.encode()) for stop in stops) + BYTES_OF_SPECIALS
        if any(decode.thoughts for decode in decoders):
            self.reach += MARK_LENGTH  # for so long, the answer may be a thought

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        rows = input_ids[:, max(self.start, input_ids.shape[1] - self.reach) :].tolist()
        decoders = [self.decoders[i * len(self.decoders) // len(rows)] for i in range(len(rows))]
        is_done = [first_stop(decode(row), self.stops) is not None for decode, row in zip(decoders, rows, strict=True)]
        for i, decode in enumerate(decoders):  # A thought has no stop texts.
            if is_done[i] and decode.thoughts:
                text = decode(input_ids[i, self.start :].tolist())
                is_done[i] = decode.find_stop(text, self.stops) is not None
        return torch.tensor(is_done, device=input_ids.device)


class RowLimitCriteria(StoppingCriteria):  # type: ignore[misc]
    """End each row of a batch after its own number of new tokens. Several rows may share a limit."""

    def __init__(self, limits: Sequence[int], start: int) -> None:
        self.limits, self.start = torch.tensor(limits), start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.limits = self.limits.to(input_ids.device)
        limits = self.limits.repeat_interleave(len(input_ids) // len(self.limits))
        return limits <= input_ids.shape[1] - self.start


class TokenTimer(StoppingCriteria):  # type: ignore[misc]
    """Note when each token of the longest row came, and call `on_token`, which may raise. Ends nothing."""

    def __init__(self, on_token: Callable[[], None] | None = None) -> None:
        self.times, self.on_token, self._length = list[float](), on_token, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        if input_ids.shape[1] > self._length:  # Rows with forced tokens have different lengths.
            self._length = input_ids.shape[1]
            self.times.append(time.perf_counter())
        if self.on_token:
            self.on_token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def speed(self) -> float:
        """Tokens per second of each row, after its first; 0 if there was only one."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else 0.0
