"""Count the results of a run, show how far it is, and print statistics at its end."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from llmcli import console
from llmcli.io.output import to_json
from llmcli.job import Record, Result
from llmcli.models.memory import peak_memory


@dataclass
class RunCounts:
    """How many records a run has done, and what became of them."""

    records: int = 0  # that have a result
    failed: int = 0
    carried_over: int = 0  # records that came with the error of an earlier run
    written: int = 0  # results that a filter did not drop
    tokens: Counter[str] = field(default_factory=Counter)  # by their names in `usage`

    def add(self, result: Result, written: int = 1) -> None:
        """Count a record of which `written` results were written."""
        self.records += 1
        self.failed += (result.failure is not None) + len(result.output.get("failures", ()))
        self.carried_over += result.is_carried_over
        self.written += written
        for name, count in result.output.get("usage", {}).items():  # Counter.update is four times slower.
            self.tokens[name] += count


class Progress:
    """How far a run is."""

    def __init__(self, before: RunCounts) -> None:
        self.done = RunCounts(before.records, before.failed)  # with results that wait for those of earlier records
        self._succeeded_before = before.records - before.failed
        self._read = 0
        self._input_fraction: float | None = None
        self._samples: list[tuple[float, int, int]] = []  # time, records, tokens: the first and the latest

    def track(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records, and count them as they are read."""
        for record in records:
            self._read += 1
            self._input_fraction = record.input_fraction
            yield record
        self._input_fraction = 1

    def line(self) -> str:
        """Return e.g. `96 of ~1280 records, 1 failed, 0:07:36 left, 2.6 records/s, 41 tokens/s`.

        Unknown parts are left out; a single record has no line. Rates start with the first result.
        """
        if self._read < 2:
            return ""
        now, records, tokens = time.perf_counter(), self.done.records, self.done.tokens["completion_tokens"]
        total = round(self._read / self._input_fraction) if self._input_fraction else None
        tilde = "" if self._input_fraction == 1 else "~"
        parts = [f"{records} of {tilde}{total} records" if total else f"{records} records"]
        if self.done.failed:
            parts.append(f"{self.done.failed} failed")
        has_succeeded = records - self.done.failed > self._succeeded_before
        if has_succeeded and (not self._samples or records > self._samples[-1][1]):
            self._samples[1:] = [(now, records, tokens)]
        if len(self._samples) == 2:
            (start, *first), (end, *latest) = self._samples
            rate, token_rate = ((n - m) / (end - start) for m, n in zip(first, latest, strict=True))
            if total:
                seconds = max(0, (total - records) / rate - (now - end))
                parts.append(f"{timedelta(seconds=round(seconds))} left")
            parts.append(f"{_format_rate(rate)} records/s")
            if tokens:
                parts.append(f"{_format_rate(token_rate)} tokens/s")
        return ", ".join(parts)


@contextmanager
def print_statistics(model: str, counts: RunCounts) -> Iterator[None]:
    """Print a JSON object to stderr at the end, even after an error. Rates leave out what an earlier run has done."""
    start, before = time.perf_counter(), counts.records
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        prompt, completion = map(counts.tokens.get, ("prompt_tokens", "completion_tokens"))
        statistics = {
            "model": model, "records": counts.records, "failed": counts.failed, "carried_over": counts.carried_over,
            "written": counts.written, "seconds": round(seconds, 3),
            "records_per_second": round((counts.records - before) / seconds, 3),
            "prompt_tokens": prompt, "completion_tokens": completion,
            "tokens_per_second": None if completion is None else round(completion / seconds, 3),
            "peak_memory_bytes": peak_memory(),
        }  # fmt: skip
        console.print_line(to_json(statistics))


def _format_rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
