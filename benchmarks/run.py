"""make bench: measure every figure and write RESULTS.md, with the machine and the versions.

`run.py batch prefix` measures only the named sections again."""

import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import batch
import decode
import labels
import overhead
import prefix
import score
import startup
import worker

SECTIONS: dict[str, tuple[str, str, str, Callable[[], list[str]]]] = {
    "startup": (
        "Startup time",
        """The peer of `--help` is the help of an empty Typer program. The peer of a cold `generate` is the shortest
Transformers script that does the same with the same weights (float32, greedy decoding).""",
        "| benchmark | llmcli | peer | ratio | maximum | runs |\n|---|---|---|---|---|---|",
        startup.main,
    ),
    "worker": (
        "Warm worker",
        f"""SmolLM2, bfloat16, greedy decoding, with `--keep-alive`. Times are those of whole processes, medians of
{worker.RUNS} alternating runs. The loop has {worker.WARM_LOOP} warm calls or {worker.COLD_LOOP} cold calls, and shows
the time of one call.""",
        "| benchmark | warm | peer | ratio | bound |\n|---|---|---|---|---|",
        worker.main,
    ),
    "decode": (
        "Single stream",
        f"""SmolLM2, {decode.TOKENS} new tokens, greedy decoding, bfloat16. Plain `generate` and llmcli alternate in
one process; the figures are medians of {decode.RUNS} runs. Perplexity is measured on {decode.TEXT:,} tokens of this
project's pages. Loading time includes the first forward pass, in a separate process, and memory is the memory of that
process.""",
        "| variant | tokens/s | relative to plain | perplexity | loading | memory |\n|---|---|---|---|---|---|",
        decode.main,
    ),
    "batch": (
        "Batch inference",
        f"""{batch.PROMPTS} prompts of 4 to 200 words, SmolLM2, bfloat16, {batch.TOKENS} new tokens each, greedy
decoding. Times are those of whole processes, from the first import to the last line, medians of {batch.RUNS}. The two
loops run every eighth prompt, one prompt at a time. llama-cpp-python uses 4-bit weights, and its loop does not use
the parallel decoding of llama.cpp, so that row does not compare the two programs.""",
        "| variant | tokens/s | speedup of llmcli |\n|---|---|---|",
        batch.main,
    ),
    "ends": (
        "Answers of different lengths",
        f"""{batch.ENDING:,} prompts of 4 to {batch.ENDING_WORDS} words, SmolLM2, bfloat16, sampled. One token in
{batch.END_EVERY} ends an answer, and an answer has at most {batch.MAX_TOKENS} tokens. Times are those of whole
processes, one run each. The pipeline runs every 16th prompt.""",
        "| variant | records/s | speedup of llmcli |\n|---|---|---|",
        batch.ends,
    ),
    "score": (
        "Scoring",
        f"""{score.LINES:,} lines of 3 to 15 words, SmolLM2, bfloat16. The variants without batches run {score.PART:,}
of these lines. The time for a single line is subtracted from the time of a whole process. Medians of {score.RUNS}
alternating runs.""",
        "| variant | lines/s | speedup of llmcli |\n|---|---|---|",
        score.main,
    ),
    "labels": (
        "Labeling",
        f"""{labels.RECORDS:,} records of 3 to 15 words, five labels of one word each, SmolLM2, bfloat16. The
`decision` pipeline of Transformers takes one prompt at a time, and answers with a letter. It and the loop run
{labels.PART} of the records. `generate` stops after {labels.NEW_TOKENS} tokens. The time for a single record is
subtracted from the time of a whole process. Medians of {labels.RUNS} alternating runs.""",
        "| variant | records/s | speedup of llmcli |\n|---|---|---|",
        labels.speed,
    ),
    "accuracy": (
        "Accuracy of labels",
        f"""The share of right labels on the 200 sentences of `tests/data`, float32. The score is that of the best
label. The calibration error is the expected calibration error with 10 bins. The second table has the share of right
labels by score. The free answers are greedy, with at most {labels.ANSWER_TOKENS} tokens.""",
        "| labels | model | method | right | mean score | calibration error |\n|---|---|---|---|---|---|",
        labels.accuracy,
    ),
    "prefix": (
        "Prefix caching",
        """Short records after a common prefix of 80 tokens (an instruction and examples), compared with llmcli
without prefix caching.""",
        "| benchmark | llmcli | without | gain | minimum |\n|---|---|---|---|---|",
        prefix.main,
    ),
    "overhead": (
        "Overhead of llmcli",
        f"""JSON Lines through `generate` with a model that returns immediately, and the growth of the resident memory
from {overhead.FEW:,} to {overhead.MANY:,} records.""",
        "| variant | records/s | minimum | growth | maximum |\n|---|---|---|---|---|",
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

`make bench` writes this page. llmcli and its peers run alternately on the same machine, in the same run. Both times and
ratios depend on the machine: its CPU, its memory bandwidth, and its load.

{machine}; {packages}.
"""
    sections = [known[title].rstrip("\n") + "\n" for title, *_ in SECTIONS.values() if title in known]
    path.write_text("\n## ".join([head, *sections]))
    print(path.read_text())


if __name__ == "__main__":
    main()
