"""What all parts share: whole processes, timed in turn so that ratios hold on a noisy machine, and tables of them."""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

LLMCLI = str(Path(sys.executable).with_name("llmcli"))  # the console script, as a shell starts it
PYTHON = [sys.executable, "-c"]


def scaled(count: int) -> int:
    """The number of records in this run. BENCH_SCALE makes all parts smaller or larger."""
    return max(2, round(count * float(os.environ.get("BENCH_SCALE", "1"))))


def rounds() -> int:
    return int(os.environ.get("BENCH_ROUNDS", "3"))


def report(*what: object) -> None:
    print(time.strftime("%H:%M:%S"), *what, file=sys.stderr, flush=True)


@functools.cache
def pull(model: str) -> str:
    """The folder of a default model, fetched if need be."""
    pulled = subprocess.run([LLMCLI, "models", "pull", model], check=True, capture_output=True, text=True)
    return pulled.stdout.strip()


@dataclass(frozen=True)
class Run:
    """A process that did an amount of work. `memory` is its maximum resident set size in bytes."""

    seconds: float
    amount: float
    memory: int
    output: str

    @property
    def speed(self) -> float:
        return self.amount / self.seconds


Variant = Callable[[], Run]


def execute(command: Sequence[str], amount: float = 1) -> Run:
    """Run a whole process, from the first import to the last line."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        memory = wait(process)
        seconds = time.perf_counter() - start
        for stream in (out, err):
            stream.seek(0)
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {err.read()[-2000:]}")
        return Run(seconds, amount, memory, out.read())


def wait(process: subprocess.Popen) -> int:
    """The memory of a process, once it has ended."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def alternate(variants: dict[str, Variant]) -> dict[str, list[Run]]:
    """Run all variants in turn, in each round. A variant that fails is left out."""
    found: dict[str, list[Run]] = {name: [] for name in variants}
    for number in range(rounds()):
        for name in list(found):
            try:
                run = variants[name]()
            except (RuntimeError, OSError) as exc:
                report(f"{name}: failed, left out:", exc)
                del found[name]
                continue
            found[name].append(run)
            report(f"round {number + 1}, {name}: {run.seconds:.2f} s, {run.speed:.1f}/s, {run.memory / 1e6:.0f} MB")
    return found


def choose(variants: dict[str, Variant]) -> str:
    """The name of the fastest variant, by one run of each."""
    speeds = {name: variant().speed for name, variant in variants.items()}
    report("chosen from", {name: f"{speed:.1f}/s" for name, speed in speeds.items()})
    return max(speeds, key=speeds.__getitem__)


def tabulate(found: dict[str, list[Run]], digits: int = 0, extra: Callable[[str, Run], str] | None = None) -> list[str]:
    """Rows in Markdown: speed, how much faster the first variant is (median of the rounds), and memory."""
    base = next(iter(found.values()), [])
    rows = []
    for name, runs in found.items():
        ratio = statistics.median(mine.speed / run.speed for mine, run in zip(base, runs, strict=True))
        cells = [name, f"{statistics.median(run.speed for run in runs):,.{digits}f}", f"{ratio:.2f}"]
        cells.append(f"{statistics.median(run.memory for run in runs) / 1e6:,.0f} MB")
        if extra:
            cells.append(extra(name, runs[-1]))
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def describe(runs: Sequence[Run]) -> str:
    """Cells in Markdown: median seconds, and memory."""
    return " | ".join(
        (f"{statistics.median(run.seconds for run in runs):.2f} s",
         f"{statistics.median(run.memory for run in runs) / 1e6:,.0f} MB")
    )  # fmt: skip


def count_equal(texts: Iterable[object], others: Iterable[object]) -> str:
    same = [one == other for one, other in zip(texts, others, strict=True)]
    return f"{sum(same)} of {len(same)}"


@dataclass(frozen=True)
class Comparison:
    """Medians in seconds, and the median of the ratios ours/peer pair by pair."""

    name: str
    ours: float
    peer: float
    ratio: float
    runs: int

    def row(self, bound: str = "") -> str:
        return f"| {self.name} | {self.ours:.3f} s | {self.peer:.3f} s | {self.ratio:.2f} | {bound} | {self.runs} |"


def compare(name: str, ours: Sequence[str], peer: Sequence[str], runs: int) -> Comparison:
    """Run the two commands in turn, after one warm-up of each that is not counted."""
    pairs = [(execute(ours).seconds, execute(peer).seconds) for _ in range(runs + 1)][1:]
    return Comparison(
        name,
        statistics.median(ours for ours, _ in pairs),
        statistics.median(peer for _, peer in pairs),
        statistics.median(ours / peer for ours, peer in pairs),
        runs,
    )
