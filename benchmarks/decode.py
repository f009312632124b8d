"""One stream of text on a processor: llmcli with packed bfloat16 and quantized weights against plain `generate` on the
same weights, in one process, in turn; what quantization costs in perplexity; and against llama.cpp."""

import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import generate, smollm2

TOKENS, RUNS, TEXT, WINDOW, STRIDE = 400, 5, 10_000, 1024, 512
PROMPT = "Once upon a time, in a harbour town far in the north,"
ROOT = Path(__file__).parents[1]
LLAMA = """
import json, sys, time
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=2048, verbose=False)
model(sys.argv[2], max_tokens=8)
start = time.perf_counter()
model(sys.argv[2], max_tokens=int(sys.argv[3]), temperature=0, logit_bias={model.token_eos(): -100.0})
print(int(sys.argv[3]) / (time.perf_counter() - start))
"""
LOAD = """
import json, sys, time
from pathlib import Path
import psutil, torch, transformers
from llmcli import pipelines
from llmcli.models import loading
from llmcli.job import LoadOptions
loading.quiet_libraries()
pipelines.pipeline_class("causal")
start = time.perf_counter()
model = pipelines.load("causal", Path(sys.argv[1]), LoadOptions(dtype=sys.argv[2], quantize=sys.argv[3])).model
model(torch.tensor([[1, 2, 3]]))
print(json.dumps([time.perf_counter() - start, psutil.Process().memory_info().rss]))
"""


def models(folder: Path) -> dict[str, Any]:
    """Pipelines over the same weights, and transformers' own model."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmcli import pipelines
    from llmcli.job import LoadOptions

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    plain.generation_config.max_length = None
    ours = {
        name: pipelines.load("causal", folder, LoadOptions(dtype="bfloat16", quantize=scheme))
        for name, scheme in (("packed", "none"), ("int8", "int8"), ("int4", "int4"))
    }
    return {"plain": plain, **ours}


def plain(model: Any, ids: Any) -> Callable[[], None]:
    def run() -> None:
        model.generate(
            ids, attention_mask=ids.new_ones(ids.shape), do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS
        )

    return run


def ours(pipeline: Any) -> Callable[[], None]:
    """What the engine does for one record."""
    from llmcli.models import generation

    config = generation.merge(
        pipeline.model.generation_config,
        {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False},
        {"max_new_tokens": TOKENS},
    )
    config.pad_token_id = pipeline.tokenizer.pad_token_id

    def run() -> None:
        generate(pipeline, [pipeline.preprocess(PROMPT)], config)

    return run


def speed(run: Callable[[], None]) -> float:
    """Tokens a second."""
    gc.collect()
    start = time.perf_counter()
    run()
    return TOKENS / (time.perf_counter() - start)


def perplexity(model: Any, ids: Any) -> float:
    """Of tokens (1, T), by windows of WINDOW that begin STRIDE apart, of which each scores what no other did
    (https://huggingface.co/docs/transformers/perplexity)."""
    import torch

    total, end = 0.0, 0
    with torch.inference_mode():
        for begin in range(0, ids.shape[1], STRIDE):
            upto = min(begin + WINDOW, ids.shape[1])
            logits = model(ids[:, begin:upto]).logits[0, :-1].float()
            targets = ids[0, begin + 1 : upto]
            fresh = upto - max(end, begin + 1)
            losses = torch.nn.functional.cross_entropy(logits[-fresh:], targets[-fresh:], reduction="sum")
            total, end = total + losses.item(), upto
            if upto == ids.shape[1]:
                break
    return math.exp(total / (ids.shape[1] - 1))


def text() -> str:
    """The project's own pages, and its licence."""
    pages = ["LICENSE", "README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))]
    return "\n\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages)


def llama() -> float | None:
    """Tokens a second of llama.cpp, where `LLAMA_PYTHON`, an interpreter that has llama-cpp-python, and `LLAMA_GGUF`,
    the model's file, are set."""
    if not {"LLAMA_PYTHON", "LLAMA_GGUF"} <= os.environ.keys():
        return None
    command = [os.environ["LLAMA_PYTHON"], "-c", LLAMA, os.environ["LLAMA_GGUF"], PROMPT, str(TOKENS)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def loading(folder: Path, scheme: str) -> tuple[float, float]:
    """Seconds until a process has loaded the model and run it once, and the bytes of main memory that it has then."""
    command = [sys.executable, "-c", LOAD, str(folder), "bfloat16", scheme]
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(RUNS)
    ]
    return statistics.median(spent for spent, _ in found), statistics.median(taken for _, taken in found)


def main() -> list[str]:
    """The rows of a table in Markdown."""
    folder = Path(smollm2())
    loaded = models(folder)
    tokenizer = loaded["packed"].tokenizer
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    runs = {name: plain(each, prompt) if name == "plain" else ours(each) for name, each in loaded.items()}
    for run in runs.values():
        run()
    speeds: dict[str, list[float]] = {}
    for _ in range(RUNS):
        for name, run in runs.items():
            speeds.setdefault(name, []).append(speed(run))
        if found := llama():
            speeds.setdefault("llama", []).append(found)
    ids = tokenizer(text(), return_tensors="pt")["input_ids"][:, :TEXT]
    assert ids.shape[1] == TEXT, "the text is too short"
    puzzled = {name: perplexity(each if name == "plain" else each.model, ids) for name, each in loaded.items()}
    del loaded, runs
    costs = {name: loading(folder, scheme) for name, scheme in (("packed", "none"), ("int8", "int8"), ("int4", "int4"))}
    rows = []
    names = {"plain": "plain `generate`", "packed": "llmcli", "int8": "llmcli --quantize int8",
             "int4": "llmcli --quantize int4", "llama": "llama.cpp, Q4_1"}  # fmt: skip
    for name, found in speeds.items():
        gain = statistics.median(mine / peer for mine, peer in zip(found, speeds["plain"], strict=True))
        change = f"{puzzled[name]:.2f} ({puzzled[name] / puzzled['plain'] - 1:+.1%})" if name in puzzled else ""
        seconds, taken = costs.get(name, (None, None))
        cost = f"{seconds:.2f} s | {taken / 1e6:.0f} MB" if seconds and taken else "|"
        rows.append(f"| {names[name]} | {statistics.median(found):.1f} | {gain:.2f} | {change} | {cost} |")
    return rows


if __name__ == "__main__":
    print("\n".join(main()))
