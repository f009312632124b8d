"""What a run has done: its counts, the line that shows them while it goes on, the summary at its end."""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

from llmcli import console
from llmcli.io.output import to_json
from llmcli.job import Record, Result


@dataclass
class Tally:
    """How many results there are, and what became of them; how many tokens they took, by their names in `usage`."""

    records: int = 0
    failed: int = 0
    carried_over: int = 0  # came with the error of an earlier run
    written: int = 0  # were not dropped
    tokens: Counter[str] = field(default_factory=Counter)

    def add(self, result: Result) -> None:
        self.records += 1
        self.failed += result.failure is not None
        self.carried_over += result.record.has_error
        self.written += not result.dropped
        for name, count in result.output.get("usage", {}).items():  # Counter.update takes four times as long
            self.tokens[name] += count


class Progress:
    """How far a run is that goes on after the records of `before`. `done` are the results that are there, those whose
    turn is yet to come among them."""

    def __init__(self, before: Tally) -> None:
        self.done = Tally(before.records, before.failed)
        self._before = before.records - before.failed
        self._read = 0
        self._share: float | None = None
        self._looks: list[tuple[float, int, int]] = []  # time, records, tokens: when the first came, and the latest

    def reading(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records, counted as they are read."""
        for record in records:
            self._read += 1
            self._share = record.input_fraction
            yield record
        self._share = 1

    def line(self) -> str:
        """`96 of ~1280 records, 1 failed, 0:07:36 left, 2.6 records/s, 41 tokens/s`, as far as it is known; nothing for
        a single record. Rates count from the first results on, and so leave out what loading took."""
        if self._read < 2:
            return ""
        now, records, tokens = time.perf_counter(), self.done.records, self.done.tokens["completion_tokens"]
        total = round(self._read / self._share) if self._share else None
        about = "" if self._share == 1 else "~"
        parts = [f"{records} of {about}{total} records" if total else f"{records} records"]
        if self.done.failed:
            parts.append(f"{self.done.failed} failed")
        if records - self.done.failed > self._before and (not self._looks or records > self._looks[-1][1]):
            self._looks[1:] = [(now, records, tokens)]
        if len(self._looks) == 2:
            (start, *first), (end, *latest) = self._looks
            rate, token_rate = ((n - m) / (end - start) for m, n in zip(first, latest, strict=True))
            if total:
                left = max(0, (total - records) / rate - (now - end))
                parts.append(f"{timedelta(seconds=round(left))} left")
            parts.append(f"{_short(rate)} records/s")
            if tokens:
                parts.append(f"{_short(token_rate)} tokens/s")
        return ", ".join(parts)


@contextmanager
def summary(model: str, tally: Tally) -> Iterator[None]:
    """At the end, however it comes, a JSON object on stderr: counts, seconds, rates a second, and the most bytes of
    main memory that the process took. What does not apply is null; what was done before counts in no rate."""
    start, before = time.perf_counter(), tally.records
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        prompt, completion = map(tally.tokens.get, ("prompt_tokens", "completion_tokens"))
        about = {
            "model": model,
            "records": tally.records,
            "failed": tally.failed,
            "carried_over": tally.carried_over,
            "written": tally.written,
            "seconds": round(seconds, 3),
            "records_per_second": round((tally.records - before) / seconds, 3),
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "tokens_per_second": None if completion is None else round(completion / seconds, 3),
        }
        with suppress(ImportError):  # Windows has no such module
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            about["peak_memory_bytes"] = peak if sys.platform == "darwin" else peak * 1024
        console.say(to_json(about))


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
