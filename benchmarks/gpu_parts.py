"""What `gpu.py` measures, a child at a time: models and inputs, Transformers alone, llmcli, whole processes of it."""

import functools
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import batch
import decode
import score

STARTED = time.time()
RUNS = 3  # of a short part
ENOUGH_S = 45  # of a long part: after that, nothing is run again
VOCABULARY = 49_152  # as SmolLM2 has
LETTERS = "aabcdeefghiijklmnooprstuvwyz"
END_EVERY = 64  # one token in 64 ends an answer of the twin
LLMCLI = [sys.executable, "-m", "llmcli"]
GOLDEN = decode.ROOT / "tests" / "golden"
GOLDEN_CALLS = {
    "marian": ("marian", "translate", "--from", "en", "--to", "fr"),
    "t5-translate": ("t5", "translate", "--from", "en", "--to", "fr"),
    "t5-summarize": ("t5", "summarize"),
    "bart-summarize": ("bart", "summarize"),
    "nllb": ("nllb", "translate", "--from", "en", "--to", "fr"),
}
FREE = 0.1  # of the card, which another process leaves
HOG = """
import sys, time, torch
free, total = torch.cuda.mem_get_info()
taken = torch.empty(int(free - float(sys.argv[1]) * total), dtype=torch.uint8, device="cuda")
print("ready", flush=True)
time.sleep(600)
"""


@dataclass(frozen=True)
class Size:
    """A model's shape, and how much work it gets."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    records: int = 2048
    new_tokens: int = 64
    max_tokens: int = 256  # of an answer that ends at random
    batches: tuple[int, ...] = (128, 256, 512, 1024)
    peer_batches: tuple[int, ...] = (128, 256, 512)
    peer_records: int = 512  # that find the best batch size, and that end at random
    stream: tuple[int, int] = (16, 272)  # tokens of a short and a long answer
    lines: int = 10_000
    loop_lines: int = 300
    long_records: int = 512
    long_words: int = 700
    parity_records: int = 32


SIZES = {
    "small": Size(
        64, 2, 4, 2, 128, records=96, new_tokens=8, max_tokens=64, batches=(8, 32), peer_batches=(8, 32),
        peer_records=64, stream=(4, 36), lines=400, loop_lines=40, long_records=16, long_words=100, parity_records=6
    ),
    "1b": Size(2048, 22, 32, 4, 5632),
    "7b": Size(4096, 32, 32, 8, 14336, records=1024, peer_records=256),
}  # fmt: skip
PARITY = Size(512, 8, 8, 2, 1408)  # for float32: only its texts matter
PARITY_TOKENS = 48  # enough for a CUDA graph
PROFILE_TOKENS = (48, 112)
PARITY_BATCHES = ("1", "7", "64", "auto")


class SkipError(Exception):
    """A part that has nothing to measure on this machine."""


events: Any = None  # where a child writes, a JSON object a line


def report(**event: Any) -> None:
    print(json.dumps(event), file=events, flush=True)


def note(name: str, value: float) -> None:
    """Write down one run of a figure. Its median counts."""
    report(name=name, value=value)


@dataclass(frozen=True)
class Setup:
    """What the parts run on: the folder of models and inputs."""

    folder: Path
    size: Size
    device: str

    def texts(self, name: str) -> list[str]:
        return [json.loads(line)["text"] for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]


# Models and inputs


def make(setup: Setup) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    parity = min(PARITY, setup.size, key=lambda shape: shape.hidden)
    chance = random.Random(7)
    words = (" " + "".join(chance.choices(LETTERS, k=chance.randint(3, 9))) for _ in range(60_000))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([decode.text(), *words], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    note("vocabulary", len(fast))
    for name, shape, dtype in (("model", setup.size, torch.bfloat16), ("parity", parity, torch.float32)):
        config = LlamaConfig(
            hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads, intermediate_size=shape.intermediate, vocab_size=VOCABULARY,
            max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(setup.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(setup.folder / name)
        fast.save_pretrained(setup.folder / name)
        if name == "model":
            embeddings = model.get_input_embeddings().weight.numel()
            note("read bytes", 2 * (model.num_parameters() - embeddings))  # for each token of one stream
    twin = setup.folder / "ends"
    twin.mkdir()
    for file in (setup.folder / "model").iterdir():
        if file.name != "generation_config.json":
            os.link(file, twin / file.name)
    settings = json.loads((setup.folder / "model" / "generation_config.json").read_text())
    settings["eos_token_id"] = list(range(2, VOCABULARY, END_EVERY))
    (twin / "generation_config.json").write_text(json.dumps(settings))

    known = decode.ROOT.joinpath("LICENSE").read_text().split()
    longs = [" ".join(chance.choices(known, k=setup.size.long_words)) for _ in range(setup.size.long_records)]
    texts = {"prompts": batch.prompts(setup.size.records), "long": longs}
    texts["parity"] = batch.prompts(setup.size.parity_records)
    texts["one"] = texts["prompts"][:1]
    for name, some in texts.items():
        (setup.folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    lines = score.lines(setup.size.lines)
    (setup.folder / "lines.txt").write_text("".join(f"{line}\n" for line in lines))
    (setup.folder / "line.txt").write_text(f"{lines[0]}\n")


# Peers: Transformers alone


@functools.cache
def load_peer(folder: Path, device: str, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device), tokenizer


def peer(setup: Setup) -> tuple[Any, Any]:
    return load_peer(setup.folder / "model", setup.device, "bfloat16")


def peer_load(setup: Setup) -> None:
    import transformers  # noqa: F401

    peer(setup)
    note("pipeline, loading seconds", time.time() - STARTED)


def bandwidth(setup: Setup) -> None:
    """Bytes a second that a copy reads and writes."""
    import torch

    if not setup.device.startswith("cuda"):
        raise SkipError("needs a card")
    source = torch.empty(2**30, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    for _ in range(RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        note("bandwidth", 20 * 2 * source.numel() / (begin.elapsed_time(end) / 1e3))


@contextmanager
def counted_tokens(model: Any) -> Iterator[list[int]]:
    """Count the tokens of answers, each up to its end."""
    import torch

    counts: list[int] = []
    generate, ends = model.generate, torch.tensor(model.generation_config.eos_token_id, device=model.device)

    def count(*args: Any, **options: Any) -> Any:
        output = generate(*args, **options)
        answers = output[:, options["input_ids"].shape[1] :]
        is_end = torch.isin(answers, ends)
        lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, answers.shape[1])
        counts.append(int(lengths.sum()))
        return output

    model.generate = count
    try:
        yield counts
    finally:
        model.generate = generate


def run_pipeline(setup: Setup, texts: list[str], rows: int, options: dict[str, Any]) -> tuple[float, float]:
    """Tokens a second, and seconds."""
    from transformers import pipeline

    model, tokenizer = peer(setup)
    run = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=rows, return_full_text=False)
    for _ in run((text for text in texts[:rows]), **(options | {"max_new_tokens": 2, "min_new_tokens": 2})):
        pass
    with counted_tokens(model) as counts:
        start = time.perf_counter()
        for _ in run((text for text in texts), **options):
            pass
        seconds = time.perf_counter() - start
    return sum(counts) / seconds, seconds


def peer_pipeline(setup: Setup) -> None:
    new, texts = setup.size.new_tokens, setup.texts("prompts")
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    speeds = {}
    for rows in setup.size.peer_batches:
        speeds[rows], _ = run_pipeline(setup, texts[: setup.size.peer_records], rows, options)
        note(f"pipeline, batch {rows}", speeds[rows])
    best = max(speeds, key=speeds.__getitem__)
    note("pipeline, best batch", best)
    speed, seconds = run_pipeline(setup, texts, best, options)
    note("pipeline", max(speed, speeds[best]))
    note("pipeline, seconds", seconds)


def peer_ends(setup: Setup) -> None:
    model, _ = peer(setup)
    old = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = list(range(2, VOCABULARY, END_EVERY))
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    sampling["max_new_tokens"] = setup.size.max_tokens
    try:
        texts = setup.texts("prompts")[: setup.size.peer_records]
        note("pipeline, ends", run_pipeline(setup, texts, min(256, len(texts)), sampling)[0])
    finally:
        model.generation_config.eos_token_id = old


def generate_once(setup: Setup, new: int, **options: Any) -> float:
    """Seconds of plain `generate` for one prompt."""
    model, tokenizer = peer(setup)
    inputs = tokenizer(setup.texts("one")[0], return_tensors="pt").to(setup.device)
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
    output.cpu()
    return time.perf_counter() - start


def peer_stream(setup: Setup) -> None:
    short, long = setup.size.stream
    generate_once(setup, short)
    for _ in range(RUNS):
        note("generate, stream", long / generate_once(setup, long))


def peer_static(setup: Setup) -> None:
    """Plain `generate` with a static cache, which Transformers compiles on a card."""
    short, long = setup.size.stream
    note("static, first seconds", generate_once(setup, short, cache_implementation="static"))
    for _ in range(RUNS):
        note("static, stream", long / generate_once(setup, long, cache_implementation="static"))


def peer_parity(setup: Setup) -> None:
    """The texts of plain `generate`, each prompt alone."""
    model, tokenizer = load_peer(setup.folder / "parity", setup.device, "float32")
    texts, new = [], PARITY_TOKENS
    for text in setup.texts("parity"):
        inputs = tokenizer(text, return_tensors="pt").to(setup.device)
        output = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    (setup.folder / "texts.json").write_text(json.dumps(texts))


def peer_score(setup: Setup) -> None:
    """Perplexities by a loop over the model: a line at a time, and 64 lines."""
    import torch

    model, tokenizer = peer(setup)
    lines = (setup.folder / "lines.txt").read_text().splitlines()

    def read(some: list[str]) -> list[float]:
        inputs = tokenizer(some, return_tensors="pt", padding=True).to(setup.device)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)[:, 1:]
        with torch.inference_mode():
            logits = model(**inputs).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return (losses.sum(1) / (labels != -100).sum(1)).exp().tolist()

    for name, rows, some in (("loop", 1, lines[: setup.size.loop_lines]), ("loop of 64", 64, lines[:2560])):
        read(some[:rows])
        start = time.perf_counter()
        for i in range(0, len(some), rows):
            read(some[i : i + rows])
        note(f"score, {name}", len(some) / (time.perf_counter() - start))


# llmcli, in a process that keeps the model


class Called(NamedTuple):
    """What a command line did."""

    seconds: float
    first_s: float  # until the first output
    records: list[dict[str, Any]]
    errors: str

    @property
    def tokens(self) -> int:
        return sum(record["usage"]["completion_tokens"] for record in self.records)


class TimedOutput(io.BytesIO):
    first: float | None = None

    def write(self, data: Any) -> int:
        self.first = self.first or time.perf_counter()
        return super().write(data)


@functools.cache
def keep_model() -> None:
    """Let all calls of this process share one engine, and its loaded models."""
    from llmcli import engines
    from llmcli.engines.local import LocalEngine

    engine = LocalEngine()
    engines.engine_for = lambda job: engine  # type: ignore[assignment]


def call(setup: Setup, *args: object) -> Called:
    """Run the real main()."""
    from llmcli import cli

    keep_model()
    out, err = TimedOutput(), io.BytesIO()
    streams = [io.TextIOWrapper(stream) for stream in (io.BytesIO(), out, err)]
    old = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = streams
    start = time.perf_counter()
    try:
        status = cli.main([*map(str, args), "--device", setup.device])
    finally:
        seconds = time.perf_counter() - start
        for stream in streams[1:]:
            stream.flush()
        sys.stdin, sys.stdout, sys.stderr = old
    text, errors = out.getvalue().decode(), err.getvalue().decode()
    assert status == 0, f"exit code {status}: {errors[-400:]}"
    records = [json.loads(line) for line in text.splitlines()] if "--lines" not in args else []
    return Called(seconds, (out.first or start) - start, records, errors)


def generate(
    setup: Setup, *args: object, model: str = "model", file: str = "prompts", dtype: str = "bfloat16"
) -> Called:
    return call(
        setup, "generate", "--jsonl", "-m", setup.folder / model, "-f", setup.folder / f"{file}.jsonl",
        "--dtype", dtype, *args,
    )  # fmt: skip


def greedy(new: int) -> tuple[object, ...]:
    return ("--temperature", 0, "--max-new-tokens", new, "--min-new-tokens", new)


@contextmanager
def without_graphs() -> Iterator[None]:
    """Let steps of decoding run kernel by kernel."""
    from llmcli.pipelines.decoding import DecodeGraph

    capture = DecodeGraph.capture
    DecodeGraph.capture = lambda *_: None  # type: ignore[assignment]
    try:
        yield
    finally:
        DecodeGraph.capture = capture  # type: ignore[method-assign]


def llmcli_load(setup: Setup) -> None:
    generate(setup, *greedy(2), file="one")
    note("llmcli, loading seconds", time.time() - STARTED)


def llmcli_batch(setup: Setup) -> None:
    begun = time.perf_counter()
    for size in ("auto", *setup.size.batches, "auto", "auto"):
        if size == "auto" and time.perf_counter() - begun > ENOUGH_S:
            break
        done = generate(setup, *greedy(setup.size.new_tokens), "--batch-size", size)
        note(f"llmcli, {size}", done.tokens / done.seconds)
        note(f"llmcli, {size}, first record", done.first_s)
    if time.perf_counter() - begun < ENOUGH_S:
        with without_graphs():
            done = generate(setup, *greedy(setup.size.new_tokens))
        note("llmcli, no graphs, auto", done.tokens / done.seconds)


def llmcli_ends(setup: Setup) -> None:
    options = ("--temperature", 1, "--top-k", 0, "--top-p", 1, "--max-new-tokens", setup.size.max_tokens)
    generate(setup, *greedy(2), model="ends", file="one")
    begun = time.perf_counter()
    for _ in range(RUNS):
        if time.perf_counter() - begun > ENOUGH_S / 3:
            break
        done = generate(setup, *options, model="ends")
        note("llmcli, ends", done.tokens / done.seconds)
        note("llmcli, ends, tokens per record", done.tokens / len(done.records))
        note("llmcli, ends, first record", done.first_s)


def llmcli_stream(setup: Setup) -> None:
    short, long = setup.size.stream
    generate(setup, *greedy(short), file="one")
    for _ in range(RUNS):
        brief, whole = (generate(setup, *greedy(new), file="one").seconds for new in (short, long))
        note("llmcli, stream", long / whole)
        note("llmcli, stream, each further token", (long - short) / (whole - brief))
    with without_graphs():
        note("llmcli, no graphs, stream", long / generate(setup, *greedy(long), file="one").seconds)


def llmcli_profile(setup: Setup) -> None:
    """Where the time of a token goes: a long answer less a short one."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if not setup.device.startswith("cuda"):
        raise SkipError("needs a card")
    totals = []
    for new in PROFILE_TOKENS:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            generate(setup, *greedy(new), file="one")
        averages = seen.key_averages()
        kernels = [item for item in averages if item.device_type == DeviceType.CUDA]
        launches = {name: sum(item.count for item in averages if text in item.key)
                    for name, text in (("launches", "LaunchKernel"), ("graphs", "GraphLaunch"))}  # fmt: skip
        busy = sum(item.self_device_time_total for item in kernels) / 1e6
        totals.append({"kernel seconds": busy, "kernels": sum(item.count for item in kernels), **launches})
    tokens = PROFILE_TOKENS[1] - PROFILE_TOKENS[0]
    for name in totals[0]:
        note(f"a token, {name}", (totals[1][name] - totals[0][name]) / tokens)


def llmcli_parity(setup: Setup) -> None:
    def texts(size: str) -> list[str]:
        options = (*greedy(PARITY_TOKENS), "--batch-size", size)
        done = generate(setup, *options, model="parity", file="parity", dtype="float32")
        return [record["generated_text"] for record in done.records]

    found = {size: texts(size) for size in PARITY_BATCHES}
    for some in found.values():
        note("texts that differ by batch size", count_differing(some, found["auto"]))
    with without_graphs():
        note("texts that differ without graphs", count_differing(texts("auto"), found["auto"]))
    plain = json.loads((setup.folder / "texts.json").read_text())
    note("texts that differ from plain generate", count_differing(found["auto"], plain))


def count_differing(some: list[str], others: list[str]) -> int:
    return sum(one != other for one, other in zip(some, others, strict=True))


def llmcli_golden(setup: Setup) -> None:
    """Answers that differ from those of Transformers 4.57 in float32."""
    gold = json.loads((GOLDEN / "gold.json").read_text(encoding="utf-8"))
    for group, (model, command, *languages) in GOLDEN_CALLS.items():
        field = "translation_text" if command == "translate" else "summary_text"
        for settings in {json.dumps(case["gen"]) for case in gold[group]["cases"]}:
            cases = [case for case in gold[group]["cases"] if json.dumps(case["gen"]) == settings]
            path = setup.folder / "golden.jsonl"
            path.write_text("".join(json.dumps({"text": case["text"]}) + "\n" for case in cases))
            given = json.loads(settings)
            options = [item for key in given for item in ("-o", f"{key}={json.dumps(given[key])}")]
            done = call(setup, command, "--jsonl", "-m", GOLDEN / model, "-f", path, "--dtype", "float32",
                        *languages, *options)  # fmt: skip
            texts = [record[field] for record in done.records]
            note(f"golden answers that differ, {group}", count_differing(texts, [case["output"] for case in cases]))


def llmcli_score(setup: Setup) -> None:
    for _ in range(RUNS):
        done = call(setup, "score", "--lines", "-m", setup.folder / "model", "-f", setup.folder / "lines.txt",
                    "--dtype", "bfloat16")  # fmt: skip
        note("llmcli, score", setup.size.lines / done.seconds)


# llmcli, whole processes


def run_process(setup: Setup, *args: object) -> tuple[float, list[str], str]:
    start = time.perf_counter()
    command = [*LLMCLI, *map(str, args), "--device", setup.device, "--dtype", "bfloat16"]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert ran.returncode in (0, 3), f"exit code {ran.returncode}: {ran.stderr[-400:]}"
    return time.perf_counter() - start, ran.stdout.splitlines(), ran.stderr


def whole_generate(setup: Setup) -> None:
    args = ("generate", "--jsonl", "-m", setup.folder / "model", *greedy(setup.size.new_tokens))
    note("llmcli, whole process", run_process(setup, *args, "-f", setup.folder / "prompts.jsonl")[0])


def whole_score(setup: Setup) -> None:
    for name in ("line", "lines"):
        args = ("score", "--lines", "-m", setup.folder / "model", "-f", setup.folder / f"{name}.txt")
        note(f"llmcli, score, whole process, {name}", run_process(setup, *args)[0])


def whole_memory(setup: Setup) -> None:
    """Long prompts while another process has the rest of the card, at the chosen size and at one that is too large."""
    hog = None
    if setup.device.startswith("cuda"):
        hog = subprocess.Popen([sys.executable, "-c", HOG, str(FREE)], stdout=subprocess.PIPE, text=True)
        assert hog.stdout
        assert hog.stdout.readline().strip() == "ready", "no memory could be taken"
    try:
        for size in ("auto", setup.size.long_records):
            args = ("generate", "--jsonl", "-m", setup.folder / "model", *greedy(16), "--batch-size", size)
            seconds, lines, errors = run_process(setup, *args, "-f", setup.folder / "long.jsonl")
            failed = sum("error" in json.loads(line) for line in lines)
            note(f"memory, {size}, seconds", seconds)
            note("memory, records lost", setup.size.long_records - len(lines) + failed)
            note("memory, notices", errors.count("warning: out of memory"))
    finally:
        if hog:
            hog.kill()
            hog.wait()


Part = Callable[[Setup], None]
# Children, each with its parts and the seconds that these may take.
CHILDREN: dict[str, dict[str, tuple[Part, int]]] = {
    "make": {"make": (make, 60)},
    "peers": {
        "load": (peer_load, 60), "bandwidth": (bandwidth, 10), "pipeline": (peer_pipeline, 75),
        "ends": (peer_ends, 40), "stream": (peer_stream, 25), "score": (peer_score, 20),
        "parity": (peer_parity, 25),
    },
    "llmcli": {
        "load": (llmcli_load, 60), "batch": (llmcli_batch, 90), "ends": (llmcli_ends, 40),
        "stream": (llmcli_stream, 30), "profile": (llmcli_profile, 25), "score": (llmcli_score, 25),
        "parity": (llmcli_parity, 30), "golden": (llmcli_golden, 25),
    },
    "whole": {"generate": (whole_generate, 40), "score": (whole_score, 40), "memory": (whole_memory, 80)},
    "static": {"static": (peer_static, 90)},
}  # fmt: skip


def main(folder: str, size: str, device: str, child: str, *parts: str) -> None:
    """Run parts of a child, and report each."""
    global events
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "true"}
    setup = Setup(Path(folder), SIZES[size], device)
    for name in parts:
        report(begin=name)
        error = None
        try:
            CHILDREN[child][name][0](setup)
        except SkipError as exc:
            error = f"skipped: {exc}"
        except Exception as exc:
            error = f"{type(exc).__name__}: {' '.join(str(exc).split())[:400]}"
        report(end=name, error=error)
    os._exit(0)  # Freeing models is slow.


if __name__ == "__main__":
    main(*sys.argv[1:])
