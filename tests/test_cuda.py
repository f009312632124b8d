"""What only a card can show; skipped without one. `make test-gpu` runs these tests alone."""

import json
import subprocess
import sys

import pytest
import test_golden
import torch
from test_distributed import TORCHRUN

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA GPU"),
]
MIB = 2**20
OPTIONS = [(), ("--logprobs", 2), ("--repetition-penalty", 1.3), ("--regex", "[a-z ]{30,50}")]
EXACT = ("--temperature", 0, "--dtype", "float32")
HOG = """
import sys, time, torch
torch.zeros(1, device="cuda")
taken = torch.empty(torch.cuda.mem_get_info()[0] - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("ready", flush=True)
time.sleep(600)
"""
FAULT = """
import sys, torch, transformers
from llmcli.cli import main

def fail(*args, **settings):
    torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")].item()

transformers.LlamaModel.forward = fail
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def on_gpu(home, monkeypatch):
    monkeypatch.setenv("LLMCLI_DEVICE", "cuda")


@pytest.fixture(scope="session")
def lines(many_lines):
    """Records of mixed length, of which each has its text."""
    records = [json.loads(line) for line in many_lines(80).read_text().splitlines()]
    return "".join(json.dumps(record) + "\n" for record in records if "text" in record).encode()


@pytest.fixture(scope="session")
def large(chatty, tmp_path_factory):
    """A Llama whose weights take 100 MB, and the keys and values of a token 32 KB, in float32."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "large"
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are captured; None for a step that cannot be."""
    from llmcli.pipelines.decoding import DecodeGraph

    captured, capture = [], DecodeGraph.capture
    monkeypatch.setattr(DecodeGraph, "capture", lambda *args: (captured.append(capture(*args)), captured[-1])[1])
    return captured


def texts(ran):
    assert (ran.stderr, ran.exit_status) == ("", 0)
    return [record["generated_text"] for record in ran.records]


@pytest.mark.parametrize("batch_size", [1, 100])
@pytest.mark.parametrize("group", test_golden.TEXTS)
def test_gpu_texts_equal_golden_ones(llmcli, group, batch_size):
    test_golden.test_texts(llmcli, group, batch_size)


@pytest.mark.parametrize("batch_size", [1, 100])
@pytest.mark.parametrize("group", test_golden.ANSWERS)
def test_gpu_answers_equal_golden_ones(llmcli, group, batch_size):
    test_golden.test_answers(llmcli, group, batch_size)


def test_gpu_texts_do_not_depend_on_batch(llmcli, chatty, lines, graphs):
    args = ("generate", "--jsonl", "-m", chatty, *EXACT, "--max-new-tokens", 60)
    found = [texts(llmcli(*args, "--batch-size", size, stdin=lines)) for size in (1, 7, "auto")]
    assert found[0] == found[1] == found[2]
    assert graphs
    assert None not in graphs


@pytest.mark.parametrize("options", OPTIONS)
def test_gpu_graph_gives_texts_of_plain_steps(llmcli, chatty, lines, graphs, monkeypatch, options):
    from llmcli.pipelines.decoding import DecodeGraph

    args = ("generate", "--jsonl", "-m", chatty, *EXACT, "--max-new-tokens", 60, *options)
    captured = texts(llmcli(*args, stdin=lines))
    assert any(graphs)
    monkeypatch.setattr(DecodeGraph, "capture", lambda *_: None)
    assert texts(llmcli(*args, stdin=lines)) == captured


def test_gpu_texts_equal_those_of_cpu(llmcli, chatty, lines):
    args = ("generate", "--jsonl", "-m", chatty, *EXACT, "--max-new-tokens", 40)
    gpu, cpu = (texts(llmcli(*args, "--device", device, stdin=lines)) for device in ("cuda", "cpu"))
    assert sum(one != other for one, other in zip(gpu, cpu, strict=True)) <= 1  # the order of additions differs


def test_gpu_scores_equal_those_of_cpu(llmcli, chatty, lines):
    args = ("score", "--jsonl", "-m", chatty, "--dtype", "float32")
    gpu, cpu = (llmcli(*args, "--device", device, stdin=lines).records for device in ("cuda", "cpu"))
    assert [one["logprob"] for one in gpu] == pytest.approx([one["logprob"] for one in cpu], rel=1e-3)


def test_gpu_seed_repeats_run(llmcli, chatty, lines):
    args = ("generate", "--jsonl", "-m", chatty, "--seed", 3, "--max-new-tokens", 40)
    assert texts(llmcli(*args, stdin=lines)) == texts(llmcli(*args, stdin=lines))


@pytest.mark.slow
@pytest.mark.parametrize("size", [256, "auto"])
def test_gpu_recovers_from_out_of_memory(llmcli, large, size):
    """Rows that together take 1.7 GB of keys and values, where another process leaves 0.5 GB."""
    texts_of = [f"{i} " + "the quick brown fox " * 50 for i in range(256)]
    stdin = "".join(json.dumps({"text": text}) + "\n" for text in texts_of).encode()
    args = ("generate", "--jsonl", "-m", large, *EXACT, "--max-new-tokens", 4)
    expected = texts(llmcli(*args, "--batch-size", 8, stdin=stdin))
    torch.cuda.empty_cache()
    with subprocess.Popen([sys.executable, "-c", HOG, str(500 * MIB)], stdout=subprocess.PIPE, text=True) as hog:
        try:
            assert hog.stdout.readline() == "ready\n"
            ran = llmcli(*args, "--batch-size", size, stdin=stdin)
        finally:
            hog.kill()
    assert ran.exit_status == 0
    assert [record["generated_text"] for record in ran.records] == expected
    assert all(line.startswith("warning: out of memory") for line in ran.stderr.splitlines())
    assert len(ran.stderr.splitlines()) <= 8  # one for each halving


def test_gpu_memory_reader_follows_allocations(large):
    from llmcli import pipelines
    from llmcli.engines.memory import probe_memory
    from llmcli.job import LoadOptions

    device = f"cuda:{torch.cuda.device_count() - 1}"
    pipeline = pipelines.load("causal", large, LoadOptions(device=device, dtype="float32"))
    before = probe_memory(pipeline.model)
    assert before.used >= pipeline.model.get_memory_footprint()
    kept, dropped = (torch.empty(64 * MIB, dtype=torch.uint8, device=device) for _ in range(2))
    del dropped
    after = probe_memory(pipeline.model)
    assert after.used == before.used + 64 * MIB
    assert after.peak == before.used + 128 * MIB
    assert after.free == pytest.approx(before.free - 64 * MIB, abs=32 * MIB)  # other processes
    del kept
    assert probe_memory(pipeline.model).used == before.used
    assert probe_memory(pipeline.model).peak == before.used  # that of the batch before has been reset


def test_gpu_memory_of_idle_model_is_reused(large, tmp_path, capfd):
    """The card has room for one of two models: loading the second unloads the first, and has its memory."""
    from llmcli import pipelines
    from llmcli.engines.model_cache import ModelCache, ModelLease
    from llmcli.job import LoadOptions

    def load():
        return pipelines.load("causal", large, LoadOptions(device="cuda:0", dtype="float32"))

    cache = ModelCache()
    lease = ModelLease(cache)
    size = lease.get("first", 1, load).model.get_memory_footprint()
    lease.release(None)
    torch.cuda.empty_cache()
    filler = torch.empty(torch.cuda.mem_get_info(0)[0] - size // 2, dtype=torch.uint8, device="cuda:0")
    lease.get("second", 2, load)
    assert [model["model"] for model in cache.status()] == ["second"]
    assert torch.cuda.memory_allocated(0) < filler.numel() + 1.5 * size
    assert "unloaded first" in capfd.readouterr().err


@pytest.mark.slow
def test_gpu_fault_ends_job_with_one_error(chatty):
    """A failed assertion on the card: no later call of it works, so no record can."""
    command = [sys.executable, "-c", FAULT, "generate", "--lines", "-m", str(chatty)]
    ran = subprocess.run(command, input="the fox\n" * 50, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert [line.partition(": ")[0] for line in ran.stderr.splitlines()].count("error") == 1
    assert "error: device failed: " in ran.stderr


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_gpu_quantized_model_generates(llmcli, large, scheme):
    pytest.importorskip("bitsandbytes")
    args = ("generate", "--json", "the fox", "-m", large, "--temperature", 0, "--max-new-tokens", 8)
    ran = llmcli(*args, "--quantize", scheme)
    assert ran.exit_status == 0, ran.stderr
    assert ran.records[0]["usage"]["completion_tokens"] > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="requires two GPUs")
@pytest.mark.parametrize("options", [(), ("--tensor-parallel",)])
def test_gpus_under_torchrun_give_texts_of_one(llmcli, chatty, lines, tmp_path, options):
    (tmp_path / "in.jsonl").write_bytes(lines)
    args = ["generate", "--jsonl", "-m", chatty, "-f", tmp_path / "in.jsonl", *EXACT, "--max-new-tokens", 40]
    ran = subprocess.run([*TORCHRUN, *map(str, args), *options], capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.decode() == llmcli(*args).stdout
