"""What llmcli itself costs a record: JSON Lines and Parquet through `generate` with a model that answers at once, and a
tokenizer that costs nothing or is SmolLM2's. Records a second, and how much the resident set grows over a million."""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import pull

FEW, MANY = 10_000, 1_000_000
CHILD = """
import sys
from types import SimpleNamespace

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmcli.models import loading
from llmcli.cli import main

is_free, folder, args = sys.argv[1] == "free", sys.argv[2], sys.argv[3:]
config = LlamaConfig(vocab_size=50_000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                     max_position_embeddings=2048, eos_token_id=2)
logits = torch.nn.functional.one_hot(torch.tensor([[2]]), 8).float()  # the end


class Model(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, logits_to_keep=0,
                **settings):
        return CausalLMOutputWithPast(logits=logits.expand(len(input_ids), 1, -1))


class Tokenizer:
    padding_side, pad_token_id, bos_token_id, eos_token_id, chat_template = "left", 0, None, 2, None
    padding_side, feature_extractor = "left", None

    def __call__(self, text, **settings):
        return {"input_ids": [5, 6, 7, 8], "attention_mask": [1, 1, 1, 1]}

    def decode(self, ids, **settings):
        return " an answer"


def load(*_):
    return Model(config).eval(), Tokenizer() if is_free else AutoTokenizer.from_pretrained(folder)


loading.load = load
status = main(args)
with open("/proc/self/status") as about:
    print(next(line for line in about if line.startswith("VmHWM")).split()[1], file=sys.stderr)
sys.exit(status)
"""


def records(path: Path, count: int) -> Path:
    """So many, of twenty words and all different: equal ones would run once."""
    words = Path(__file__).parents[1].joinpath("LICENSE").read_text().split()
    chance = random.Random(1)
    with path.open("w") as file:
        for i in range(count):
            file.write(json.dumps({"id": i, "text": f"{i} {' '.join(chance.choices(words, k=20))}"}) + "\n")
    return path


def as_parquet(path: Path) -> Path:
    """The same in one row group, and a column of another type."""
    import pyarrow as pa
    from pyarrow import json as lines
    from pyarrow import parquet

    table = lines.read_json(path)
    table = table.append_column("day", pa.array(range(len(table)), pa.int32()).cast(pa.date32()))
    parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=MANY)
    return path.with_suffix(".parquet")


def run(tokenizer: str, model: str, inputs: Path) -> tuple[float, int]:
    """Seconds, and the most bytes of main memory that were resident."""
    args = ["generate", "-m", model, "--jsonl", "-f", str(inputs), "--temperature", "0"]
    if inputs.suffix == ".parquet":
        args[3:4] = ["--parquet", "--output", f"{inputs}.out"]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        command = [sys.executable, "-c", CHILD, tokenizer, model, *args]
        ran = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - start, int(ran.stderr.split()[-1]) * 1024


def main() -> list[str]:
    """The rows of a table in Markdown."""
    model = pull("smollm2")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        few, many = (records(Path(scratch, f"{count}.jsonl"), count) for count in (FEW, MANY))
        for tokenizer, least in (("free", 20_000), ("real", 5_000)):
            (short, small), (long, great) = (run(tokenizer, model, inputs) for inputs in (few, many))
            speed, growth = (MANY - FEW) / (long - short), (great - small) / 1e6
            rows.append(f"| {tokenizer} tokenizer | {speed:,.0f} | {least:,} | {growth:.1f} MB | 20 MB |")
        (short, small), (long, great) = (run("free", model, as_parquet(inputs)) for inputs in (few, many))
        speed, growth = (MANY - FEW) / (long - short), (great - small) / 1e6
        rows.append(f"| Parquet to Parquet, free tokenizer | {speed:,.0f} | 10,000 | {growth:.1f} MB | 50 MB |")
    return rows


if __name__ == "__main__":
    print("\n".join(main()))
