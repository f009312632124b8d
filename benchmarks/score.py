"""10,000 short lines scored: llmcli, against llmcli with one line a batch and the loop that people write, in the same
precision and in the one that the weights' folder names. Lines a second of whole processes, less what they take for a
single line: imports and loading."""

import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import LLMCLI, smollm2

LINES, PART, RUNS = 10_000, 1000, 3  # PART of the lines go one at a time
LOOP = """
import math, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, lines, dtype = sys.argv[1], open(sys.argv[2]).read().splitlines(), sys.argv[3]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
for line in lines:
    ids = tokenizer(line, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        print(math.exp(model(ids, labels=ids).loss.item()), line, sep="\\t")
"""


def lines(count: int) -> list[str]:
    """Runs of 3 to 15 words from the project's licence, all different."""
    words = Path(__file__).parents[1].joinpath("LICENSE").read_text().split()
    chance, found = random.Random(7), dict[str, None]()
    while len(found) < count:
        length = chance.randint(3, 15)
        start = chance.randrange(len(words) - length)
        found[" ".join(words[start : start + length])] = None
    return list(found)


def rate(command: list[str], path: Path, count: int, single: Path) -> float:
    """Lines a second, what a single one takes taken off. The command has the file in the place of FILE."""
    times = []
    for file in (single, path):
        start = time.perf_counter()
        filled = [str(file) if part == "FILE" else part for part in command]
        subprocess.run(filled, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return (count - 1) / (times[1] - times[0])


def main() -> list[str]:
    """The rows of a table in Markdown."""
    model, texts = smollm2(), lines(LINES)
    with tempfile.TemporaryDirectory() as scratch:
        whole, part, single = (Path(scratch, f"{name}.txt") for name in ("whole", "part", "single"))
        for path, some in ((whole, texts), (part, texts[:: LINES // PART]), (single, texts[:1])):
            path.write_text("".join(f"{text}\n" for text in some))
        ours = [LLMCLI, "score", "--keep-alive", "0", "--lines", "--dtype", "bfloat16", "-f", "FILE"]
        loop = [sys.executable, "-c", LOOP, model, "FILE"]
        rows = {
            "llmcli": (ours, whole, LINES),
            "llmcli, `--batch-size 1`": ([*ours, "--batch-size", "1"], part, PART),
            "a loop over the model, bfloat16": ([*loop, "bfloat16"], part, PART),
            "a loop over the model, float32, its default": ([*loop, "float32"], part, PART),
        }
        found: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(RUNS):
            for name, (command, path, count) in rows.items():
                found[name].append(rate(command, path, count, single))
    best = found["llmcli"]
    return [
        f"| {name} | {statistics.median(rates):.0f} |"
        f" {statistics.median(mine / each for mine, each in zip(best, rates, strict=True)):.1f} |"
        for name, rates in found.items()
    ]


if __name__ == "__main__":
    print("\n".join(main()))
