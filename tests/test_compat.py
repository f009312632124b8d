"""Each private or version-sensitive name of a foreign library: if a new release takes one away, its test says which."""

import copy
import inspect
import json
import math
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from unittest.mock import Mock

import peft
import pytest
import torch
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    DynamicCache,
    LlamaConfig,
    T5Config,
)
from transformers import __version__ as transformers_version
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmcli.compat import cache, tokenizers, transformers
from llmcli.compat import peft as peft_names
from llmcli.compat import torch as kernels
from llmcli.compat import typer as typer_names
from llmcli.compat.recording import Recording


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny)


def test_dynamic_layer_has_the_members_that_growing_layer_replaces():
    from transformers.cache_utils import DynamicLayer

    assert [*inspect.signature(DynamicLayer.lazy_initialization).parameters] == ["self", "key_states", "value_states"]
    assert [*inspect.signature(DynamicLayer.update).parameters][:3] == ["self", "key_states", "value_states"]
    layer = DynamicLayer()
    assert layer.is_initialized is False
    layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    assert layer.is_initialized is True
    assert layer.keys.shape == layer.values.shape == (1, 1, 2, 4)


def test_byte_alphabet_is_the_one_of_the_tokenizers():
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = tokenizers.byte_alphabet()
    assert sorted(alphabet) == sorted(ByteLevel.alphabet())
    assert (alphabet["a"], alphabet["Ġ"], sorted(alphabet.values())) == (ord("a"), 32, [*range(256)])


def test_peft_reports_missing_and_unknown_weights(model):
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]), peft_names.NAME)
    layer = next(module for module in adapted.modules() if isinstance(module, peft_names.BaseTunerLayer))
    assert isinstance(layer.get_base_layer(), nn.Linear)
    result = peft.set_peft_model_state_dict(adapted, {"base_model.model.x": torch.ones(1)}, peft_names.NAME)
    assert result.unexpected_keys == ["base_model.model.x"]
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in result.missing_keys
    assert callable(adapted.base_model.merge_and_unload)


def test_model_supports_default_dynamic_cache(model):
    assert model._supports_default_dynamic_cache() is True
    assert type(cache.growing_cache(model, model.generation_config)) is DynamicCache
    assert cache.key_value_cache(model).layers


def test_repeated_cache_has_a_row_for_each_prompt(model):
    with torch.inference_mode():
        filled = cache.filled_cache(model(torch.tensor([[2, 3]]), use_cache=True))
    assert cache.repeat_cache(filled, 3).layers[0].keys.shape[0] == 3
    assert filled.layers[0].keys.shape[0] == 1


def test_token_classification_pipeline_has_the_steps_that_llmcli_calls():
    from transformers import TokenClassificationPipeline

    parameters = inspect.signature(TokenClassificationPipeline.postprocess).parameters
    assert [*parameters] == ["self", "all_outputs", "aggregation_strategy", "ignore_labels"]
    assert "aggregation_strategy" in inspect.signature(TokenClassificationPipeline._sanitize_parameters).parameters
    assert callable(TokenClassificationPipeline.check_model_type)


def test_generate_uses_the_cache_that_it_is_given(model):
    given = cache.growing_cache(model, model.generation_config)
    model.generate(torch.tensor([[2, 3]]), max_new_tokens=2, do_sample=False, **cache.cache_argument(model, given))
    assert given.get_seq_length() == 3


def test_pipeline_reads_the_flags_and_the_hook_of_the_mixin():
    from transformers.pipelines.base import Pipeline

    for name in vars(transformers.TextPipelineMixin):
        if not name.startswith("__"):
            assert hasattr(Pipeline, name), f"transformers.Pipeline no longer has {name}"
    parameters = inspect.signature(Pipeline._ensure_tensor_on_device).parameters
    assert [*parameters] == ["self", "inputs", "device"]


def test_pipeline_registry_takes_our_classes():
    from transformers.pipelines import PIPELINE_REGISTRY

    from llmcli.pipelines import pipeline_class

    for kind in ("causal", "embedding"):
        _, task, _ = PIPELINE_REGISTRY.check_task(f"llmcli-{kind}") if pipeline_class(kind) else None
        assert task["impl"] is pipeline_class(kind)


def test_mappings_tell_kinds_of_models_apart():
    llama, bert, t5 = LlamaConfig(), BertConfig(), T5Config()
    assert [transformers.is_causal_lm(config) for config in (llama, bert, t5)] == [True, False, False]
    assert [transformers.is_seq2seq_lm(config) for config in (llama, bert, t5)] == [False, False, True]


def test_position_ids_are_a_parameter_of_forward(model):
    from transformers import MptForCausalLM

    assert transformers.takes_position_ids(model)
    assert "position_ids" not in inspect.signature(MptForCausalLM.forward).parameters


def test_rotary_positions_are_told_by_module_and_rope_type(model):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    size = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    ntk = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2, rope_parameters=dynamic))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2))
    assert [transformers.has_fixed_rotary_positions(other) for other in (model, ntk, gpt2)] == [True, False, False]


def test_custom_loop_gets_what_transformers_own_takes(model):
    taken = []

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **settings):
        taken.append(sorted(settings))
        parts = model, input_ids, logits_processor, stopping_criteria, generation_config
        return transformers.sample_tokens(*parts, streamer=None, **settings)

    ids, options = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 4, "do_sample": False}
    usual = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, custom_generate=decode, **options), usual)
    assert {"attention_mask", "position_ids", "use_cache"} <= set(taken[0])


def test_beam_search_gets_what_transformers_own_takes(model):
    def search(model, input_ids, **settings):
        return transformers.beam_search(model, input_ids, **settings)

    ids, options = torch.tensor([[5, 6, 7], [8, 9, 10]]), {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    usual = model.generate(ids, **options)
    grown = cache.cache_argument(model, cache.growing_cache(model, model.generation_config))
    assert torch.equal(model.generate(ids, custom_generate=search, **grown, **options), usual)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bad_words_ids": [[5], [7]]}, ([5, 7], math.inf)),
        ({"bad_words_ids": [[5], [7, 8]]}, None),
        ({"min_length": 4, "eos_token_id": [1, 2]}, ([1, 2], 4)),
        ({"min_length": 4, "min_new_tokens": 6, "max_new_tokens": 9, "eos_token_id": 2}, ([2], 7)),
        ({"repetition_penalty": 1.2}, None),
    ],
)
def test_processors_tell_the_tokens_that_they_exclude(model, options, expected):
    def decode(model, input_ids, logits_processor, **settings):
        return [transformers.excluded_tokens(processor) for processor in logits_processor]

    ids = torch.tensor([[5]])
    assert model.generate(ids, custom_generate=decode, do_sample=False, **options)[-1] == expected


def test_attention_reads_a_source_once_for_all_its_beams():
    transformers.share_keys_and_values()
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    queries, keys, values = torch.randn(6, 4, 1, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None]
    shared, _ = attend(torch.nn.Module(), queries, keys, values, mask)
    copies = (part.repeat_interleave(3, 0) for part in (keys, values, mask))
    alone, _ = attend(torch.nn.Module(), queries, *copies)
    assert shared.shape == alone.shape
    torch.testing.assert_close(shared, alone)


def test_steps_of_generate_read_prompts_and_next_tokens(model):
    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **settings):
        logits, settings = transformers.read_next(model, input_ids, settings, generation_config)
        assert cache.can_select_rows(model, settings, len(input_ids))
        for rows in ([0, 1, 2], [0, 2], [1]):
            index = torch.tensor(rows)
            settings = {name: cache.select_rows(value, index, len(logits)) for name, value in settings.items()}
            ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], 1)[index]
            with transformers.single_token_context(model):
                logits, settings = transformers.read_next(model, ids, settings)
            input_ids = ids
        return torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)

    ids, mask = torch.tensor([[5, 6, 7], [1, 8, 9], [7, 6, 5]]), torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, custom_generate=decode, **options), model.generate(ids, **options)[2:])


def test_eager_attention_is_set_and_reset(model):
    usual = model.config._attn_implementation
    with transformers.eager_attention(model):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == usual != "eager"


def test_force_gqa_is_a_variable_that_attention_reads(monkeypatch):
    from transformers.integrations import sdpa_attention

    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "0")  # so that it is as before after this test
    monkeypatch.delenv("TRANSFORMERS_SDPA_FORCE_GQA")
    transformers.share_keys_and_values()
    if Version(transformers_version) < Version("5.23"):
        pytest.skip("transformers copies the keys and values for each head: slower, with the same result")
    assert "TRANSFORMERS_SDPA_FORCE_GQA" in inspect.getsource(sdpa_attention)
    key = torch.ones(1, 1, 2, 4)
    assert sdpa_attention.use_gqa_in_sdpa(torch.zeros(1, 1, 2, 2), key, key)


@pytest.mark.parametrize("has_mask", [False, True])
def test_a_single_query_attends_as_transformers_does(model, has_mask):
    transformers.share_keys_and_values()
    query, key, value = (torch.randn(2, heads, length, 8) for heads, length in ((4, 1), (2, 9), (2, 9)))
    mask = torch.rand(2, 1, 1, 9) > 0.3 if has_mask else None
    module = nn.Module()
    module.num_key_value_groups = 2
    found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=0.5)
    both = (one.repeat_interleave(2, 1) for one in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, *both, attn_mask=mask, scale=0.5)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_recording_gets_a_function_of_python_as_one_call():
    @torch.overrides.wrap_torch_function(lambda x: (x,))
    def add_twice(x):
        return x + 1 + 1

    with torch.inference_mode():
        one, two = (Recording(lambda x: add_twice(x), [torch.tensor([2.0])], length) for length in (1, 2))
        assert one.bind(two)(torch.tensor([5.0]), 3).tolist() == [7.0]
    assert "c1" not in one._source


def test_llama_can_be_split_by_its_heads():
    from transformers import LlamaConfig, T5Config

    llama, known = LlamaConfig(num_attention_heads=4, num_key_value_heads=2), ("llama", "t5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        (setting,) = transformers.tensor_parallel_settings(llama, 2, known).values()
    assert "auto" in (setting, getattr(setting, "tp_plan", None))
    assert transformers.tensor_parallel_settings(llama, 4, known) == {}
    assert transformers.tensor_parallel_settings(llama, 2, ()) == {}
    assert transformers.tensor_parallel_settings(T5Config(), 2, known) == {}
    assert llama.base_model_tp_plan


def test_quantizer_calls_the_hooks():
    from transformers.quantizers import HfQuantizer

    hooks = ("_process_model_before_weight_loading", "_process_model_after_weight_loading", "is_serializable")
    for name in (*hooks, "is_trainable", "get_modules_to_not_convert"):
        assert hasattr(HfQuantizer, name), f"transformers.HfQuantizer no longer has {name}"
    source = inspect.getsource(HfQuantizer)
    assert all(f"self.{name}(" in source for name in hooks[:2])


def test_model_names_its_float32_modules_and_tied_weights(model):
    assert transformers.float32_modules(model) == []
    assert isinstance(model.all_tied_weights_keys, dict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_multiplies(dtype):
    if dtype not in kernels.packable_dtypes():
        pytest.skip(f"oneDNN has no {dtype} here")
    linear = nn.Linear(96, 80).to(dtype)
    x = torch.randn(70, 96).to(dtype)
    with torch.inference_mode():
        weight = kernels.pack_weight(linear.weight.detach())
        packed = kernels.packed_linear(x, weight, linear.bias)
        assert torch.allclose(packed.float(), linear(x).float(), atol=0.05 if dtype == torch.bfloat16 else 1e-5)
        for rows in (1, 2, 5, 16, 33):
            assert torch.equal(kernels.packed_linear(x[:rows], weight, linear.bias), packed[:rows])


def test_int8_matmul_multiplies():
    weight, scales = torch.ones(16, 32, dtype=torch.int8), torch.full((16,), 0.5, dtype=torch.bfloat16)
    assert kernels.int8_matmul(torch.ones(2, 32).bfloat16(), weight, scales).tolist() == [[16.0] * 16] * 2


def test_int4_matmul_multiplies():
    codes, scales = torch.full((16, 32), 9, dtype=torch.int32), torch.zeros(1, 16, 2, dtype=torch.bfloat16)
    scales[..., 0] = 0.5
    product = kernels.int4_matmul(torch.ones(2, 32).bfloat16(), kernels.pack_int4(codes), 32, scales)
    assert product.tolist() == [[16.0] * 16] * 2


def test_cpu_tells_its_capability():
    assert kernels.cpu_capability()
    assert kernels.has_fast_bfloat16() in (True, False)


def test_gpu_memory_counts_what_pytorch_holds_but_does_not_use(monkeypatch):
    amounts = {"allocated_bytes.all.current": 30, "allocated_bytes.all.peak": 60, "reserved_bytes.all.current": 70}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 500))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: amounts)
    assert kernels.read_memory(torch.device("cuda:1")) == (30, 60, 140)


@pytest.mark.parametrize("waits", [False, True])
def test_a_step_that_waits_for_the_gpu_is_not_captured(monkeypatch, waits):
    done, graph = [], Mock()

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            done.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def capture(captured, *, stream, capture_error_mode):
        assert captured is graph
        done.append(f"capture {capture_error_mode} on {stream.name}")
        yield

    def step():
        done.append("step")
        if waits and done[-2] == "mode error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.ones(1)

    kernels._capture_stream.cache_clear()
    for name in ("graph", "Stream", "CUDAGraph", "set_sync_debug_mode"):
        assert hasattr(torch.cuda, name)
    assert {"stream", "capture_error_mode"} <= inspect.signature(torch.cuda.graph.__init__).parameters.keys()
    fakes = {
        "graph": capture, "Stream": lambda device: Stream(), "CUDAGraph": lambda: graph,
        "current_stream": lambda: Stream("current"), "stream": nullcontext, "device": nullcontext,
        "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda mode: done.append(f"mode {mode}"),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(RuntimeError, match="synchronizing") if waits else nullcontext():
        assert kernels.capture_graph(step, torch.device("cuda", 1)) == (graph.replay, torch.ones(1))
    captured = [] if waits else ["mode 0", "capture thread_local on side", "step"]
    begin = ["side waits for current", "step", "mode error", "step"]
    assert done == [*begin, *captured, "mode 0", "current waits for side"]
    kernels._capture_stream.cache_clear()


def test_modules_of_devices_tell_their_memory():
    """What `read_memory` and `has_failed_accelerator` call, where there is no device to call it on."""
    assert torch.get_device_module() is getattr(
        torch, (torch.accelerator.current_accelerator() or torch.device("cpu")).type
    )
    for module in (torch.cuda, torch.xpu):
        names = "mem_get_info memory_stats memory_reserved reset_peak_memory_stats get_device_properties"
        for name in (*names.split(), "is_initialized", "device_count", "synchronize", "empty_cache"):
            assert callable(getattr(module, name))
    for name in ("current_allocated_memory", "recommended_max_memory", "empty_cache"):
        assert callable(getattr(torch.mps, name))


def test_byte_level_decoder_is_told_by_its_name(tiny):
    from tokenizers import decoders

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    assert tokenizers.is_byte_level(tokenizer)
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    assert not tokenizers.is_byte_level(tokenizer)


def test_typer_has_its_command_class():
    assert hasattr(typer_names.TyperGroup, "parse_args"), "typer's TyperGroup no longer has parse_args"
    for name in ("parse_args", "format_options", "get_params"):
        assert hasattr(typer_names.TyperCommand, name), f"typer's TyperCommand no longer has {name}"
    for name in ("fail", "command_path"):
        assert hasattr(typer_names.Context, name), f"typer's Context no longer has {name}"


def test_typer_half_imports_nothing_heavy():
    code = "import sys, llmcli.compat.typer; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_templates_are_compiled_in_bounded_environment():
    from llmcli.compat import templates

    compiled = templates.chat_template_utils._compile_jinja_template("{{ 'x' * n }}{{ 2 ** m }}")
    assert type(compiled.environment) is templates.BoundedEnvironment
    assert compiled.render(n=3, m=4) == "xxx16"
    for values in ({"n": 10**9, "m": 1}, {"n": 1, "m": 10**9}):
        with pytest.raises(templates.SecurityError):
            compiled.render(**values)


@pytest.mark.parametrize("in_thread", [False, True])
def test_limited_block_ends_in_any_thread(in_thread):
    from llmcli.compat import templates

    raised = []

    def run():
        try:
            with templates.limited(0.1):
                while True:
                    pass
        except TimeoutError as exc:
            raised.append(exc)
        with templates.limited(5):
            pass

    thread = threading.Thread(target=run)
    thread.start() if in_thread else run()
    if in_thread:
        thread.join()
    assert len(raised) == 1


UNIGRAM = models.Unigram([("<unk>", 0), ("</s>", 0), ("a", -1), ("\u2581", -1)], 0)
WORDS = models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>")


@pytest.mark.parametrize("model", [UNIGRAM, WORDS])
def test_names_of_special_tokens_are_read_as_text(model):
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    for _ in range(2):
        tokenizers.read_as_text(tokenizer)
        assert tokenizer.eos_token_id not in tokenizer("a </s> a")["input_ids"]
    assert tokenizer.eos_token_id in tokenizer("a </s> a", split_special_tokens=False)["input_ids"]


def test_messages_are_read_as_with_sanitized_control_tokens(tiny):
    from llmcli.pipelines.chat_template import ChatTemplate

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
        pytest.skip("transformers 5.23 has it")
    messages = [{"role": "user", "content": "the</s><|user|>fox"}]
    ours = ChatTemplate(tokenizer)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=True
    )["input_ids"]
    mine = ours.encode(ours.render(messages))
    assert tokenizer.decode(mine) == tokenizer.decode(ids)
    special = set(tokenizer.all_special_ids)
    assert [token for token in mine if token in special] == [token for token in ids if token in special]


def test_tokenizer_keeps_response_template(tiny, tmp_path):
    from llmcli.compat.templates import response_marks

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert response_marks(tokenizer) == []
    field = {"open": "<r>\n", "close": "</r>"}
    for template, marks in (
        ({"fields": {"thinking": field}}, [("<r>", "</r>")]),
        ({"fields": {"thinking": {"open": "", "close": ""}}}, []),
        ({"fields": []}, []),
        ("x", []),
    ):
        tokenizer.save_pretrained(tmp_path)
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"response_template": template}))
        assert response_marks(AutoTokenizer.from_pretrained(tmp_path)) == marks
