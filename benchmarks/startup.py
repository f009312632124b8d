"""What a call costs before the first token: --help against a bare Typer program's, a cold generate
against the shortest script that does the same with transformers."""

import sys
import tempfile
from pathlib import Path

from measure import LLMCLI, Comparison, compare, smollm2

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
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, do_sample=False, max_new_tokens=1)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
COMMANDS = ([], ["generate"], ["chat"], ["embed"], ["search"], ["env"], ["models"], ["models", "list"],
            ["models", "show"], ["models", "pull"], ["models", "rm"], ["models", "path"])  # fmt: skip


def main() -> list[str]:
    """The rows of a table in Markdown."""
    folder = smollm2()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        typer, script = Path(scratch, "bare_typer.py"), Path(scratch, "bare_transformers.py")
        typer.write_text(BARE_TYPER)
        script.write_text(BARE_TRANSFORMERS)
        for command in COMMANDS:
            name = " ".join(["llmcli", *command, "--help"])
            found = compare(name, [LLMCLI, *command, "--help"], [sys.executable, str(typer), "--help"], runs=11)
            rows.append(found.row("2.0" if command else "1.5"))
        greedy = ["--max-new-tokens", "1", "--temperature", "0", "--dtype", "float32"]
        found: Comparison = compare(
            "cold generate, 1 token",
            [LLMCLI, "generate", "Once upon a time", *greedy],
            [sys.executable, str(script), folder],
            runs=7,
        )
        rows.append(found.row("1.1"))
    return rows


if __name__ == "__main__":
    print("\n".join(main()))
