"""What a warm worker saves: a call, a hundred in a shell loop, eight at once; and what its memory does over a thousand.
Whole processes, SmolLM2 in bfloat16, greedy."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from measure import LLMCLI, compare, execute
from startup import BARE_TYPER

from llmcli import engines
from llmcli.engines.worker import client
from llmcli.job import Job, LoadOptions, Record

CALL = [LLMCLI, "generate", "Once upon a time", "--temperature", "0", "--dtype", "bfloat16", "--max-new-tokens"]
RUNS, WARM_LOOP, COLD_LOOP, CLIENTS, JOBS = 5, 100, 4, 8, 1000


@contextmanager
def worker() -> Iterator[None]:
    """One of the benchmark's own, for the calls of this process."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        subprocess.run([*CALL, "1", "--keep-alive", "1h"], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run([LLMCLI, "stop"], check=True)


def loop(count: int, *options: str) -> list[str]:
    """A shell that calls so many times."""
    return ["sh", "-c", f'for i in $(seq {count}); do "$@" || exit 1; done', "sh", *CALL, "16", *options]


def at_once(count: int) -> tuple[float, float, set[bytes]]:
    """So many clients: seconds until the first and until the last has its answer, and the answers."""
    start = time.perf_counter()

    def call(_: int) -> tuple[float, bytes]:
        ran = subprocess.run([*CALL, "16"], check=True, capture_output=True)
        return time.perf_counter() - start, ran.stdout

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(call, range(count)))
    times = [spent for spent, _ in found]
    return min(times), max(times), {answer for _, answer in found}


def growth() -> float:
    """The worker's memory after JOBS jobs over that after 50. Their prompts differ in length."""
    repeats, after = [7, 40, 3, 90, 15], {}
    for done in range(1, JOBS + 1):
        generation = {"max_new_tokens": 4, "do_sample": False}
        job = Job("generate", "smollm2", generation, load_options=LoadOptions(dtype="bfloat16"))
        text = f"{done} " + "the harbour in winter " * repeats[done % len(repeats)]
        (result,) = engines.engine_for(job).run(job, [Record({"text": text})])
        assert not result.failure, result.failure
        if done in (50, JOBS):
            after[done] = client.status()["memory"]
    return after[JOBS] / after[50]


def main() -> list[str]:
    """The rows of a table in Markdown."""
    with worker(), tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch, "bare_typer.py")
        script.write_text(BARE_TYPER)
        call = compare("a call of 1 token", [*CALL, "1"], [*CALL, "1", "--keep-alive", "0"], RUNS)
        bare = compare("", [*CALL, "1"], [sys.executable, str(script), "--help"], 2 * RUNS + 1)
        loops = [
            (
                execute(loop(WARM_LOOP)).seconds / WARM_LOOP,
                execute(loop(COLD_LOOP, "--keep-alive", "0")).seconds / COLD_LOOP,
            )
            for _ in range(RUNS)
        ]
        warm, cold = (statistics.median(times) for times in zip(*loops, strict=True))
        gain = statistics.median(theirs / ours for ours, theirs in loops)
        alone = subprocess.run([*CALL, "16"], check=True, capture_output=True).stdout
        crowds = [at_once(CLIENTS) for _ in range(RUNS)]
        assert all(answers == {alone} for _, _, answers in crowds), "an answer is another's"
        first, last = (statistics.median(times) for times in list(zip(*crowds, strict=True))[:2])
        grown = growth()
    return [
        f"| one call, 1 token (peer: cold) | {call.ours:.3f} s | {call.peer:.3f} s | {call.ratio:.3f} | 0.10 |",
        f"| the same (peer: an empty Typer program) | {bare.ours:.3f} s | {bare.peer:.3f} s "
        f"| {bare.ours - bare.peer:+.3f} s | 0.15 s |",
        f"| one call of a shell loop, 16 tokens (peer: cold) | {warm:.3f} s | {cold:.3f} s | {gain:.1f} times faster "
        "| 5 times |",
        f"| {CLIENTS} concurrent clients, 16 tokens each: the last one (peer: {CLIENTS} calls in a row) | {last:.3f} s "
        f"| {CLIENTS * warm:.3f} s | {last / (CLIENTS * warm):.2f} | |",
        f"| the same (peer: the first one) | {last:.3f} s | {first:.3f} s | {last / first:.2f} | |",
        f"| memory after {JOBS:,} calls (peer: after 50) | | | {grown:.3f} | 1.05 |",
    ]


if __name__ == "__main__":
    print("\n".join(main()))
