"""Whole processes timed in turn, ours and a peer's, so that the ratio holds on a noisy machine."""

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LLMCLI = str(Path(sys.executable).with_name("llmcli"))  # the console script, as a shell starts it


def smollm2() -> str:
    """The folder of the default model, fetched if need be."""
    pulled = subprocess.run([LLMCLI, "models", "pull", "smollm2"], check=True, capture_output=True, text=True)
    return pulled.stdout.strip()


def generate(pipeline: Any, rows: Sequence[Any], config: Any, constraint: str | None = None) -> list[Any]:
    """Do what the engine does with preprocessed rows of one batch, and return their outputs."""
    from llmcli.pipelines.running import BatchSettings, GeneratingRow

    new = config.max_new_tokens
    length = new + max(len(row["input_ids"]) for row in rows)
    batch = pipeline.start(BatchSettings(config, max_rows=len(rows), max_length=length))
    batch.add([GeneratingRow(row, new, constraint) for row in rows])
    outputs: dict[int, Any] = {}
    while len(outputs) < len(rows):
        outputs |= batch.step()
    return [pipeline.postprocess(outputs[i], config) for i in range(len(rows))]


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
    pairs = [(seconds(ours), seconds(peer)) for _ in range(runs + 1)][1:]
    return Comparison(
        name,
        statistics.median(ours for ours, _ in pairs),
        statistics.median(peer for _, peer in pairs),
        statistics.median(ours / peer for ours, peer in pairs),
        runs,
    )


def seconds(command: Sequence[str]) -> float:
    """Wall time of one run. Raises CalledProcessError where the command fails."""
    start = time.perf_counter()
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start
