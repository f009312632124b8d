"""512 prompts of mixed length through one model: llmcli against what people write. Each is a whole process, over
the same weights in bfloat16, 32 new tokens a prompt, greedy; tokens a second from the first import to the last line."""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import LLMCLI, smollm2

PROMPTS, TOKENS, RUNS = 512, 32, 3
OPTIONS = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, prompts = sys.argv[1], [json.loads(line)["text"] for line in open(sys.argv[2])]
options = json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
model.generation_config.max_length = None
"""
LOOP = f"""{LOAD}
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, **options, pad_token_id=0)
    print(json.dumps({{"text": tokenizer.decode(output[0, inputs["input_ids"].shape[1]:])}}))
"""
PIPELINE = f"""{LOAD}
tokenizer.padding_side = "left"
run = pipeline("text-generation", model=model, tokenizer=tokenizer)
for output in run((prompt for prompt in prompts), batch_size=int(sys.argv[4]), return_full_text=False, **options):
    print(json.dumps({{"text": output[0]["generated_text"]}}))
"""
FLOOR = f"""{LOAD}
ids = sorted((tokenizer(prompt)["input_ids"] for prompt in prompts), key=len)
for i in range(0, len(ids), 64):  # all cut to the length that is their mean: the same tokens, no padding
    some = ids[i : i + 64]
    length = sum(map(len, some)) // len(some)
    rows = torch.tensor([(one * (length // len(one) + 1))[:length] for one in some])
    model.generate(rows, attention_mask=torch.ones_like(rows), **options, pad_token_id=0)
"""
LLAMA = """
import json, sys
from llama_cpp import Llama
prompts = [json.loads(line)["text"] for line in open(sys.argv[2])]
model = Llama(sys.argv[1], n_ctx=2048, verbose=False)
for prompt in prompts:
    output = model(prompt, max_tokens=int(sys.argv[3]), temperature=0, logit_bias={model.token_eos(): -100.0})
    print(json.dumps({"text": output["choices"][0]["text"]}))
"""
ENDING, ENDING_WORDS = 2000, 40  # prompts whose answers end at random, and their maximum length
MAX_TOKENS, END_EVERY = 32, 16  # of such an answer; of the vocabulary, one token in so many ends it
SAMPLING = {"max_new_tokens": MAX_TOKENS, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def prompts(count: int, maximum: int = 200) -> list[str]:
    """Runs of 4 to `maximum` words, from the project's licence."""
    words = Path(__file__).parents[1].joinpath("LICENSE").read_text().split()
    chance = random.Random(7)
    lengths = [chance.randint(4, maximum) for _ in range(count)]
    starts = [chance.randrange(len(words) - length) for length in lengths]
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def seconds(command: list[str], out: Path) -> float:
    with out.open("w") as stdout:
        start = time.perf_counter()
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.DEVNULL, check=True)
        return time.perf_counter() - start


def main() -> list[str]:
    """The rows of a table in Markdown. `LLAMA_PYTHON`, an interpreter that has llama-cpp-python, and `LLAMA_GGUF`, the
    model's file, add a row."""
    model = smollm2()
    options = json.dumps(OPTIONS)
    with tempfile.TemporaryDirectory() as scratch:
        whole, part, out = Path(scratch, "whole.jsonl"), Path(scratch, "part.jsonl"), Path(scratch, "out")
        lines = [json.dumps({"text": prompt}) + "\n" for prompt in prompts(PROMPTS)]
        whole.write_text("".join(lines))
        part.write_text("".join(lines[::8]))  # for the loops, which take ten minutes and more for all
        python = [sys.executable, "-c"]
        args = [model, str(whole), options]
        ours = [LLMCLI, "generate", "--jsonl", "-f", str(whole), "--dtype", "bfloat16", "--temperature", "0",
                "--max-new-tokens", str(TOKENS), "--min-new-tokens", str(TOKENS)]  # fmt: skip
        peers = {f"`transformers.pipeline`, batches of {n}": [*python, PIPELINE, *args, str(n)] for n in (16, 32, 64)}
        peers["floor: no padding at all"] = [*python, FLOOR, *args]
        loops = {"loop of `generate`": [*python, LOOP, model, str(part), options]}
        if {"LLAMA_PYTHON", "LLAMA_GGUF"} <= os.environ.keys():
            llama = [os.environ["LLAMA_PYTHON"], "-c", LLAMA, os.environ["LLAMA_GGUF"], str(part), str(TOKENS)]
            loops["loop of llama-cpp-python"] = llama
        found: dict[str, list[float]] = {}
        for _ in range(RUNS):
            for name, command in {"llmcli": ours, **peers, **loops}.items():
                count = PROMPTS // 8 if name in loops else PROMPTS
                found.setdefault(name, []).append(count * TOKENS / seconds(command, out))
                print(name, f"{found[name][-1]:.1f}", file=sys.stderr, flush=True)
    speeds = {name: statistics.median(some) for name, some in found.items()}
    return [f"| {name} | {speed:.0f} | {speeds['llmcli'] / speed:.2f} |" for name, speed in speeds.items()]


def ends() -> list[str]:
    """The rows of a table in Markdown: records whose answers end at random, as one token in END_EVERY ends them.
    `EARLIER_SRC`, the folder `src` of an earlier checkout, adds a row:

    git worktree add ../earlier REVISION && EARLIER_SRC=../earlier/src python benchmarks/run.py ends"""
    with tempfile.TemporaryDirectory() as scratch:
        model = shutil.copytree(smollm2(), Path(scratch, "model"))
        settings = model / "generation_config.json"
        known = json.loads(settings.read_text()) if settings.exists() else {}
        settings.write_text(json.dumps(known | {"eos_token_id": list(range(2, 49152, END_EVERY))}))
        whole, part, out = Path(scratch, "whole.jsonl"), Path(scratch, "part.jsonl"), Path(scratch, "out")
        lines = [json.dumps({"text": prompt}) + "\n" for prompt in prompts(ENDING, ENDING_WORDS)]
        whole.write_text("".join(lines))
        part.write_text("".join(lines[::16]))  # for the pipeline, which takes several times as long
        args = ["generate", "--jsonl", "-m", str(model), "-f", str(whole), "--dtype", "bfloat16", "--temperature", "1",
                "--top-k", "0", "--top-p", "1", "--max-new-tokens", str(MAX_TOKENS)]  # fmt: skip
        peer = [str(model), str(part), json.dumps(SAMPLING), "32"]
        ours = [sys.executable, "-m", "llmcli", *args]
        variants = {
            "llmcli": (ours, ENDING),
            "`transformers.pipeline`, batches of 32": ([sys.executable, "-c", PIPELINE, *peer], len(lines[::16])),
        }
        if earlier := os.environ.get("EARLIER_SRC"):
            variants["llmcli, earlier version"] = (["env", f"PYTHONPATH={earlier}", *ours], ENDING)
        speeds = {}
        for name, (command, count) in variants.items():
            speeds[name] = count / seconds(command, out)
            print(name, f"{speeds[name]:.2f}", file=sys.stderr, flush=True)
    return [f"| {name} | {speed:.2f} | {speeds['llmcli'] / speed:.2f} |" for name, speed in speeds.items()]


if __name__ == "__main__":
    print("\n".join(main()))
