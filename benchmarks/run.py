"""make bench: every figure, measured here and now, into RESULTS.md with the machine and the versions."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import batch
import overhead
import prefix
import startup

HEADER = "| what | llmcli | peer | ratio | at most | runs |\n|---|---|---|---|---|---|"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("llmcli", "transformers", "torch", "typer"))
    machine = f"{processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`: medians of whole processes, ours and the peer's in turn; the ratio is the median of",
        "the ratios pair by pair. Times vary with the machine, ratios little.",
        "",
        f"{machine}; {packages}.",
        "",
        "## Start-up",
        "",
        "The peer of `--help` is a bare Typer program's; of a cold `generate`, the shortest transformers script that",
        "does the same with the same weights (float32, greedy).",
        "",
        HEADER,
        *startup.main(),
        "",
        "## Batches",
        "",
        f"{batch.PROMPTS} prompts of 4 to 200 words, SmolLM2, bfloat16, {batch.TOKENS} new tokens each, greedy:",
        "whole processes, from the first import to the last line. The loops run each eighth prompt.",
        "",
        "| what | tokens/s | llmcli's gain |",
        "|---|---|---|",
        *batch.main(),
        "",
        "What a shared beginning of 80 tokens saves, against llmcli made to read it with each record:",
        "",
        "| what | llmcli | apart | gain | at least |",
        "|---|---|---|---|---|",
        *prefix.main(),
        "",
        "What llmcli itself costs a record, with a model that answers at once; and how much the resident set grows",
        f"from {overhead.FEW:,} records to {overhead.MANY:,}:",
        "",
        "| what | records/s | at least | growth | at most |",
        "|---|---|---|---|---|",
        *overhead.main(),
    ]
    path = Path(__file__).with_name("RESULTS.md")
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
