"""What a call costs before the first token: --help against a bare Typer program's, and cold calls against the shortest
scripts that do the same with Transformers, with the memory of both."""

import functools
import statistics
import sys
import tempfile
from pathlib import Path

from inputs import model
from measure import LLMCLI, PYTHON, Variant, alternate, compare, describe, execute

BARE_TYPER = '''
import typer
app = typer.Typer()
@app.command()
def main(name: str = "world"):
    """Say hello."""
    print(f"Hello {name}")
app()
'''
BARE_TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[2])
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, do_sample=False, max_new_tokens=1)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
COMMANDS = ([], ["generate"], ["chat"], ["embed"], ["search"], ["env"], ["models"], ["models", "list"],
            ["models", "show"], ["models", "pull"], ["models", "rm"], ["models", "path"])  # fmt: skip


COLD_MAXIMUM = 1.1


def main() -> list[str]:
    """The rows of a table in Markdown."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        typer = Path(scratch, "bare_typer.py")
        typer.write_text(BARE_TYPER)
        for command in COMMANDS:
            name = " ".join(["llmcli", *command, "--help"])
            found = compare(name, [LLMCLI, *command, "--help"], [sys.executable, str(typer), "--help"], runs=11)
            rows.append(found.row("2.0" if command else "1.5"))
    return rows


def cold() -> list[str]:
    """The rows of a table in Markdown."""
    greedy = ["generate", "Once upon a time", "--max-new-tokens", "1", "--temperature", "0", "--keep-alive", "0"]
    rows = []
    for name, dtype in (("smollm2", "float32"), ("smollm2", "bfloat16"), ("smollm2", ""), ("llama-1b", "")):
        own = [LLMCLI, *greedy, "-m", model(name), *(["--dtype", dtype] if dtype else [])]
        peer = [*PYTHON, BARE_TRANSFORMERS, model(name), dtype or "auto"]
        variants: dict[str, Variant] = {
            "ours": functools.partial(execute, own),
            "peer": functools.partial(execute, peer),
        }
        ours, theirs = alternate(variants).values()
        ratio = statistics.median(mine.seconds / other.seconds for mine, other in zip(ours, theirs, strict=True))
        about = f"{name}, {dtype or 'default'}"
        rows.append(f"| {about} | {describe(ours)} | {describe(theirs)} | {ratio:.2f} | {COLD_MAXIMUM} |")
    return rows


if __name__ == "__main__":
    print("\n".join(main()))
