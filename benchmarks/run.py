"""make bench: every figure, measured here and now, into RESULTS.md with the machine and the versions. With names of
sections, `run.py batch prefix`, those alone are measured again."""

import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import batch
import decode
import overhead
import prefix
import score
import startup
import worker

SECTIONS: dict[str, tuple[str, str, str, Callable[[], list[str]]]] = {
    "startup": (
        "Start-up",
        """The peer of `--help` is a bare Typer program's; of a cold `generate`, the shortest transformers script that
does the same with the same weights (float32, greedy).""",
        "| what | llmcli | peer | ratio | at most | runs |\n|---|---|---|---|---|---|",
        startup.main,
    ),
    "worker": (
        "A warm worker",
        f"""`--keep-alive`: SmolLM2, bfloat16, greedy; whole processes, medians of {worker.RUNS} runs in turn. The
loop has {worker.WARM_LOOP} calls to a warm worker, or {worker.COLD_LOOP} cold ones; times are of one call.""",
        "| what | warm | peer | ratio | bound |\n|---|---|---|---|---|",
        worker.main,
    ),
    "decode": (
        "One stream",
        f"""SmolLM2, {decode.TOKENS} new tokens, greedy, bfloat16; plain `generate` and llmcli in one process, in
turn, medians of {decode.RUNS}. Perplexity is that of {decode.TEXT:,} tokens of this project's own pages; loading is
that of a process of its own, first pass included, and the memory that it has then.""",
        "| what | tokens/s | to plain | perplexity | loading | memory |\n|---|---|---|---|---|---|",
        decode.main,
    ),
    "batch": (
        "Batches",
        f"""{batch.PROMPTS} prompts of 4 to 200 words, SmolLM2, bfloat16, {batch.TOKENS} new tokens each, greedy; whole
processes, from the first import to the last line, median of {batch.RUNS}. The loops run each eighth prompt; llama.cpp
reads weights of four bits.""",
        "| what | tokens/s | llmcli's gain |\n|---|---|---|",
        batch.main,
    ),
    "score": (
        "Scores",
        f"""{score.LINES:,} lines of 3 to 15 words, SmolLM2, bfloat16; {score.PART:,} of them where they go one at a
time. Lines a second of whole processes, less what they take for a single line; medians of {score.RUNS}, in turn.""",
        "| what | lines/s | llmcli's gain |\n|---|---|---|",
        score.main,
    ),
    "prefix": (
        "A shared beginning",
        """Short records behind an instruction and examples of 80 tokens; against llmcli made to read these with each
record.""",
        "| what | llmcli | apart | gain | at least |\n|---|---|---|---|---|",
        prefix.main,
    ),
    "overhead": (
        "What llmcli itself costs",
        f"""JSON Lines through `generate`, with a model that answers at once; and how much the resident set grows from
{overhead.FEW:,} records to {overhead.MANY:,}.""",
        "| what | records/s | at least | growth | at most |\n|---|---|---|---|---|",
        overhead.main,
    ),
}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    path = Path(__file__).with_name("RESULTS.md")
    known = {text.partition("\n")[0]: text for text in path.read_text().split("\n## ")[1:]} if path.exists() else {}
    for name in sys.argv[1:] or SECTIONS:
        title, about, header, measure = SECTIONS[name]
        known[title] = "\n".join([title, "", about, "", header, *measure(), ""])
    packages = ", ".join(f"{name} {version(name)}" for name in ("llmcli", "transformers", "torch", "typer"))
    machine = f"{processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    head = f"""# Benchmarks

Written by `make bench`: medians of whole processes, ours and the peers' in turn. Times vary with the machine, ratios
little.

{machine}; {packages}.
"""
    sections = [known[title].rstrip("\n") + "\n" for title, *_ in SECTIONS.values() if title in known]
    path.write_text("\n## ".join([head, *sections]))
    print(path.read_text())


if __name__ == "__main__":
    main()
