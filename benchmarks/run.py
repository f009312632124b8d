"""Measure the parts, keep the figures in results.json, and write RESULTS.md from them: one table per part and CPU.

`run.py batch prefix` measures only the named parts. A table keeps the machine, the versions and the date of its run.
Peers that are installed outside this environment are named by LLAMA_BIN and LLAMA_GGUF (see llama.py), CT2_PYTHON
(seq2seq.py), ST_PYTHON and T4_PYTHON (encoders.py). A peer that is missing leaves its rows out."""

import argparse
import datetime
import functools
import json
import os
import platform
import re
import textwrap
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import encoders
import generation
import labels
import llama
import overhead
import prefix
import score
import seq2seq
import startup
import worker
from measure import report

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "CT2_FORCE_CPU_ISA": "AVX2",
}  # fmt: skip
INSTRUCTIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "bfloat16", "amx_tile": "AMX", "asimd": "NEON"}
SPEED = "| variant | {} | speedup of llmcli | memory |\n|---|---|---|---|"
WHOLE = "Times are those of whole processes, from the first import to the last line, with loading."
STREAM = """One answer of {} new tokens after a prompt of 14, greedy, without loading. llmcli ran the same command once
before. llama.cpp is measured by llama-bench, and Transformers in its faster data type."""
LLAMA = f"""{{}} prompts of 4 to {generation.MAX_WORDS} words, {generation.TOKENS} new tokens each, greedy. {WHOLE}
llama-server gets the prompts from {llama.CLIENTS} concurrent clients."""
EQUAL = f"""{WHOLE} The last column counts the records with the same text as the loop. All texts have the same number of
tokens. The weights are random."""

Part = tuple[str, str, str, Callable[[], list[str]]]
PARTS: dict[str, Part] = {
    "startup": (
        "Startup time",
        "The peer of `--help` is the help of an empty Typer program.",
        "| benchmark | llmcli | peer | ratio | maximum | runs |\n|---|---|---|---|---|---|",
        startup.main,
    ),
    "cold": (
        "Cold start and memory",
        """One token by a cold `generate`. The peer is the shortest Transformers script that does the same with the same
weights, which loads them as they are saved if llmcli has its default data type.""",
        "| model | llmcli | memory | peer | memory | ratio | maximum |\n|---|---|---|---|---|---|---|",
        startup.cold,
    ),
    "worker": (
        "Warm worker",
        f"""SmolLM2, bfloat16, greedy decoding, with `--keep-alive`. Times are those of whole processes, medians of
{worker.RUNS} alternating runs. The loop has {worker.WARM_LOOP} warm calls or {worker.COLD_LOOP} cold calls, and shows
the time of one call.""",
        "| benchmark | warm | peer | ratio | bound |\n|---|---|---|---|---|",
        worker.main,
    ),
    "stream": (
        "Single stream",
        f"SmolLM2 135M. {STREAM.format(generation.STREAM['smollm2'])}",
        SPEED.format("tokens/s"),
        functools.partial(generation.stream, "smollm2"),
    ),
    "stream-1b": (
        "Single stream, 1.1 billion parameters",
        f"A Llama with random weights. {STREAM.format(generation.STREAM['llama-1b'])}",
        SPEED.format("tokens/s"),
        functools.partial(generation.stream, "llama-1b"),
    ),
    "batch": (
        "Batch inference",
        f"SmolLM2 135M. {LLAMA.format(generation.PROMPTS['smollm2'])}",
        SPEED.format("tokens/s"),
        functools.partial(generation.batch, "smollm2"),
    ),
    "batch-1b": (
        "Batch inference, 1.1 billion parameters",
        f"A Llama with random weights. {LLAMA.format(generation.PROMPTS['llama-1b'])}",
        SPEED.format("tokens/s"),
        functools.partial(generation.batch, "llama-1b"),
    ),
    "plain": (
        "Batch inference with Transformers",
        f"""{generation.PROMPTS["smollm2"]} prompts of 4 to {generation.MAX_WORDS} words, SmolLM2, {generation.TOKENS}
new tokens each, greedy. {WHOLE} Transformers has its faster data type and its best batch size of
{", ".join(map(str, generation.ROWS))}.""",
        SPEED.format("tokens/s"),
        generation.plain,
    ),
    "ends": (
        "Answers of different lengths",
        f"""{generation.ENDING:,} prompts of 4 to {generation.ENDING_WORDS} words, SmolLM2, bfloat16, sampled. One token
in {generation.END_EVERY} ends an answer, and an answer has at most {generation.MAX_TOKENS} tokens. {WHOLE} One run
each. The pipeline runs every 16th prompt.""",
        SPEED.format("records/s"),
        generation.ends,
    ),
    "translate": (
        "Translation",
        f"""A model of the size of OPUS-MT, sentences of 3 to 15 words, {seq2seq.SENTENCE_TOKENS} new tokens each.
{EQUAL}""",
        SPEED.format("records/s").replace("memory |", "memory | same text |") + "---|",
        seq2seq.translate,
    ),
    "summarize": (
        "Summarization",
        f"""A BART with 6 and 6 layers, {seq2seq.SUMMARY_TOKENS} new tokens for each document of
{seq2seq.DOCUMENT_WORDS[0]} to {seq2seq.DOCUMENT_WORDS[1]} words. {EQUAL}""",
        SPEED.format("records/s").replace("memory |", "memory | same text |") + "---|",
        seq2seq.summarize,
    ),
    "embed": (
        "Embeddings",
        f"""{encoders.EMBEDDED:,} lines of 3 to 15 words, MiniLM. {WHOLE} The last column is the maximum
difference from the last row in a component of a vector.""",
        SPEED.format("lines/s").replace("memory |", "memory | difference |") + "---|",
        encoders.embed,
    ),
    "qa": (
        "Extractive question answering",
        f"""{encoders.PAIRS} pairs with contexts of {encoders.CONTEXT_WORDS[0]} to {encoders.CONTEXT_WORDS[1]} words, a
BERT base with random weights. {WHOLE} The pipeline has its best batch size of {", ".join(map(str, encoders.ROWS))}. The
last column counts the records with the same answer as the last row.""",
        SPEED.format("pairs/s").replace("memory |", "memory | same answer |") + "---|",
        encoders.qa,
    ),
    "search": (
        "Search",
        f"{encoders.SEARCHED:,} lines of 3 to 15 words from stdin, MiniLM. {WHOLE}",
        "| query | time | memory |\n|---|---|---|",
        encoders.search,
    ),
    "perplexity": (
        "Perplexity",
        f"""Of {score.TOKENS:,} tokens of this project's pages, by `score`, against float32.""",
        "| model | option | perplexity | change |\n|---|---|---|---|",
        score.perplexity,
    ),
    "score": (
        "Scoring",
        f"""{score.LINES:,} lines of 3 to 15 words, SmolLM2, bfloat16. The variants without batches run {score.PART:,}
of these lines. The time for a single line is subtracted from the time of a whole process.""",
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
RESULTS = Path(__file__).with_name("results.json")
HEAD = """# Benchmarks

`make bench` writes this page, from the figures in `results.json`. Each table names its CPU and the date of its run.
llmcli and its peers run alternately on the same machine, in the same run, and the figures are medians of the rounds.
Both times and ratios depend on the machine: its CPU, its memory bandwidth, and its load.

"""


def name_machine(limit: str | None) -> str:
    """The CPU with its instruction sets, or those that the run is limited to."""
    try:
        about = dict(line.split("\t: ", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if "\t: " in line)
    except OSError:
        about = {}
    about = {name.strip(): value for name, value in about.items()}
    flags = about.get("flags", about.get("Features", "")).split()
    sets = [name for flag, name in INSTRUCTIONS.items() if flag in flags]
    name = about.get("model name") or platform.processor() or platform.machine()
    sets = [f"limited to {limit.upper()}"] if limit else [f"with {', '.join(sets)}"] if sets else []
    return ", ".join([" ".join(re.sub(r"\(R\)|Processor", "", name).split()), *sets, f"{os.cpu_count()} cores"])


def describe_run(given: argparse.Namespace) -> str:
    """The versions, and how this run differs from the usual one."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("llmcli", "transformers", "torch"))
    share = [f"{given.scale:.0%} of the records"] if given.scale != 1 else []
    return "; ".join([f"Python {platform.python_version()}, {packages}", f"rounds: {given.rounds}", *share])


def write_page(known: dict[str, dict[str, dict[str, str]]]) -> None:
    """Write RESULTS.md: the parts, each with a table per machine."""
    page = HEAD
    for name, (title, about, _, _) in PARTS.items():
        if name in known:
            page += f"## {title}\n\n{textwrap.fill(' '.join(about.split()), 120)}\n\n"
            for machine, run in known[name].items():
                page += f"**{machine}** ({run['date']}; {run['about']})\n\n{run['table']}\n\n"
    RESULTS.with_name("RESULTS.md").write_text(page.rstrip("\n") + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the numbers of records")
    parser.add_argument("--rounds", type=int, default=3, help="of each variant (default: 3)")
    parser.add_argument("--limit", choices=["avx2"], help="run all as on a CPU with this instruction set only")
    parser.add_argument("--render", action="store_true", help="write the page again, without measuring")
    given = parser.parse_args()
    if unknown := set(given.parts) - PARTS.keys():
        parser.error(f"unknown: {', '.join(unknown)}")
    os.environ |= {"BENCH_SCALE": str(given.scale), "BENCH_ROUNDS": str(given.rounds)} | (AVX2 if given.limit else {})
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [] if given.render else given.parts or PARTS:
        _, _, header, measure = PARTS[name]
        report(f"part {name}")
        run = {"date": f"{datetime.date.today():%Y-%m-%d}", "about": describe_run(given)}
        try:
            run["table"] = "\n".join([header, *measure()])
        except RuntimeError as exc:  # The other parts run all the same.
            report(f"part {name} failed:", exc)
            continue
        known.setdefault(name, {})[name_machine(given.limit)] = run
        RESULTS.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")
        print(run["table"], flush=True)
    write_page(known)


if __name__ == "__main__":
    main()
