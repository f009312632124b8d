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


class StopTexts:
    """The texts of which one ends an answer."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        # A token is at least a byte: no stop text reaches further back, from the newest token, than this.
        self._reach = max(len(stop.encode()) for stop in stops) + BYTES_OF_SPECIALS

    def end(self, decode: "TokenDecoder", tokens: list[int]) -> bool:
        """Return whether the newest of an answer's tokens ends it."""
        reach = self._reach + (MARK_LENGTH if decode.thoughts else 0)  # for so long, the answer may be a thought
        if first_stop(decode(tokens[-reach:]), self._stops) is None:
            return False
        return not decode.thoughts or decode.find_stop(decode(tokens), self._stops) is not None  # A thought has none.


class NewTextStopCriteria(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """End each row of a batch once its new text contains a stop text.

    transformers' own stop strings are found in the prompt's end and in special tokens too. `start` is the padded length
    of the prompts. Several rows, sequences or beams, may share a decoder.
    """

    def __init__(self, decoders: "Sequence[TokenDecoder]", stops: Sequence[str], start: int) -> None:
        self.decoders, self.stops, self.start = decoders, StopTexts(stops), start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        rows = input_ids[:, self.start :].tolist()
        decoders = [self.decoders[i * len(self.decoders) // len(rows)] for i in range(len(rows))]
        is_done = [self.stops.end(decode, row) for decode, row in zip(decoders, rows, strict=True)]
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
