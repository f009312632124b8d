"""Measure llmcli and its peers on a GPU: `python benchmarks/gpu.py` prints a table, and writes all figures to gpu.json.

The script needs no network and no weights: it makes models with random weights, and a tokenizer from the project's
pages. It ends within six minutes. Each part has a time limit, and if a part fails, the others run all the same. On a
CPU, `--size small` tries the script itself. Speeds leave out imports and loading, except those of whole processes. The
peers are what people write with Transformers, also in bfloat16.
"""

import argparse
import faulthandler
import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import generation
import inputs
import psutil

STARTED = time.time()
SECONDS = 345  # for all parts together
RUNS = 3  # of a short part
PEER_TOKENS = 64  # of a stream
ENOUGH_S = 30  # of a long part, which runs nothing again after that
ENDS = list(range(2, inputs.VOCABULARY, 64))  # one token in 64, for answers that end at random
PARITY_SHAPE, PARITY_TOKENS = (256, 4, 4, 2, 704), 48  # in float32, where only texts matter
PROFILE_TOKENS = (48, 112)
LONG_WORDS, FREE = 700, 0.1  # of prompts while another process leaves that share of the card
LLMCLI = [sys.executable, "-m", "llmcli"]
WITHOUT_GRAPHS = mock.patch("llmcli.pipelines.decoding.DecodeGraph.capture", return_value=None)


@dataclass(frozen=True)
class Size:
    """How large the model is, and how much work it gets."""

    shape: tuple[int, ...] = inputs.BILLION
    records: int = 2048
    new_tokens: int = 64
    max_tokens: int = 256  # of an answer that ends at random
    batches: tuple[int, ...] = (128, 256, 512, 1024)
    stream: tuple[int, int] = (16, 272)  # tokens of a short answer and of a long one
    lines: int = 10_000
    long_records: int = 256


SIZES = {"1b": Size(), "small": Size((64, 2, 4, 2, 128), 96, 8, 64, (8, 32), (4, 36), 400, 16)}


@dataclass(frozen=True)
class Setup:
    """What the parts run on. `folder` has the models and the inputs."""

    folder: Path
    size: Size
    device: str
    deadline: float

    def write(self, **event: Any) -> None:
        with (self.folder / "events.jsonl").open("a") as file:
            print(json.dumps(event), file=file)

    def note(self, name: str, value: float) -> None:
        """Write down one run of a figure. The median of all runs counts."""
        self.write(name=name, value=value)

    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def texts(self, name: str) -> list[str]:
        return [json.loads(line)["text"] for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]

    @cache  # noqa: B019  # as long as the process
    def peer(self, name: str = "model", dtype: str = "bfloat16") -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder / name, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=dtype, device_map=self.device)
        return model, tokenizer


def make(setup: Setup) -> None:
    """Make models and inputs."""
    import torch
    from transformers import PreTrainedTokenizerFast

    size, folder, chance = setup.size, setup.folder, random.Random(7)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    inputs.train_bpe([*special.values()]).save(str(folder / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="</s>", **special)
    for name, shape, dtype in (("parity", PARITY_SHAPE, "float32"), ("model", size.shape, "bfloat16")):
        model = inputs.random_llama(shape, dtype, setup.device)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    if setup.device != "cpu":
        (folder / "gpu.txt").write_text(torch.cuda.get_device_name(setup.device))
    setup.note("read bytes", 2 * (model.num_parameters() - model.get_input_embeddings().weight.numel()))

    prompts, lines = inputs.prompts(size.records), inputs.lines(size.lines)
    longs = [" ".join(chance.choices(inputs.words(), k=LONG_WORDS)) for _ in range(size.long_records)]
    parity = prompts[: min(32, size.records // 16)]
    for name, texts in {"prompts": prompts, "one": prompts[:1], "parity": parity, "long": longs}.items():
        inputs.write_records(folder / f"{name}.jsonl", texts)
    for name, texts in {"lines": lines, "line": lines[:1]}.items():
        (folder / f"{name}.txt").write_text("".join(f"{text}\n" for text in texts))


# Peers: Transformers alone


def run_pipeline(setup: Setup, texts: list[str], rows: int, **options: Any) -> tuple[float, float]:
    """Return tokens per second, and seconds."""
    import torch
    from transformers import pipeline

    model, tokenizer = setup.peer()
    run = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=rows, return_full_text=False)
    ends, counts = torch.tensor(options.get("eos_token_id", 2), device=model.device), list[int]()

    def generate(**settings: Any) -> Any:
        output = type(model).generate(model, **settings)
        is_end = torch.isin(output[:, settings["input_ids"].shape[1] :], ends)
        counts.append(int(torch.where(is_end.any(1), is_end.int().argmax(1) + 1, is_end.shape[1]).sum()))
        return output

    with mock.patch.object(model, "generate", generate):  # The pipeline returns no number of tokens.
        start = time.perf_counter()
        for _ in run((text for text in texts), **options):
            pass
        seconds = time.perf_counter() - start
    return sum(counts) / seconds, seconds


def peer_pipeline(setup: Setup) -> None:
    setup.peer()
    setup.note("pipeline, loading seconds", time.time() - psutil.Process().create_time())
    texts, new = setup.texts("prompts"), setup.size.new_tokens
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    begun, speeds = time.perf_counter(), []
    for rows in reversed(setup.size.batches):
        if speeds and time.perf_counter() - begun > ENOUGH_S:
            break
        speed, seconds = run_pipeline(setup, texts, rows, **options)
        if not speeds:
            setup.note("pipeline, seconds of the first run", seconds)
        speeds.append(speed)
        setup.note(f"pipeline, batch {rows}", speed)
    setup.note("pipeline", max(speeds))


def peer_ends(setup: Setup) -> None:
    texts = setup.texts("prompts")[: setup.size.records // 4]
    options = {"max_new_tokens": setup.size.max_tokens, "eos_token_id": ENDS, "do_sample": True, "top_k": 0}
    setup.note("pipeline, ends", run_pipeline(setup, texts, min(256, len(texts)), **options)[0])


def peer_stream(setup: Setup, name: str = "generate, stream", **options: Any) -> None:
    """One answer of plain `generate`, of which each token takes as long."""
    model, tokenizer = setup.peer()
    inputs = tokenizer(setup.texts("one"), return_tensors="pt").to(setup.device)
    for run in range(1 + RUNS):
        start, new = time.perf_counter(), PEER_TOKENS
        model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options).cpu()
        if run:
            setup.note(name, new / (time.perf_counter() - start))


def peer_score(setup: Setup) -> None:
    """Perplexities by a loop over the model."""
    import torch

    model, tokenizer = setup.peer()
    lines = (setup.folder / "lines.txt").read_text().splitlines()[:100]
    for some in (lines[:1], lines):
        start = time.perf_counter()
        for line in some:
            ids = tokenizer(line, return_tensors="pt")["input_ids"].to(setup.device)
            with torch.inference_mode():
                math.exp(model(ids, labels=ids).loss.item())
    setup.note("score, loop", len(lines) / (time.perf_counter() - start))


# llmcli, in a process that keeps the model


def call(setup: Setup, *args: object) -> tuple[list[str], float]:
    """Run the real main(), and return its output and seconds."""
    return generation.call(*args, "--device", setup.device)


def generate(
    setup: Setup, *args: object, file: str = "prompts", parity: bool = False
) -> tuple[float, float, list[str]]:
    """Return tokens per second, seconds, and texts."""
    model, dtype = ("parity", "float32") if parity else ("model", "bfloat16")
    paths = "-m", setup.folder / model, "-f", setup.folder / f"{file}.jsonl"
    lines, seconds = call(setup, "generate", "--jsonl", *paths, "--dtype", dtype, *args)
    records = [json.loads(line) for line in lines]
    tokens = sum(record["usage"]["completion_tokens"] for record in records)
    return tokens / seconds, seconds, [record["generated_text"] for record in records]


def llmcli_batch(setup: Setup) -> None:
    generate(setup, *generation.greedy(2), file="one")
    begun, options = time.perf_counter(), generation.greedy(setup.size.new_tokens)
    for rows in ("auto", *(rows for size in reversed(setup.size.batches) for rows in (size, "auto"))):
        if time.perf_counter() - begun < ENOUGH_S:
            setup.note(f"llmcli, {rows}", generate(setup, *options, "--batch-size", rows)[0])


def llmcli_ends(setup: Setup) -> None:
    sampled = ("--temperature", 1, "--top-k", 0, "--top-p", 1, "-o", f"eos_token_id={json.dumps(ENDS)}")
    begun = time.perf_counter()
    for run in range(RUNS):
        if run == 0 or time.perf_counter() - begun < ENOUGH_S / 2:
            setup.note("llmcli, ends", generate(setup, *sampled, "--max-new-tokens", setup.size.max_tokens)[0])


def llmcli_stream(setup: Setup) -> None:
    short, long = setup.size.stream
    generate(setup, *generation.greedy(short), file="one")
    for _ in range(RUNS):
        brief, whole = (generate(setup, *generation.greedy(new), file="one")[1] for new in (short, long))
        setup.note("llmcli, stream", long / whole)
        setup.note("llmcli, stream, each further token", (long - short) / (whole - brief))
    with WITHOUT_GRAPHS:
        setup.note("llmcli, no graphs, stream", generate(setup, *generation.greedy(long), file="one")[0])


def llmcli_profile(setup: Setup) -> None:
    """Where the time of a token goes, as a long answer less a short one, and the bandwidth of the memory."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if setup.device == "cpu":
        return
    totals = []
    for new in PROFILE_TOKENS:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            generate(setup, *generation.greedy(new), file="one")
        events = seen.key_averages()
        kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        launches = sum(event.count for event in events if "LaunchKernel" in event.key or "GraphLaunch" in event.key)
        totals.append((busy, sum(event.count for event in kernels), launches))
    for name, less, more in zip(("kernel seconds", "kernels", "launches"), *totals, strict=True):
        setup.note(f"a token, {name}", (more - less) / (PROFILE_TOKENS[1] - PROFILE_TOKENS[0]))
    source = torch.zeros(2**30, dtype=torch.uint8, device=setup.device)
    target = source.clone()
    for _ in range(RUNS):
        torch.cuda.synchronize(setup.device)
        start = time.perf_counter()
        for _ in range(20):
            target.copy_(source)
        torch.cuda.synchronize(setup.device)
        setup.note("bandwidth", 20 * 2 * source.numel() / (time.perf_counter() - start))


def count_differing(some: list[str], others: list[str]) -> int:
    return sum(one != other for one, other in zip(some, others, strict=True))


def llmcli_parity(setup: Setup) -> None:
    def texts(size: object = "auto") -> list[str]:
        return generate(setup, *generation.greedy(PARITY_TOKENS), "--batch-size", size, file="parity", parity=True)[2]

    expected = texts()
    for size in (1, 7):
        setup.note("texts in float32 that differ between batch sizes", count_differing(texts(size), expected))
    with WITHOUT_GRAPHS:
        setup.note("texts in float32 that differ without graphs", count_differing(texts(), expected))
    model, tokenizer = setup.peer("parity", "float32")
    plain, new = [], {"max_new_tokens": PARITY_TOKENS, "min_new_tokens": PARITY_TOKENS}
    for text in setup.texts("parity"):
        inputs = tokenizer(text, return_tensors="pt").to(setup.device)
        answer = model.generate(**inputs, **new, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        plain.append(tokenizer.decode(answer, skip_special_tokens=True))
    setup.note("texts in float32 that differ from `generate`", count_differing(plain, expected))


def llmcli_golden(setup: Setup) -> None:
    """Run the tests of golden parity: the answers of Transformers 4.57."""
    sys.path.append(str(inputs.ROOT / "tests"))
    import test_golden

    def run(*args: object, stdin: bytes) -> SimpleNamespace:
        path = setup.folder / "golden.jsonl"
        path.write_bytes(stdin)
        lines, _ = call(setup, *args, "-f", path)
        return SimpleNamespace(stderr="", exit_status=0, records=[json.loads(line) for line in lines])

    for test, groups in ((test_golden.test_texts, test_golden.TEXTS), (test_golden.test_answers, test_golden.ANSWERS)):
        for group in groups:
            try:
                test(run, group, 100)
                setup.note("golden tests in float32 that fail", 0)
            except AssertionError as exc:
                setup.note("golden tests in float32 that fail", 1)
                print(f"{group}: {exc}", file=sys.stderr)


def llmcli_score(setup: Setup) -> None:
    paths = "-m", setup.folder / "model", "-f", setup.folder / "lines.txt"
    for _ in range(RUNS):
        _, seconds = call(setup, "score", "--lines", *paths, "--dtype", "bfloat16")
        setup.note("llmcli, score", setup.size.lines / seconds)


# llmcli, whole processes


def run_process(setup: Setup, *args: object) -> tuple[float, list[str], str]:
    start = time.perf_counter()
    command = [*LLMCLI, *map(str, args), "-m", str(setup.folder / "model"), "--device", setup.device]
    ran = subprocess.run([*command, "--dtype", "bfloat16"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert ran.returncode in (0, 3), f"exit code {ran.returncode}: {ran.stderr[-400:]}"
    return time.perf_counter() - start, ran.stdout.splitlines(), ran.stderr


def whole_processes(setup: Setup) -> None:
    args = ("generate", "--jsonl", *generation.greedy(setup.size.new_tokens), "-f", setup.folder / "prompts.jsonl")
    setup.note("llmcli, whole process", run_process(setup, *args)[0])
    for name in ("line", "lines"):
        seconds, *_ = run_process(setup, "score", "--lines", "-f", setup.folder / f"{name}.txt")
        setup.note(f"llmcli, score, whole process, {name}", seconds)


def whole_memory(setup: Setup) -> None:
    """Long prompts while this process has the rest of the GPU, with the chosen batch size and a large one."""
    if setup.device != "cpu":
        import torch

        free, total = torch.cuda.mem_get_info(setup.device)
        taken = torch.empty(int(free - FREE * total), dtype=torch.uint8, device=setup.device)  # noqa: F841
    for rows in ("auto", setup.size.long_records):
        args = ("generate", "--jsonl", *generation.greedy(16), "--batch-size", rows, "-f", setup.folder / "long.jsonl")
        seconds, lines, errors = run_process(setup, *args)
        setup.note(f"memory, {rows}, seconds", seconds)
        done = sum("error" not in json.loads(line) for line in lines)
        setup.note(f"records lost, {FREE:.0%} of the GPU free", setup.size.long_records - done)
        setup.note(f"notices of halved batches, {FREE:.0%} of the GPU free", errors.count("warning: out of memory"))


# Each process with its parts, and the seconds that these may take.
PROCESSES: dict[str, dict[str, tuple[Callable[[Setup], None], int]]] = {
    "make": {"make": (make, 60)},
    "peers": {
        "pipeline": (peer_pipeline, 130), "ends": (peer_ends, 40), "stream": (peer_stream, 25),
        "score": (peer_score, 20),
    },
    "llmcli": {
        "batch": (llmcli_batch, 130), "ends": (llmcli_ends, 40), "stream": (llmcli_stream, 30),
        "profile": (llmcli_profile, 30), "score": (llmcli_score, 25),
        "parity": (llmcli_parity, 40), "golden": (llmcli_golden, 25),
    },
    "whole processes": {"speed": (whole_processes, 70), "memory": (whole_memory, 80)},
    "compiled peer": {"stream": (partial(peer_stream, name="static, stream", cache_implementation="static"), 90)},
}  # fmt: skip


def run_parts(setup: Setup, process: str) -> None:
    """Run the parts that have not begun, in a process of their own. A part that takes too long ends the process."""
    os.setsid()
    os.dup2(2, 1)  # stdout is for the table
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "true"}
    begun = {event.get("part") for event in setup.events()}
    for name, (part, limit_s) in PROCESSES[process].items():
        if (label := f"{process}, {name}") in begun:
            continue
        setup.write(part=label, error="ended its process: no time was left, or it crashed")
        faulthandler.dump_traceback_later(max(0.01, min(limit_s, setup.deadline - time.time())), exit=True)
        start, error = time.time(), None
        try:
            part(setup)
        except Exception as exc:
            error = f"{type(exc).__name__}: {' '.join(str(exc).split())[:400]}"
        faulthandler.cancel_dump_traceback_later()
        setup.write(part=label, error=error, seconds=round(time.time() - start, 1))
        print(f"{label}: {error or 'done'}, {time.time() - start:.1f} s", flush=True)
    os._exit(0)  # Freeing models is slow.


def watch(setup: Setup, name: str) -> None:
    """Run all parts of a process, after one that ends it in another process."""
    for _ in PROCESSES[name]:
        process = multiprocessing.get_context("spawn").Process(target=run_parts, args=(setup, name))
        process.start()
        try:
            process.join()
        finally:  # Programs that it has started end too.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.exitcode == 0:
            break


def compare(figures: dict[str, list[float]], size: Size) -> list[list[str]]:
    """Return the rows of the table: what this project aims for on a GPU, by number. A part that failed gives NaN."""

    def median(name: str) -> float:
        return statistics.median(figures.get(name, [math.nan]))

    def row(
        aim: int, what: str, value: float, peer: float | None = None, least: float = -math.inf, most: float = math.inf
    ) -> list[str]:
        """A bound is for the ratio to the peer, or for a figure without a peer."""
        ratio = value / peer if peer else math.nan
        judged = value if peer is None else ratio
        asked = f">= {least:g}" if least > -math.inf else f"<= {most:g}" if most < math.inf else ""
        met = "" if not asked or math.isnan(judged) else "yes" if least <= judged <= most else "no"
        return [str(aim), what, *map(number, (value, peer, ratio)), asked, met]

    def number(value: float | None) -> str:
        digits = 2 if value is not None and value < 100 else 0
        return "" if value is None or math.isnan(value) else f"{value:,.{digits}f}".removesuffix(".00")

    fixed = [median(f"llmcli, {rows}") for rows in size.batches if f"llmcli, {rows}" in figures]
    auto, stream, further = map(median, ("llmcli, auto", "llmcli, stream", "llmcli, stream, each further token"))
    whole_peer = median("pipeline, loading seconds") + median("pipeline, seconds of the first run")
    one_line, all_lines = (median(f"llmcli, score, whole process, {name}") for name in ("line", "lines"))
    table = [
        row(1, "tokens/s, `--batch-size auto`; peer: the best fixed size", auto, max(fixed, default=math.nan), 0.9),
        row(1, "tokens/s, auto; peer: `pipeline` at its best batch size", auto, median("pipeline"), 2),
        row(1, f"seconds of a whole process, {size.records:,} records; peer: `pipeline`",
            median("llmcli, whole process"), whole_peer, most=1),
        row(2, "tokens/s, random ends; peer: `pipeline`", median("llmcli, ends"), median("pipeline, ends"), 3),
        row(3, "tokens/s, one stream; peer: `generate`", stream, median("generate, stream"), 3),
        row(3, "the same; peer: `generate` with a static cache", stream, median("static, stream")),
        row(3, "the same; peer: llmcli without graphs", stream, median("llmcli, no graphs, stream")),
        row(3, "the same without the first tokens; peer: what the memory's bandwidth allows", further,
            median("bandwidth") / median("read bytes")),
        row(3, "ms per token of one stream; peer: those in kernels", 1e3 / further,
            1e3 * median("a token, kernel seconds")),
        row(3, "kernels per token; peer: launches, of kernels or graphs", median("a token, kernels"),
            median("a token, launches")),
        row(5, "lines/s, `score`; peer: a loop over the model", median("llmcli, score"), median("score, loop"), 5),
        row(5, f"seconds of a whole process, {size.lines:,} lines; peer: one line", all_lines, one_line, most=2),
    ]  # fmt: skip
    halvings = 2 * math.ceil(math.log2(size.long_records))  # of two runs
    for aim, what, most in (
        (4, "texts in float32 that differ between batch sizes", 0),
        (4, "texts in float32 that differ without graphs", 0),
        (4, "texts in float32 that differ from `generate`", 0),
        (4, "golden tests in float32 that fail", 0),
        (7, f"records lost, {FREE:.0%} of the GPU free", 0),
        (7, f"notices of halved batches, {FREE:.0%} of the GPU free", halvings),
    ):
        table.append(row(aim, what, sum(figures.get(what, [math.nan])), most=most))
    return sorted(table, key=lambda cells: cells[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b", help="of the model (default: 1b)")
    parser.add_argument("--device", help="cuda, cuda:1, or cpu (default: cuda if there is a GPU)")
    parser.add_argument(
        "--only", nargs="+", choices=PROCESSES, default=PROCESSES, help="the parts to run (default: all)"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the figures go (default: gpu.json)")
    given = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"  # Parts may be killed.
    about = json.loads(subprocess.run([*LLMCLI, "env", "--json"], stdout=subprocess.PIPE, check=True).stdout)
    print(json.dumps(about, indent=1), file=sys.stderr, flush=True)
    device = given.device or ("cuda:0" if "cuda:0" in about["devices"] else "cpu")
    with tempfile.TemporaryDirectory(prefix="gpu") as folder:
        setup = Setup(Path(folder), SIZES[given.size], device, STARTED + SECONDS)
        for name in given.only:
            watch(setup, name)
            figures, parts = dict[str, list[float]](), dict[str, Any]()
            for event in setup.events():
                if "part" in event:
                    parts[event["part"]] = event
                else:
                    figures.setdefault(event["name"], []).append(event["value"])
            table = compare(figures, setup.size)
            everything = {"environment": about, "device": device, "size": given.size, "parts": [*parts.values()]}
            given.out.write_text(json.dumps(everything | {"table": table, "figures": figures}, indent=1) + "\n")
        gpu = setup.folder / "gpu.txt"
        print(f"\n{given.size} on {gpu.read_text() if gpu.exists() else device}; {time.time() - STARTED:.0f} s\n")
    header = ["aim", "figure", "llmcli", "peer", "ratio", "asked", "met"]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *table)))
    for part in parts.values():
        if part["error"]:
            print(f"\n{part['part']}: {part['error']}")


if __name__ == "__main__":
    main()
