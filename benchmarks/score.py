"""Perplexity of each data type; and 10,000 short lines scored, against llmcli with one line per batch and the loop that
people write. Lines per second of whole processes, less the time for a single line: imports and loading."""

import json
import statistics
import tempfile
from pathlib import Path

from inputs import lines, model, text
from measure import LLMCLI, PYTHON, execute, report, rounds, scaled

LINES, PART = 10_000, 1000  # PART of the lines go one at a time
TOKENS = 10_000  # for perplexity
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


def rate(command: list[str], path: Path, count: int, single: Path) -> float:
    """Lines per second, less the time for a single one. The command has the file in the place of FILE."""
    one, all_lines = (execute([str(file) if part == "FILE" else part for part in command]) for file in (single, path))
    return (count - 1) / (all_lines.seconds - one.seconds)


def main() -> list[str]:
    """The rows of a table in Markdown."""
    folder, total, few = model("smollm2"), scaled(LINES), scaled(PART)
    texts = lines(total)
    with tempfile.TemporaryDirectory() as scratch:
        whole, part, single = (Path(scratch, f"{name}.txt") for name in ("whole", "part", "single"))
        for path, some in ((whole, texts), (part, texts[:few]), (single, texts[:1])):
            path.write_text("".join(f"{text}\n" for text in some))
        ours = [LLMCLI, "score", "--keep-alive", "0", "--lines", "--dtype", "bfloat16", "-f", "FILE"]
        loop = [*PYTHON, LOOP, folder, "FILE"]
        rows = {
            "llmcli": (ours, whole, total),
            "llmcli, `--batch-size 1`": ([*ours, "--batch-size", "1"], part, few),
            "a loop over the model, bfloat16": ([*loop, "bfloat16"], part, few),
            "a loop over the model, float32, its default": ([*loop, "float32"], part, few),
        }
        found: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(rounds()):
            for name, (command, path, count) in rows.items():
                found[name].append(rate(command, path, count, single))
    best = found["llmcli"]
    return [
        f"| {name} | {statistics.median(rates):.0f} |"
        f" {statistics.median(mine / each for mine, each in zip(best, rates, strict=True)):.1f} |"
        for name, rates in found.items()
    ]


def perplexity() -> list[str]:
    """The rows of a table in Markdown: the same text by each data type and quantization, through the real command."""
    from tokenizers import Tokenizer

    rows = []
    for name in ("smollm2", "gemma3-270m"):
        tokenizer = Tokenizer.from_file(f"{model(name)}/tokenizer.json")
        count = scaled(TOKENS)
        some = tokenizer.decode(tokenizer.encode(text(), add_special_tokens=False).ids[:count])
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "in.txt")
            path.write_text(some)
            command = [LLMCLI, "score", "--json", "-m", model(name), "-f", str(path), "--keep-alive", "0"]
            expected = None
            for option in ("--dtype float32", "", "--dtype bfloat16", "--quantize int8", "--quantize int4"):
                run = execute([*command, *option.split()])
                found = json.loads(run.output)["perplexity"]
                expected = expected or found
                report(name, option, found, f"{run.seconds:.1f} s")
                rows.append(
                    f"| {name} | {f'`{option}`' if option else 'default'} | {found:.3f} | {found / expected - 1:+.2%} |"
                )
    return rows


if __name__ == "__main__":
    print("\n".join(main()))
