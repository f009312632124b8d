"""The pipelines, as transformers.Pipelines of their own right; and text that streams."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from llmcli.pipelines.answers import Deltas
from llmcli.stops import first_stop, stop_prefix


@pytest.fixture(scope="module")
def causal(tiny):
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
    import torch

    sent: list[str] = []
    deltas = Deltas(lambda ids: "".join(pieces[i] for i in ids), stops, sent.append)
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


def test_stops():
    assert first_stop("abcabc", ["c", "b"]) == 1
    assert first_stop("abc", []) is None
    assert stop_prefix("abc</", ["</s>", "x"]) == 2
    assert stop_prefix("abc", ["</s>"]) == 0
