"""Language models: one stream, and batches of prompts, against llama.cpp and what people write with Transformers."""

import functools
import io
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import llama
from inputs import VOCABULARY, model, prompts, write_records
from measure import LLMCLI, PYTHON, Run, Variant, alternate, choose, execute, report, scaled, tabulate

PROMPT = "Once upon a time, in a harbour town far in the north,"
PROMPT_TOKENS, WARMUP = 14, 16
STREAM = {"smollm2": 128, "llama-1b": 32}  # new tokens
PROMPTS = {"smollm2": 512, "llama-1b": 64}
TOKENS, MAX_WORDS = 32, 200
ROWS, TRIAL = (16, 32, 64), 4  # batches of a peer, and the part of the prompts that chooses one of them
ENDING, ENDING_WORDS = 2000, 40  # prompts whose answers end at random, and their maximum length
MAX_TOKENS, END_EVERY = 32, 16  # of such an answer; of the vocabulary, one token in 16 ends it
SAMPLING = {"max_new_tokens": MAX_TOKENS, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, prompts = sys.argv[1], [json.loads(line)["text"] for line in open(sys.argv[2])]
options, dtype, rows = json.loads(sys.argv[3]), sys.argv[4], int(sys.argv[5])
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
model.generation_config.max_length = None
"""
PIPELINE = f"""{LOAD}
run = pipeline("text-generation", model=model, tokenizer=tokenizer)
for output in run((prompt for prompt in prompts), batch_size=rows, return_full_text=False, **options):
    print(json.dumps({{"text": output[0]["generated_text"]}}))
"""
LOOP = f"""{LOAD}
texts = {{}}
order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
for start in range(0, len(order), rows):
    some = order[start : start + rows]
    inputs = tokenizer([prompts[i] for i in some], return_tensors="pt", padding=True)
    output = model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
    texts.update(zip(some, tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])))
for i in range(len(prompts)):
    print(json.dumps({{"text": texts[i]}}))
"""
PLAIN = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[2])
model.generation_config.max_length = None
inputs = tokenizer(sys.argv[3], return_tensors="pt")
for new in map(int, sys.argv[4:]):
    start = time.perf_counter()
    model.generate(**inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
print(json.dumps([time.perf_counter() - start, sys.argv[2]]))
"""


@functools.cache
def engine() -> Any:
    from llmcli.engines.local import LocalEngine

    return LocalEngine()


def call(*args: object) -> tuple[list[str], float]:
    """Run the real main() in this process, which keeps the model, and return its output and seconds."""
    from llmcli import cli

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with mock.patch("llmcli.engines.engine_for", return_value=engine()), redirect_stdout(out), redirect_stderr(err):
        start = time.perf_counter()
        status = cli.main([*map(str, args)])
        seconds = time.perf_counter() - start
    written, errors = (stream.seek(0) or stream.read() for stream in (out, err))
    assert status == 0, f"exit code {status}: {errors[-400:]}"
    return written.splitlines(), seconds


def greedy(new: int) -> list[str]:
    return ["--temperature", "0", "--max-new-tokens", str(new), "--min-new-tokens", str(new)]


# One stream


def time_stream(new: int, *args: str) -> None:
    """Print the seconds of one answer of llmcli after a warm-up, and the data type of the model."""
    import gc

    for count in (WARMUP, new):
        _, seconds = call("generate", PROMPT, "--no-full-text", *greedy(count), *args)
    from transformers import PreTrainedModel

    gc.unfreeze()
    loaded = next(thing for thing in gc.get_objects() if isinstance(thing, PreTrainedModel))
    print(json.dumps([seconds, str(loaded.dtype).removeprefix("torch.")]))


def stream(name: str) -> list[str]:
    """The rows of a table in Markdown."""
    folder, new = model(name), STREAM[name]

    def run(*command: str) -> Run:
        ran = execute(command)
        seconds, dtype = json.loads(ran.output.splitlines()[-1])
        return Run(seconds, new, ran.memory, dtype)

    def ours(*args: str) -> Variant:
        return functools.partial(run, sys.executable, __file__, str(new), "-m", folder, *args)

    def plain(dtype: str) -> Variant:
        return functools.partial(run, *PYTHON, PLAIN, folder, dtype, PROMPT, str(WARMUP), str(new))

    default = ours()().output
    variants = {f"llmcli ({default})": ours()}
    variants |= {f"llmcli --dtype {dtype}": ours("--dtype", dtype) for dtype in ("float32", "bfloat16")}
    variants.pop(f"llmcli --dtype {default}", None)
    variants |= {f"llmcli --quantize {scheme}": ours("--quantize", scheme) for scheme in ("int8", "int4")}
    for scheme in ("int8", "int4"):  # The weights are converted once.
        execute([LLMCLI, "generate", PROMPT, "-m", folder, "--quantize", scheme, *greedy(1), "--keep-alive", "0"])
    best = choose({dtype: plain(dtype) for dtype in ("float32", "bfloat16")})
    variants |= {f"`generate` of Transformers, {best}": plain(best)} | llama.streams(name, PROMPT_TOKENS, new)
    return tabulate(alternate(variants), digits=1)


# Batches


def ours(name: str, path: Path, amount: int, *args: str) -> Variant:
    paths = ["-m", model(name), "-f", str(path)]
    command = [LLMCLI, "generate", "--jsonl", "--keep-alive", "0", *paths, *greedy(TOKENS), *args]
    return functools.partial(execute, command, amount)


def batch(name: str) -> list[str]:
    """The rows of a table in Markdown, with llama.cpp."""
    texts = prompts(scaled(PROMPTS[name]), MAX_WORDS)
    with tempfile.TemporaryDirectory() as scratch:
        path, amount = write_records(Path(scratch, "in.jsonl"), texts), len(texts) * TOKENS
        own = {
            "llmcli": ours(name, path, amount),
            "llmcli --quantize int8": ours(name, path, amount, "--quantize", "int8"),
        }
        return tabulate(alternate(own | llama.servers(name, texts, TOKENS)))


def plain(name: str = "smollm2") -> list[str]:
    """The rows of a table in Markdown, with Transformers in its best data type and at its best batch size."""
    texts = prompts(scaled(PROMPTS[name]), MAX_WORDS)
    options = json.dumps({"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False})
    with tempfile.TemporaryDirectory() as scratch:
        whole, part = Path(scratch, "whole.jsonl"), Path(scratch, "part.jsonl")
        amounts = {whole: len(texts) * TOKENS, part: len(texts[::TRIAL]) * TOKENS}
        write_records(whole, texts), write_records(part, texts[::TRIAL])

        def peer(script: str, path: Path, dtype: str, rows: int) -> Variant:
            command = [*PYTHON, script, model(name), str(path), options, dtype, str(rows)]
            return functools.partial(execute, command, amounts[path])

        dtype = choose({dtype: peer(LOOP, part, dtype, ROWS[1]) for dtype in ("bfloat16", "float32")})
        rows = int(choose({str(rows): peer(PIPELINE, part, dtype, rows) for rows in ROWS}))
        about = f"{dtype}, batches of {rows}"
        variants = {
            "llmcli": ours(name, whole, amounts[whole]),
            f"`transformers.pipeline`, {about}": peer(PIPELINE, whole, dtype, rows),
            f"loop of `generate` by length, {about}": peer(LOOP, whole, dtype, rows),
        }
        return tabulate(alternate(variants))


def ends() -> list[str]:
    """The rows of a table in Markdown: records whose answers end at random, as one token in END_EVERY ends them.
    `EARLIER_SRC`, the folder `src` of an earlier checkout, adds a row:

    git worktree add ../earlier REVISION && EARLIER_SRC=../earlier/src python benchmarks/run.py ends"""
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(model("smollm2"), Path(scratch, "model"))
        settings = folder / "generation_config.json"
        known = json.loads(settings.read_text()) if settings.exists() else {}
        settings.write_text(json.dumps(known | {"eos_token_id": list(range(2, VOCABULARY, END_EVERY))}))
        texts = prompts(scaled(ENDING), ENDING_WORDS)
        whole, part = Path(scratch, "whole.jsonl"), Path(scratch, "part.jsonl")
        (
            write_records(whole, texts),
            write_records(part, texts[::16]),
        )  # for the pipeline, which takes several times as long
        args = ["generate", "--jsonl", "-m", str(folder), "-f", str(whole), "--dtype", "bfloat16", "--temperature", "1",
                "--top-k", "0", "--top-p", "1", "--max-new-tokens", str(MAX_TOKENS), "--keep-alive", "0"]  # fmt: skip
        own = [sys.executable, "-m", "llmcli", *args]
        peer = [*PYTHON, PIPELINE, str(folder), str(part), json.dumps(SAMPLING), "bfloat16", "32"]
        runs = {"llmcli": [execute(own, len(texts))],
                "`transformers.pipeline`, batches of 32": [execute(peer, len(texts[::16]))]}  # fmt: skip
        if earlier := os.environ.get("EARLIER_SRC"):
            runs["llmcli, earlier version"] = [execute(["env", f"PYTHONPATH={earlier}", *own], len(texts))]
        report({name: run.speed for name, (run,) in runs.items()})
        return tabulate(runs, digits=2)


if __name__ == "__main__":
    time_stream(int(sys.argv[1]), *sys.argv[2:])
