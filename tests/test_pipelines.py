"""The pipelines, as transformers.Pipelines of their own right; and text that streams."""

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from llmcli import pipelines
from llmcli.errors import RecordError
from llmcli.job import LoadOptions
from llmcli.pipelines import pipeline_class
from llmcli.pipelines.answers import DeltaStreamer, TokenDecoder, make_result
from llmcli.text.splitting import first_stop, stop_prefix

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def causal(tiny):
    pipeline_class("causal")  # makes it known to transformers
    model = AutoModelForCausalLM.from_pretrained(tiny)
    return pipeline("llmcli-causal", model=model, tokenizer=AutoTokenizer.from_pretrained(tiny, padding_side="left"))


def test_it_runs_under_transformers_own_pipeline(causal):
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=1, pad_token_id=1)
    texts = ["the quick", "a lazy dog and then"]
    together = causal(texts, batch_size=2, generation_config=config)
    assert together == [causal(text, generation_config=config) for text in texts]
    assert together[0]["usage"] == {"prompt_tokens": 2, "completion_tokens": 5}
    assert list(causal(iter_of(texts), generation_config=config)) == together


def iter_of(texts):
    yield from texts


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
def test_row_limits_in_a_batch_give_the_text_of_each_alone(causal, settings):
    config = GenerationConfig(do_sample=False, eos_token_id=1, pad_token_id=1, max_new_tokens=9, **settings)
    prompts, limits = ["the quick", "a lazy dog and then", "once"], [3, 9, 1]
    rows = [causal.preprocess(prompt) for prompt in prompts]

    def run(rows, limits):
        batch = {name: [row[name] for row in rows] for name in rows[0]}
        output = causal.forward(batch, generation_config=config, max_new_tokens=limits)
        return [
            {name: value[i : i + 1] if name == "sequences" else value[i] for name, value in output.items()}
            for i in range(len(rows))
        ]

    together = [causal.postprocess(output, config) for output in run(rows, limits)]
    assert together == [
        causal.postprocess(run([row], [limit])[0], config) for row, limit in zip(rows, limits, strict=True)
    ]
    sequences = settings.get("num_return_sequences", 1)
    assert [fields["usage"]["completion_tokens"] for fields in together] == [limit * sequences for limit in limits]
    assert {fields["finish_reason"] for fields in together} == {"length"}


def test_a_sentencepiece_tokenizer_keeps_the_space_after_the_prompt(causal, monkeypatch):
    """Llama 2's decoder strips the first space of whatever it decodes."""
    from tokenizers import decoders

    backend = causal.tokenizer.backend_tokenizer
    monkeypatch.setattr(backend, "decoder", decoders.Sequence([backend.decoder, decoders.Strip(" ", 1, 0)]))
    prompt = causal.preprocess("the quick")
    ids = causal.tokenizer(" fox")["input_ids"]
    assert causal.tokenizer.decode(ids) == "fox"
    assert causal.decoder(prompt)(ids) == " fox"


def stream(pieces: list[str], stops: list[str]) -> list[str]:
    """What is passed on while the pieces come, one token each."""
    sent: list[str] = []
    decoder = TokenDecoder(types.SimpleNamespace(decode=lambda ids, **_: "".join(pieces[i] for i in ids)))
    deltas = DeltaStreamer(decoder, stops, sent.append)
    deltas.put(torch.tensor([[0, 1]]))  # the prompt
    for token in range(len(pieces)):
        deltas.put(torch.tensor([token]))
    deltas.end()
    return sent


def test_text_streams_token_by_token():
    assert stream(["Hel", "lo", " you"], []) == ["Hel", "lo", " you"]


def test_half_a_character_waits():
    assert stream(["a", "\N{REPLACEMENT CHARACTER}"], []) == ["a"]


def test_what_may_become_a_stop_text_waits():
    assert stream(["a", "\n", "b"], ["\n\n"]) == ["a", "\nb"]
    assert stream(["a", "\n", "\n", "b"], ["\n\n"]) == ["a"]
    assert stream(["one E", "N", "D two"], ["END"]) == ["one "]


@pytest.mark.parametrize("name", ["tiny", "t5", "marian"])
def test_streamed_text_equals_the_decoded_text(tiny, name):
    tokenizer = AutoTokenizer.from_pretrained(tiny if name == "tiny" else GOLDEN / name)
    before, ids = tokenizer("the quick")["input_ids"], tokenizer("brown fox, w\u00f6rld a\n\nlazy dog")["input_ids"]
    for decoder in (TokenDecoder(tokenizer, before), TokenDecoder(tokenizer)):
        step = decoder.stream()
        assert "".join(step(token) or "" for token in ids) == decoder(ids) != ""


@pytest.mark.parametrize("length", [1, 7, 100])
def test_finish_finds_the_token_of_a_stop_text_by_bisection(length):
    decoded = []

    class Decoder(TokenDecoder):
        def __call__(self, ids):
            decoded.append(ids)
            return "".join("ab END"[min(i, 5)] if i > 1 else "ab"[i] for i in ids)

    decode = Decoder(types.SimpleNamespace(decode=str))
    ids = [0, 1] * length + [2, 3, 4, 5] + [0, 1] * length
    output = {"sequences": np.array([[ids]]), "input_ids": [0], "cut": 0}
    result = make_result(output, decode, GenerationConfig(stop_strings=["END"], eos_token_id=9))
    assert result["generated_text"] == "ab" * length + " "
    assert result["usage"]["completion_tokens"] == 2 * length + 4
    assert len(decoded) < 12


def test_prefix_is_not_shared_by_models_that_take_distances_from_the_sequence(tiny, tmp_path):
    from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM, MptConfig, MptForCausalLM

    size = {"vocab_size": 400, "hidden_size": 16, "num_attention_heads": 2}
    falcon = FalconConfig(**size, num_hidden_layers=1, alibi=True)
    models = [
        MptForCausalLM(MptConfig(vocab_size=400, d_model=16, n_heads=2, n_layers=1)),
        BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=16, n_head=2, n_layer=1)),
        FalconForCausalLM(falcon),
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    pipeline_class("causal")  # registers the task
    for model in models:
        causal = pipeline("llmcli-causal", model=model, tokenizer=tokenizer)
        assert causal.max_shared_tokens == 0
        assert causal.prefill([2, 3, 4]) is None


def test_prefix_is_shared_by_models_with_position_ids(causal):
    assert causal.max_shared_tokens is None
    assert causal.prefill([2, 3, 4]).get_seq_length() == 3


@pytest.mark.parametrize("kind", ["embedding", "attention", "causal_attention", "next_token"])
def test_nan_is_a_failure_of_the_record(tiny, encoder, kind):
    folder = encoder if kind in ("embedding", "attention") else tiny
    broken = pipelines.load(kind, folder, LoadOptions(device="cpu", dtype="float32"))
    with torch.no_grad():
        for parameter in broken.model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(RecordError, match="NaN or infinite") as info:
        broken("the quick")
    assert info.value.kind == "not_finite"
    batch = {name: [value] * 2 for name, value in broken.preprocess("the quick").items()}
    broken.forward(batch)  # does not end the other records


def test_stops():
    assert first_stop("abcabc", ["c", "b"]) == 1
    assert first_stop("abc", []) is None
    assert stop_prefix("abc</", ["</s>", "x"]) == 2
    assert stop_prefix("abc", ["</s>"]) == 0


def test_a_cache_that_grows_in_place_holds_what_transformers_own_holds():
    from transformers.cache_utils import DynamicLayer

    from llmcli.compat.cache import GrowingLayer

    torch.manual_seed(0)
    layers = [DynamicLayer(), GrowingLayer()]
    copies = 0
    for step in [3, *[1] * 200, "crop", 2, "repeat", *[1] * 70, "reorder", 1, 1, "crop", 1]:
        if isinstance(step, int):
            rows = layers[0].keys.shape[0] if layers[0].is_initialized else 2
            keys, values = torch.rand(2, rows, 3, step, 4)
            before = layers[1].keys.data_ptr() if layers[1].is_initialized else 0
            for layer in layers:
                given = layer.update(keys, values)
                assert given[0] is layer.keys
            copies += layers[1].keys.data_ptr() != before
        for layer in layers:
            if step == "crop":
                layer.crop(-2)
            elif step == "repeat":
                layer.batch_repeat_interleave(2)
            elif step == "reorder":
                layer.reorder_cache(torch.tensor([1, 0, 3, 2]))
        assert torch.equal(layers[0].keys, layers[1].keys)
        assert torch.equal(layers[0].values, layers[1].values)
        assert layers[0].get_seq_length() == layers[1].get_seq_length()
    assert copies < 10


def test_only_models_that_keep_all_keys_and_values_get_it(tiny):
    from transformers import GenerationConfig, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

    from llmcli.compat.cache import growing_cache

    settings = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1}
    windowed = MistralConfig(
        **settings, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, sliding_window=8
    )
    llama, config = AutoModelForCausalLM.from_pretrained(tiny), GenerationConfig()
    assert growing_cache(llama, config)
    assert growing_cache(MistralForCausalLM(windowed), config) is None
    assert growing_cache(MambaForCausalLM(MambaConfig(**settings)), config) is None
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert growing_cache(llama, GenerationConfig(**other)) is None
