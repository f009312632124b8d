"""512 short records behind an instruction and examples of 80 tokens that all of them share: llmcli, which reads these
once, against llmcli made to read them with each record. Whole processes, bfloat16, at most 8 new tokens."""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from measure import LLMCLI, execute, pull

RECORDS, TOKENS, RUNS = 512, 8, 3
PROMPT = """Translate each English phrase into French. Give only the translation, on one line, without any \
comment at all.

English: the black cat
French: le chat noir

English: a glass of cold water
French: un verre d'eau froide

English: two old books
French: deux vieux livres

English: {text}
French:"""
APART = (
    "from llmcli.engines import batch_runner; batch_runner.MIN_PREFIX_TOKENS = 10**9; from llmcli.cli import run; run()"
)


def phrases() -> list[str]:
    """All different, of three words."""
    sizes = ["small", "big", "tall", "old", "new", "long", "round", "strange"]
    colours = ["red", "green", "blue", "white", "black", "brown", "yellow", "grey"]
    things = ["house", "dog", "boat", "hat", "garden", "door", "bird", "chair"]
    return [f"the {size} {colour} {thing}" for size in sizes for colour in colours for thing in things]


def main() -> list[str]:
    """The rows of a table in Markdown."""
    pull("smollm2")
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch, "in.jsonl")
        inputs.write_text("".join(json.dumps({"text": phrase}) + "\n" for phrase in phrases()[:RECORDS]))
        args = ["generate", "--jsonl", "-f", str(inputs), "--prompt", PROMPT, "--dtype", "bfloat16",
                "--temperature", "0", "--max-new-tokens", str(TOKENS), "--stop", "\n"]  # fmt: skip
        apart = [sys.executable, "-c", APART, *args]
        pairs = [(execute([LLMCLI, *args]).seconds, execute(apart).seconds) for _ in range(RUNS + 1)][1:]
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(peer / mine for mine, peer in pairs)
    return [f"| {RECORDS} records with a common prefix | {ours:.1f} s | {theirs:.1f} s | {ratio:.2f} | 1.7 |"]


if __name__ == "__main__":
    print("\n".join(main()))
