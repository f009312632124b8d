"""--adapter: what is merged computes what PEFT computes, and what does not fit is refused by name."""

import json
import shutil

import pytest
import torch
from adapters import make_adapter, make_lora
from conftest import make_tiny
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from weights import make_gguf, register

from llmcli.engines.local import Model
from llmcli.engines.model_cache import ModelCache, ModelLease
from llmcli.job import Job, LoadOptions

PROMPT = "the quick brown fox"
GREEDY = ("--dtype", "float32", "--temperature", 0, "--max-new-tokens", 12)
QV = ["q_proj", "v_proj"]


def causal(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def merged(model, adapter, task="generate", lease=None):
    """Return what llmcli loads."""
    options = LoadOptions(device="cpu", dtype="float32")
    job = Job(task, str(model), adapter=str(adapter), load_options=options)
    return Model(job, lease or ModelLease(ModelCache())).pipeline


def tokens_for(model):
    size = model.config.get_text_config().vocab_size
    return torch.randint(2, min(size, 250), (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def others(tiny, tmp_path_factory):
    """Tiny models of other architectures with the tokenizer of the tiny Llama."""
    place, tokenizer = tmp_path_factory.mktemp("models"), AutoTokenizer.from_pretrained(tiny)
    size, pad = len(tokenizer), {"pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 0}
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=64, **pad)),
        "mixtral": MixtralForCausalLM(
            MixtralConfig(vocab_size=size, num_key_value_heads=2, num_local_experts=4, **sizes, **pad)
        ),
        "t5": T5ForConditionalGeneration(
            T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                     decoder_start_token_id=1, **pad)
        ),
        "bert": BertForPreTraining(BertConfig(vocab_size=size, max_position_embeddings=64, **sizes)),
    }  # fmt: skip
    for name, model in models.items():
        for parameter in model.parameters():  # not as small as they are initialized: greedy tokens depend on them
            parameter.data.mul_(1 if name == "t5" else 2)
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    return place


@pytest.fixture
def lora(tiny, tmp_path):
    """An adapter of the tiny Llama."""
    return make_lora(tmp_path / "lora", tiny)


LLAMA = {
    "rank": LoraConfig(r=1, lora_alpha=7, target_modules="all-linear"),
    "rslora": LoraConfig(r=16, use_rslora=True, lora_alpha=32, target_modules=QV, task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=QV),
    "patterns": LoraConfig(r=4, target_modules=QV, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "some layers": LoraConfig(r=4, target_modules=QV, layers_to_transform=[1]),
    "bias": LoraConfig(r=4, target_modules=QV, bias="all"),
    "saved head": LoraConfig(r=4, target_modules=QV, modules_to_save=["lm_head", "norm"]),
    "pissa": LoraConfig(r=4, target_modules=QV, init_lora_weights="pissa"),
    "tokens": LoraConfig(r=4, target_modules=QV, trainable_token_indices=[*range(9, 99)]),
    "adalora": AdaLoraConfig(target_modules=QV, total_step=10),
    "ia3": IA3Config(target_modules=[*QV, "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=4, target_modules=QV),
    "lokr": LoKrConfig(r=4, target_modules=QV),
    "oft": OFTConfig(oft_block_size=8, r=0, target_modules=QV),
    "norms": LNTuningConfig(target_modules=["input_layernorm"]),
    "only tokens": TrainableTokensConfig(token_indices=[*range(9, 99)]),
}


@pytest.mark.parametrize("name", LLAMA)
def test_adapter_merged_equals_unmerged(name, tiny, tmp_path):
    adapted = make_adapter(tmp_path / "adapter", causal(tiny), LLAMA[name])
    check_equal(adapted, merged(tiny, tmp_path / "adapter").model, causal(tiny))


OTHERS = {
    "gpt2": LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "gpt2 tied": LoraConfig(r=4, target_modules=["wte", "c_proj"], fan_in_fan_out=True),
    "gpt2 head": LoraConfig(r=4, target_modules=["c_attn"], modules_to_save=["lm_head"]),
    "gpt2 embeddings": LoraConfig(r=4, target_modules=["c_attn"], modules_to_save=["wte"]),
    "mixtral": LoraConfig(r=4, target_modules=QV, target_parameters=["mlp.experts.gate_up_proj"]),
    "t5": LoraConfig(r=4, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_adapter_merged_equals_unmerged_elsewhere(name, others, tmp_path):
    folder = others / name.split()[0]
    load = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    adapted = make_adapter(tmp_path / "adapter", load.from_pretrained(folder, dtype=torch.float32), OTHERS[name])
    ours = merged(folder, tmp_path / "adapter", "summarize" if name == "t5" else "generate").model
    check_equal(adapted, ours, load.from_pretrained(folder, dtype=torch.float32))


@torch.inference_mode()
def check_equal(adapted, ours, base):
    ids = tokens_for(base)
    more = {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
    expected, logits = adapted(input_ids=ids, **more).logits, ours(input_ids=ids, **more).logits
    assert (logits - expected).abs().max() < 1e-4
    assert (logits - base(input_ids=ids, **more).logits).abs().max() > 1e-2


def test_adapter_greedy_text_equals_that_of_peft(llmcli, tiny, tmp_path):
    adapted = make_adapter(tmp_path / "lora", causal(tiny), LoraConfig(r=8, target_modules="all-linear"))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = adapted.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    ran = llmcli("generate", PROMPT, "-m", tiny, "--adapter", tmp_path / "lora", *GREEDY, "--json")
    assert ran.records[0]["generated_text"] == expected
    assert llmcli("generate", PROMPT, "-m", tiny, *GREEDY, "--json").records[0]["generated_text"] != expected


def test_adapter_names_its_base_model(llmcli, tiny, lora, monkeypatch):
    monkeypatch.chdir(lora.parent)
    expected = llmcli("generate", PROMPT, "-m", tiny, "--adapter", lora, *GREEDY)
    ran = llmcli("generate", PROMPT, "--adapter", "lora", *GREEDY)
    assert (ran.exit_status, ran.stdout) == (0, expected.stdout)
    assert ran.stderr == f"note: base model of the adapter: {tiny}\n"
    change_config(lora, base_model_name_or_path="/no/such/model")
    ran = llmcli("generate", PROMPT, "--adapter", "lora")
    assert ran.exit_status == 4
    assert ran.stderr == "error: base model '/no/such/model' of the adapter not found\nhint: pass it: -m NAME\n"


def change_config(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_adapter_base_on_the_hub_has_a_revision(lora, llmcli):
    change_config(lora, base_model_name_or_path="org/base", revision="v2")
    ran = llmcli("generate", PROMPT, "--adapter", lora, "--offline")
    assert ran.exit_status == 4
    assert ran.stderr.startswith("note: base model of the adapter: org/base@v2\nerror: org/base@v2 is not cached")
    ran = llmcli("generate", PROMPT, "--adapter", "org/lora@v1", "--offline")
    assert "hint: run `hf download org/lora@v1` with a network" in ran.stderr


@pytest.mark.parametrize("option", ["--trust-remote-code", "--allow-pickle"])
def test_adapter_does_not_choose_code(llmcli, lora, option):
    ran = llmcli("generate", PROMPT, "--adapter", lora, option)
    assert (ran.exit_status, ran.stderr.count("\n")) == (2, 1)
    assert "--adapter requires -m" in ran.stderr


def test_adapter_for_labels_brings_its_head(llmcli, others, tmp_path):
    texts = ["the quick brown fox", "a lazy dog sleeps"]
    base = AutoModelForSequenceClassification.from_pretrained(others / "bert", num_labels=3, dtype=torch.float32)
    adapted = make_adapter(
        tmp_path / "labels", base, LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    inputs = AutoTokenizer.from_pretrained(others / "bert")(texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        scores = adapted(**inputs).logits.softmax(-1)
    ran = llmcli("classify", *texts, "-m", others / "bert", "--adapter", tmp_path / "labels", *GREEDY[:2], "--json")
    assert ran.exit_status == 0, ran.stderr
    for record, expected in zip(ran.records, scores, strict=True):
        found = {item["label"]: item["score"] for item in record["scores"]}
        assert [found[f"LABEL_{i}"] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-4)
    ran = llmcli("classify", *texts, "-m", others / "bert")
    assert (ran.exit_status, ran.stdout) == (4, "")


def test_adapter_brings_tokens_and_a_tokenizer(llmcli, tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<new>"])
    base = causal(tiny)
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(r=4, target_modules=QV, modules_to_save=["embed_tokens", "lm_head"])
    adapted = make_adapter(tmp_path / "lora", base, config)
    tokenizer.save_pretrained(tmp_path / "lora")
    ids = tokenizer("the <new>", return_tensors="pt")
    ids = adapted.generate(**ids, do_sample=False, max_new_tokens=8)[0, ids["input_ids"].shape[1] :]
    ran = llmcli("generate", "the <new>", "-m", tiny, "--adapter", tmp_path / "lora", *GREEDY[:-1], 8, "--json")
    assert ran.records[0]["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_adapter_tokenizer_may_pad_with_an_unknown_token(llmcli, tiny, lora):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    expected = llmcli("generate", "the", PROMPT, "--lines", "-m", tiny, "--adapter", lora, *GREEDY)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(lora)
    ran = llmcli("generate", "the", PROMPT, "--lines", "-m", tiny, "--adapter", lora, *GREEDY)
    assert (ran.exit_status, ran.stdout) == (0, expected.stdout)


def pickled(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def rename_weight(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights[max(weights).replace("layers.1", "layers.7")] = weights.pop(max(weights))
    save_file(weights, folder / "adapter_model.safetensors")


def lose_weight(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    del weights[max(weights)]
    save_file(weights, folder / "adapter_model.safetensors")


def break_weight(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights[max(weights)].fill_(torch.nan)
    save_file(weights, folder / "adapter_model.safetensors")


UNFIT = {
    "pickled": (pickled, "has no adapter_model.safetensors"),
    "no settings": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "not there": (shutil.rmtree, "lora not found"),
    "prompt tuning": (lambda folder: change_config(folder, peft_type="PROMPT_TUNING"), "type PROMPT_TUNING are not"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "type None are not supported"),
    "imports": (lambda folder: change_config(folder, megatron_config={"a": 1}), "not supported: megatron_config"),
    "repeats": (lambda folder: change_config(folder, layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "by prompt": (lambda folder: change_config(folder, alora_invocation_tokens=[3]), "alora_invocation_tokens"),
    "damaged": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"{}"), "are damaged"),
    "too many": (rename_weight, "does not fit the model"),
    "too few": (lose_weight, "does not fit the model"),
    "not a number": (break_weight, "NaNs detected"),
    "other rank": (lambda folder: change_config(folder, r=3), "size mismatch"),
    "other names": (lambda folder: change_config(folder, target_modules=["c_attn"]), "not found in the base model"),
    "wrong type": (lambda folder: change_config(folder, r="four"), "failed to load"),
    "code": (lambda folder: change_config(folder, trust_remote_code=True), "which may run code"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_adapter_that_cannot_be_merged_is_refused(llmcli, tiny, lora, name):
    change, reason = UNFIT[name]
    change(lora)
    ran = llmcli("generate", PROMPT, "-m", tiny, "--adapter", lora, "--allow-pickle")
    assert (ran.exit_status, ran.stdout) == (4, "")
    assert reason in ran.stderr
    assert 1 <= ran.stderr.count("\n") <= 2


def test_adapter_of_another_model_is_refused(llmcli, others, encoder, tmp_path, lora):
    wide = make_tiny(tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**config | {"num_hidden_layers": 3})).save_pretrained(wide)
    for command, model in (("generate", others / "gpt2"), ("generate", wide), ("embed", encoder), ("embed", wide)):
        ran = llmcli(command, PROMPT, "-m", model, "--adapter", lora)
        assert (ran.exit_status, ran.stdout) == (4, ""), ran.stderr
        assert str(lora) in ran.stderr


def test_adapter_of_an_encoder_changes_embeddings(llmcli, encoder, tmp_path):
    model = AutoModel.from_pretrained(encoder, dtype=torch.float32)
    adapted = make_adapter(
        tmp_path / "lora", model, LoraConfig(target_modules=["query"], task_type="FEATURE_EXTRACTION")
    )
    inputs = AutoTokenizer.from_pretrained(encoder)(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        states = adapted(input_ids=inputs["input_ids"]).last_hidden_state[0]
    command = ["embed", PROMPT, "-m", encoder, "--adapter", tmp_path / "lora", *GREEDY[:2]]
    expected = torch.nn.functional.normalize(states.mean(0), dim=0)
    assert llmcli(*command).records[0]["embedding"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_adapter_requires_the_whole_model_in_memory(llmcli, tiny, lora, tmp_path):
    options = ["--offload-folder", tmp_path / "disk", "--max-memory", "150KB", "--dtype", "float32"]
    assert llmcli("generate", PROMPT, "-m", tiny, *options).exit_status == 0
    ran = llmcli("generate", PROMPT, "-m", tiny, "--adapter", lora, *options)
    assert ran.exit_status == 2
    assert "an adapter requires weights that are whole, in memory and not quantized" in ran.stderr


def test_adapter_passed_as_model_draws_a_hint(llmcli, lora):
    ran = llmcli("generate", PROMPT, "-m", lora)
    assert ran.exit_status == 4
    assert "--adapter for adapters" in ran.stderr


def test_adapter_cannot_be_used_with_endpoint(llmcli, lora):
    ran = llmcli("generate", PROMPT, "--adapter", lora, "--endpoint", "http://127.0.0.1:9")
    assert ran.exit_status == 2
    assert "--adapter cannot be used with --endpoint" in ran.stderr


def test_adapter_ignored_setting_draws_a_warning(llmcli, tiny, lora):
    change_config(lora, use_tomorrow=True, tomorrow_size=None)
    ran = llmcli("generate", PROMPT, "-m", tiny, "--adapter", lora)
    assert ran.exit_status == 0
    assert ran.stderr == "warning: adapter has settings that this version of PEFT ignores: use_tomorrow\n"


def test_adapter_of_an_alias(llmcli, tiny, lora):
    expected = llmcli("generate", PROMPT, "-m", tiny, "--adapter", lora, *GREEDY).stdout
    register("mine", path=str(tiny), adapter=str(lora))
    ran = llmcli("generate", PROMPT, "-m", "mine", *GREEDY, "--json")
    assert PROMPT + ran.records[0]["generated_text"] + "\n" == expected
    assert ran.records[0]["model"] == "mine"
    assert f"adapter      local: {lora}" in llmcli("models", "show", "mine").stdout
    shutil.rmtree(lora)
    listed = {record["name"]: record["path"] for record in llmcli("models", "list", "--json").records}
    assert listed["mine"] is None
    ran = llmcli("generate", PROMPT, "-m", "mine")
    assert (ran.exit_status, ran.stderr.split("\n")[0]) == (4, f"error: {lora} not found")


def test_resume_refuses_another_adapter(llmcli, tiny, lora, tmp_path):
    command = ["generate", "--lines", "a", "b", "-m", tiny, *GREEDY, "--output", tmp_path / "out", "--resume"]
    assert llmcli(*command, "--adapter", lora).exit_status == 0
    assert "already complete" in llmcli(*command, "--adapter", lora).stderr
    shutil.copytree(lora, tmp_path / "other")
    for changed in ([], ["--adapter", tmp_path / "other"]):
        ran = llmcli(*command, *changed)
        assert ran.exit_status == 2
        assert "the command has changed" in ran.stderr


def test_adapters_are_different_models_of_a_cache(tiny, lora):
    lease = ModelLease(ModelCache())
    first = merged(tiny, lora, lease=lease)
    assert merged(tiny, lora, lease=lease).model is first.model
    plain = Model(Job("generate", str(tiny), load_options=LoadOptions("cpu", "float32")), lease).pipeline
    assert plain.model is not first.model
    (lora / "adapter_model.safetensors").touch()
    assert merged(tiny, lora, lease=lease).model is not first.model


def test_worker_gets_absolute_paths_of_adapters(tiny, lora, monkeypatch):
    from llmcli.engines.worker.client import _with_absolute_paths

    monkeypatch.chdir(lora.parent)
    assert _with_absolute_paths(Job("generate", str(tiny), adapter="lora")).adapter == str(lora)
    register("mine", path=str(tiny), adapter=str(lora))
    assert _with_absolute_paths(Job("generate", "mine")).adapter == str(lora)
    assert _with_absolute_paths(Job("generate", "mine", adapter="org/lora@v1")).adapter == "org/lora@v1"


@pytest.fixture(scope="module")
def tied(tiny, tmp_path_factory):
    """A Llama that can be quantized, with tied embeddings."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("models") / "tied")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, tie_word_embeddings=True, eos_token_id=1, **sizes))
    for parameter in model.parameters():
        parameter.data.mul_(3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("more", [{"target_modules": ["embed_tokens", "up_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_quantize_reads_merged_weights(llmcli, home, tied, tmp_path, more):
    config = LoraConfig(**{"r": 4, "target_modules": QV} | more)
    make_adapter(tmp_path / "lora", causal(tied), config, scale=0.5)
    command = ["inspect", "next", PROMPT, "-m", tied, "--json", "-n", 5]
    adapted = [*command, "--adapter", tmp_path / "lora"]
    plain, ours = (llmcli(*args, "--quantize", "int8") for args in (command, adapted))
    assert (plain.exit_status, ours.exit_status) == (0, 0), ours.stderr
    assert "quantizing" in ours.stderr
    again = llmcli(*adapted, "--quantize", "int8")
    assert (again.stdout, again.stderr) == (ours.stdout, "")
    assert len(list((home / "cache" / "quantized").iterdir())) == 2
    first, expected = (ran.records[0]["next"][0] for ran in (ours, llmcli(*adapted, "--dtype", "float32")))
    assert first["token"] == expected["token"]
    assert first["probability"] == pytest.approx(expected["probability"], abs=0.05)
    make_adapter(tmp_path / "lora", causal(tied), config, scale=0.25)
    assert "quantizing" in llmcli(*adapted, "--quantize", "int8").stderr
    assert len(list((home / "cache" / "quantized").iterdir())) == 2


@pytest.mark.slow
def test_adapter_merges_into_a_gguf_file(llmcli, chatty, tmp_path):
    make_adapter(tmp_path / "lora", causal(chatty), LoraConfig(r=4, target_modules=QV))
    file = make_gguf(chatty, tmp_path / "tiny.gguf")
    expected = llmcli("generate", PROMPT, "-m", chatty, "--adapter", tmp_path / "lora", *GREEDY).stdout
    assert llmcli("generate", PROMPT, "-m", file, "--adapter", tmp_path / "lora", *GREEDY).stdout == expected


def test_prompt_tuning_of_peft_is_refused_by_name(llmcli, tiny, tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(causal(tiny), config).save_pretrained(tmp_path / "prompt")
    ran = llmcli("generate", PROMPT, "--adapter", tmp_path / "prompt")
    assert "adapters of the type PROMPT_TUNING are not supported" in ran.stderr
