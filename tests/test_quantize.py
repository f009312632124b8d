"""--quantize: weights of fewer bits, made once, and bfloat16 layers as the processor reads them best."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llmcli import config, pipelines
from llmcli.compat import torch as kernels
from llmcli.engines.local import Model
from llmcli.engines.model_cache import ModelCache, ModelLease
from llmcli.job import Job, LoadOptions
from llmcli.models import loading
from llmcli.pipelines import quantizer
from llmcli.pipelines.linears import GROUP, Int4Linear, Int8Linear, PackedLinear, WideningLinear

GOLDEN = Path(__file__).parent / "golden"
GREEDY = ("--temperature", 0, "--max-new-tokens", 8)


def copies():
    return sorted((config.cache_dir() / "quantized").glob("*"))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "close"), [(Int4Linear, 0.1), (Int8Linear, 0.02), (PackedLinear, 0.01)])
def test_a_layer_multiplies_as_the_one_it_replaces(kind, close, bias, rows):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias)
    layer = PackedLinear(linear.weight.bfloat16(), linear.bias) if kind is PackedLinear else kind.from_linear(linear)
    if bias:
        layer.bias = nn.Parameter(linear.bias.bfloat16())
    x = torch.randn(2, rows, 64).bfloat16()
    with torch.inference_mode():
        exact, found = linear(x.float()), layer(x).float()
    assert found.shape == exact.shape
    assert (found - exact).norm() < close * exact.norm()


def test_what_four_bits_can_say_is_said_exactly():
    """Weights as GGUF's Q4_1 has them: a least value and fifteen equal steps for each group."""
    codes = torch.arange(32 * 64).reshape(32, 64) * 7 % 16
    codes[:, ::GROUP], codes[:, 1::GROUP] = 0, 15  # the range is used, as it is by who rounds to it
    steps = torch.tensor([0.25, 0.5]).repeat_interleave(GROUP)
    linear = nn.Linear(64, 32, bias=False)
    linear.weight.data = (codes * steps - 2).float()
    x = torch.eye(64).bfloat16()
    with torch.inference_mode():
        assert torch.equal(Int4Linear.from_linear(linear)(x).float(), linear(x.float()))


@pytest.mark.parametrize(("scheme", "kind"), [("int8", Int8Linear), ("int4", Int4Linear)])
def test_a_language_model(llmcli, chatty, scheme, kind):
    args = ("generate", "the quick brown", "-m", chatty, "--quantize", scheme, *GREEDY)
    first = llmcli(*args)
    assert first.stderr == f"note: quantizing the weights to {scheme}, once\n"
    (copy,) = copies()
    second = llmcli(*args)
    assert (second.stdout, second.stderr, second.exit_status) == (first.stdout, "", 0)
    assert copies() == [copy]
    model = pipelines.load("causal", chatty, LoadOptions(quantize=scheme)).model
    layers = [type(module) for module in model.modules() if isinstance(module, nn.Linear | kind)]
    assert layers.count(kind) >= 14
    assert nn.Linear not in layers
    weights = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (copy, chatty)]
    assert weights[0] < weights[1] / 2


def test_the_answer_does_not_depend_on_the_batch(llmcli, chatty):
    lines = b"the quick\nthe lazy dog and then\nonce\n"
    ran = [
        llmcli("generate", "--lines", "-m", chatty, "--quantize", "int8", *GREEDY, "--batch-size", size, stdin=lines)
        for size in (1, 3)
    ]
    assert [each.exit_status for each in ran] == [0, 0]
    assert [len(each.stdout.splitlines()) for each in ran] == [3, 3]


@pytest.mark.parametrize(
    "call",
    [
        ("translate", "--from", "en", "--to", "fr", "hello world", "-m", GOLDEN / "marian"),
        ("summarize", "hello world", "-m", GOLDEN / "t5", "--max-new-tokens", 5),
        ("qa", "who?", "-c", "the dog sleeps", "-m", GOLDEN / "bert-qa"),
    ],
    ids=lambda call: call[0],
)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_other_heads(llmcli, call, scheme):
    """Those whose layers fit; else it is said that none does."""
    ran = llmcli(*call, "--quantize", scheme)
    if ran.exit_status == 0:
        assert len(copies()) == 1
    else:
        assert (ran.exit_status, "has no layer that can be" in ran.stderr) == (2, True)
        assert copies() == []


def test_embeddings_stay_near(llmcli, encoder):
    found = [
        torch.tensor(llmcli("embed", "the quick fox", "-m", encoder, "--quantize", scheme).records[0]["embedding"])
        for scheme in ("none", "int8")
    ]
    assert found[0] @ found[1] > 0.99


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_model_without_fast_bfloat16_runs(llmcli, encoder, chatty, monkeypatch, scheme):
    monkeypatch.setattr(kernels, "has_fast_bfloat16", lambda: False)
    assert llmcli("embed", "the quick fox", "-m", encoder, "--quantize", scheme).exit_status == 0
    assert llmcli("generate", "the quick", "-m", chatty, "--quantize", scheme, *GREEDY).exit_status == 0


@pytest.mark.parametrize(
    ("task", "one_stream", "dtype"),
    [("generate", True, torch.bfloat16), ("generate", False, torch.float32), ("score", True, torch.float32)],
)
def test_dtype_without_fast_bfloat16_depends_on_load(chatty, monkeypatch, task, one_stream, dtype):
    monkeypatch.setattr(kernels, "has_fast_bfloat16", lambda: False)
    job = Job(task, str(chatty), load_options=LoadOptions(device="cpu", one_stream=one_stream))
    assert Model(job, ModelLease(ModelCache())).pipeline.model.dtype == dtype


def test_one_text_and_many_lines_load_as_they_need(llmcli, chatty, monkeypatch):
    monkeypatch.setattr(kernels, "has_fast_bfloat16", lambda: False)
    types = []
    monkeypatch.setattr(quantizer, "pack", lambda model: types.append(model.dtype))
    for args in (("the quick",), ("the quick", "--lines"), ("the quick", "--dtype", "float32")):
        llmcli("generate", *args, "-m", chatty, *GREEDY)
    assert types == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("rows", [1, 7, 8, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_widening_linear_equals_linear(rows, bias):
    linear = nn.Linear(64, 32, bias=bias).bfloat16()
    x = torch.randn(2, rows, 64).bfloat16()
    expected = linear(x)
    linear.__class__ = WideningLinear
    assert torch.allclose(linear(x).float(), expected.float(), atol=0.02)


def test_bfloat16_is_widened_where_it_cannot_be_packed(chatty, monkeypatch):
    monkeypatch.setattr(quantizer, "packable_dtypes", lambda: {torch.float32})
    model = pipelines.load("causal", Path(chatty), LoadOptions(device="cpu", dtype="bfloat16")).model
    assert {type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)} == {WideningLinear}


def test_changed_weights_are_quantized_anew(llmcli, chatty, base, tmp_path):
    folder = shutil.copytree(chatty, tmp_path / "model")
    args = ("generate", "the quick brown", "-m", folder, "--quantize", "int4", *GREEDY)
    llmcli(*args)
    before = copies()
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.neg_()
    model.save_pretrained(folder)
    assert "quantizing" in llmcli(*args).stderr
    assert len(copies()) == 1
    assert copies() != before


def test_rm_removes_it_too(llmcli, chatty, home):
    models = home / "config" / "llmcli" / "models.toml"
    models.parent.mkdir(parents=True, exist_ok=True)
    folder = shutil.copytree(chatty, home / "mine")
    models.write_text(f'[mine]\npath = "{folder}"\n')
    llmcli("generate", "the", "-m", "mine", "--quantize", "int4", *GREEDY)
    assert len(copies()) == 1
    shutil.rmtree(folder)
    assert llmcli("models", "rm", "smollm2").exit_status == 4  # is not there; but what lost its model goes
    assert copies() == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--quantize", "int4", "--dtype", "float32"), "requires bfloat16, not --dtype float32"),
        (("--quantize", "int4", "--offload-folder", "x"), "cannot be used with --offload-folder"),
        (("--quantize", "int4", "--device", "cuda"), "device 'cuda' is not available"),
    ],
)
def test_what_does_not_go_with_it(llmcli, chatty, options, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = llmcli("generate", "the", "-m", chatty, *options)
    assert (ran.exit_status, why in ran.stderr) == (2, True)
    assert copies() == []


@pytest.fixture
def gpu(monkeypatch):
    """A GPU for which everything is decided, but on which nothing can be loaded."""
    monkeypatch.setattr(loading, "choose_device", lambda name: "cuda:0" if name == "auto" else name)
    monkeypatch.setattr(loading, "choose_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(kernels, "read_memory", lambda device: (0, 0, 10**9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "on a GPU requires bitsandbytes, which is not installed\nhint: run `pip install 'llmcli[quantize]'`"),
        (("--device", "mps"), "requires the CPU or CUDA, and the model would be loaded on mps"),
    ],
)
def test_quantize_without_kernels_is_refused(llmcli, chatty, gpu, monkeypatch, options, message):
    monkeypatch.setattr(quantizer, "find_spec", lambda name: None)
    ran = llmcli("generate", "the", "-m", chatty, "--quantize", "int4", *options)
    assert (ran.exit_status, message in ran.stderr) == (2, True)


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4", 4)])
def test_quantize_on_gpu_loads_through_bitsandbytes(llmcli, chatty, gpu, monkeypatch, scheme, bits):
    asked = {}
    monkeypatch.setattr(quantizer, "find_spec", lambda name: name)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda _, **settings: asked.update(settings))
    ran = llmcli("generate", "the", "-m", chatty, "--quantize", scheme, "--dtype", "float16")
    assert ran.exit_status == 4
    assert asked["device_map"] == {"": "cuda:0"}
    assert getattr(asked["quantization_config"], f"load_in_{bits}bit")
    assert copies() == []
    if scheme == "int4":
        assert asked["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16


def test_quantize_on_gpu_too_small_is_refused(llmcli, chatty, gpu, monkeypatch):
    """bitsandbytes has no layers in main memory, of which there is enough."""
    monkeypatch.setattr(quantizer, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels, "read_memory", lambda device: (0, 0, 1000))
    ran = llmcli("generate", "the", "-m", chatty, "--quantize", "int4")
    assert (ran.exit_status, "but only 1.0 kB is available" in ran.stderr) == (4, True)


@pytest.mark.parametrize(("scheme", "maximum"), [("int8", 0.05), ("int4", 0.25)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_quantize_by_bitsandbytes_has_the_expected_size(tmp_path, tiny, name, scheme, maximum):
    pytest.importorskip("bitsandbytes")  # which also runs on CPUs
    options = LoadOptions(device="cpu", dtype="bfloat16", quantize=scheme)
    folder = make_causal(tmp_path, tiny, name)
    exact, tokenizer = loading.load(folder, options, pipelines.pipeline_class("causal"))
    config = quantizer.bitsandbytes_config(options, "cpu")
    model, _ = loading.load(folder, options, pipelines.pipeline_class("causal"), config)
    quantizer.check_layers(model, folder, scheme)
    expected = loading._size(loading._weights(folder, options), 2, loading.QUANTIZED_BYTES[scheme])
    # The scales of int4 do not count as parameters.
    assert abs(expected - model.get_memory_footprint()) < 0.08 * expected
    ids = torch.tensor([tokenizer("the quick brown fox")["input_ids"]])
    with torch.inference_mode():
        logits, close = exact(ids).logits.float(), model(ids).logits.float()
    assert (close - logits).norm() < maximum * logits.norm()


def make_causal(path, tiny, name):
    from transformers import AutoConfig, AutoTokenizer

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_key_value_heads": 4}
    config = AutoConfig.for_model(name, **sizes, num_attention_heads=4, vocab_size=400, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_it_leaves_nothing_half(llmcli, chatty, tmp_path, number):
    """At some moment of its work; the next call finds a whole copy, or makes one."""
    args = ["generate", "the", "-m", str(chatty), "--quantize", "int4", "--temperature", "0", "--max-new-tokens", "2"]
    for seconds in (1.5, 2.0, 2.5):
        call = subprocess.Popen([sys.executable, "-m", "llmcli", *args], stderr=subprocess.PIPE)
        time.sleep(seconds)
        call.send_signal(number)
        call.communicate()
        for copy in copies():
            assert json.loads((copy / "config.json").read_text())["quantization_config"]["scheme"] == "int4"
            assert list(copy.glob("*.safetensors"))
    assert llmcli(*args).exit_status == 0
    assert len(copies()) == 1
    assert not list((config.cache_dir() / "staging").glob("*"))


def test_a_resumed_run_may_not_change_it(llmcli, chatty, tmp_path):
    args = ("generate", "--lines", "-m", chatty, "--output", tmp_path / "out", "--resume", *GREEDY)
    llmcli(*args, stdin=b"the\n")
    ran = llmcli(*args, "--quantize", "int8", stdin=b"the\n")
    assert (ran.exit_status, "the job" in ran.stderr or "has changed" in ran.stderr) == (2, True)


@pytest.mark.real
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_default_model_says_what_it_said(llmcli, smollm2, scheme):
    args = ("generate", "The capital of France is", "-m", smollm2, "--quantize", scheme)
    ran = llmcli(*args, "--temperature", 0, "--max-new-tokens", 5)
    assert ran.exit_status == 0
    assert "is Paris" in ran.stdout


def test_layers_that_only_their_own_forward_reads_are_replaced():
    """T5 names each of its layers' weights where it makes them at random."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=1)
    model = T5ForConditionalGeneration(config)
    quantizer.quantize(model, "int8")
    left = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is nn.Linear}
    assert left == {"wo"}  # which transformers keeps in float32


@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--quantize", "int8"]], ids=" ".join)
def test_a_layer_whose_weights_the_model_multiplies_itself_stays_as_it_is(llmcli, tiny, tmp_path, options):
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, time_step_rank=16, pad_token_id=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    ran = llmcli("generate", "the fox", "-m", tmp_path, "--max-new-tokens", 3, "--json", *options)
    assert (ran.exit_status, ran.records[0]["usage"]["completion_tokens"]) == (0, 3)
