"""New tokens -> text: where an answer ends, why, and what of it may be shown before it has ended."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from llmcli.text.stops import first_stop, stop_prefix

Decode = Callable[[list[int]], str]


def fields(output: Mapping[str, Any], decode: Decode, config: Any) -> dict[str, Any]:
    """The fields of one input's result, from its `sequences` (1, N, T) of new tokens, its `input_ids` and what was
    `cut` from it; `generated_texts` where more than one sequence was asked for."""
    limit = output.get("max_new_tokens")
    found = [_answer(sequence.tolist()[:limit], decode, config) for sequence in output["sequences"][0]]
    text, reason, _ = found[0]
    result: dict[str, Any] = {"generated_text": text}
    if len(found) > 1:
        result["generated_texts"] = [text for text, _, _ in found]
    if output["cut"]:
        result["truncated"] = output["cut"]
    usage = {
        "prompt_tokens": len(output["input_ids"]),
        "completion_tokens": sum(count for _, _, count in found),
    }
    return result | {"finish_reason": reason, "usage": usage}


def _answer(ids: list[int], decode: Decode, config: Any) -> tuple[str, str, int]:
    """Text, finish reason, and how many tokens were generated, of one row of a batch."""
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    end = next((i + 1 for i, token in enumerate(ids) if token in eos), None)
    text = decode(ids[:end])
    if (cut := first_stop(text, config.stop_strings or ())) is not None:
        count = next(n for n in range(1, len(ids) + 1) if first_stop(decode(ids[:n]), config.stop_strings) == cut)
        return text[:cut], "stop", count
    return text, "stop" if end else "length", end or len(ids)


class NewTextStopCriteria(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch where a stop text stands in its new text. `start` is the prompts' padded length;
    there may be several rows, sequences or beams, for each of the `decoders`."""

    def __init__(self, decoders: Sequence[Decode], stops: Sequence[str], start: int) -> None:
        self.decoders, self.stops, self.start = decoders, stops, start
        # A token is a byte at least: no stop text reaches further back, from the newest token, than this.
        self.reach = max(len(stop.encode()) for stop in stops) + 8

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        rows = input_ids[:, max(self.start, input_ids.shape[1] - self.reach) :].tolist()
        decoders = (self.decoders[i * len(self.decoders) // len(rows)] for i in range(len(rows)))
        stopped = [first_stop(decode(row), self.stops) is not None for decode, row in zip(decoders, rows, strict=True)]
        return torch.tensor(stopped, device=input_ids.device)


class RowLimitCriteria(StoppingCriteria):  # type: ignore[misc]
    """End each row of a batch after its own number of new tokens.

    `start` is the padded length of the prompts. Several rows, sequences or beams, may share one of the `limits`.
    """

    def __init__(self, limits: Sequence[int], start: int) -> None:
        self.limits, self.start = torch.tensor(limits), start

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        limits = self.limits.repeat_interleave(len(input_ids) // len(self.limits))
        return (limits <= input_ids.shape[1] - self.start).to(input_ids.device)


def limit_rows(config: Any, limits: Sequence[int] | None, start: int) -> list[StoppingCriteria]:
    """Let `config` generate as many tokens as the longest row may have, and return what ends the shorter rows."""
    if not limits:
        return []
    config.max_new_tokens, config.max_length = max(limits), None
    return [RowLimitCriteria(limits, start)] if min(limits) < max(limits) else []


class TokenTimer(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; knows when each token came, and calls `on_token` then, which may raise."""

    def __init__(self, on_token: Callable[[], None] | None = None) -> None:
        self.times: list[float] = []
        self.on_token = on_token

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.times.append(time.perf_counter())
        if self.on_token:
            self.on_token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def speed(self) -> float:
        """Tokens a second of each row, after its first; 0 where there was but one."""
        return 1 / statistics.median(b - a for a, b in pairwise(self.times)) if len(self.times) > 1 else 0.0


class DeltaStreamer(BaseStreamer):  # type: ignore[misc]
    """Passes text on as it is generated, only what no later token can change.

    Held back: the bytes of an unfinished character, and an ending that may become a stop text.
    """

    def __init__(self, decode: Decode, stops: Sequence[str], on_text: Callable[[str], None]) -> None:
        self.decode, self.stops, self.on_text = decode, stops, on_text
        self.ids: list[int] = []
        self.sent = 0
        self.is_prompt = True

    def put(self, value: Any) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self.decode(self.ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return
        end = first_stop(text, self.stops)
        end = len(text) - stop_prefix(text, self.stops) if end is None else end
        if end > self.sent:
            self.on_text(text[self.sent : end])
            self.sent = end

    def end(self) -> None:
        """The result brings the rest."""
