"""classify: probabilities of labels against a computation by hand, options, errors."""

import json
import math
from pathlib import Path

import pytest

PROMPT = "the quick {text} of {labels}\nfox:"
TEXTS = ["brown fox", "a lazy dog and then sleeps in the warm sun", "once", "the the the quick"]
LABELS = {
    "words": ["quick", "lazy", "sun"],
    "lengths": ["fox", "brown fox and dog", "zebra stripes", "q"],
    "chain": ["the", "the quick", "the quick brown", "fox"],
    "two_extensions": ["warm", "warm sun", "warm fox", "warm fox dog"],
    "one_begins_all": ["a", "a dog", "a fox", "a sun"],
    "special": ["</s>", "<s>", "<|user|>", "fox</s>", "fox"],
    "unicode": ["ja", "naïve café", "日本語", "🦊", "🦊🦊", "e\u0301te", "يوم"],
    "case": ["fox", "Fox", "FOX"],
    "newline": ["fox\ndog", "fox", "fox\n\nsun"],
    "punctuation": ["fox, dog", "fox; dog", '"fox"', "{fox}", "fox: dog", "-1"],
}


def probabilities(model, prompt: list[int], labels: list[list[int]]) -> list[float]:
    """The probability of each label after a prompt, alone and in float64, of one that no longer label begins with."""
    import torch

    def probability(label: list[int]) -> float:
        ids = torch.tensor([prompt + label])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0].double()
        steps = torch.log_softmax(logits, -1)
        return math.exp(sum(float(steps[len(prompt) + i - 1, token]) for i, token in enumerate(label)))

    whole = [probability(label) for label in labels]
    own = []
    for i, label in enumerate(labels):
        longer = {j for j, other in enumerate(labels) if j != i and other[: len(label)] == label}
        # Those that no other one between begins: their events contain those of all others.
        direct = {j for j in longer if not any(k != j and labels[j][: len(labels[k])] == labels[k] for k in longer)}
        own.append(whole[i] - sum(whole[j] for j in direct))
    return [value / sum(own) for value in own]


def by_hand(folder: Path, text: str, labels: list[str], prompt: str = PROMPT) -> dict[str, float]:
    """The same from texts, for a chat model or a base model, by tokenizers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    content = prompt.replace("{text}", text).replace("{labels}", ", ".join(labels))
    if tokenizer.chat_template:
        # Special tokens of the text stand in the template alone here.
        before, after = tokenizer.apply_chat_template(
            [{"role": "user", "content": "\0"}], tokenize=False, add_generation_prompt=True
        ).split("\0")
        ids = tokenizer(before, add_special_tokens=False)["input_ids"]
        ids += plain(tokenizer, content + "\n") if after.startswith("\n") else plain(tokenizer, content)
        ids += tokenizer(after.removeprefix("\n"), add_special_tokens=False)["input_ids"]
        return dict(zip(labels, probabilities(model, ids, [plain(tokenizer, label) for label in labels]), strict=True))
    first = tokenizer("")["input_ids"]
    rows = [first + plain(tokenizer, f"{content} {label}") for label in labels]
    ids = first + plain(tokenizer, content)
    assert all(row[: len(ids)] == ids for row in rows)
    return dict(zip(labels, probabilities(model, ids, [row[len(ids) :] for row in rows]), strict=True))


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def as_list(labels: list[str]) -> str:
    """--labels, with quotes around each."""
    return ",".join('"' + label.replace('"', '""') + '"' for label in labels)


def scores(record: dict) -> dict[str, float]:
    return {item["label"]: item["score"] for item in record["scores"]}


def logs(scores: dict[str, float]) -> dict[str, float]:
    return {label: math.log(score) for label, score in scores.items()}


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("model", ["chatty", "base"])
def test_labels_equal_computation_by_hand(llmcli, request, model, labels):
    folder = request.getfixturevalue(model)
    options = "-m", folder, "--dtype", "float32", "--prompt", PROMPT, "--labels", as_list(labels), "--jsonl"
    ran = llmcli("classify", *options, stdin=lines(TEXTS))
    assert ran.exit_status == 0, ran.stderr
    for record in ran.records:
        expected = by_hand(folder, record["text"], labels)
        assert logs(scores(record)) == pytest.approx(logs(expected), abs=1e-3)
        assert record["label"] == max(expected, key=expected.get)
        assert record["score"] == pytest.approx(max(expected.values()), abs=1e-3)


SHARED = (
    "once upon a time the lazy dog sleeps in the warm sun and then the quick brown fox: {labels}\nText: {text}\nLabel:"
)
SIZES = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LLAMA = SIZES | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
GPT2 = SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 4}
GEMMA = LLAMA | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES = {
    "gpt2": ("gpt2", GPT2 | {"n_positions": 256}),
    "opt": ("opt", SIZES | {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}),
    "window_beyond": ("gemma3_text", GEMMA | {"sliding_window": 512}),
    "window_within": ("gemma3_text", GEMMA | {"sliding_window": 8}),
    "window_between": ("gemma3_text", GEMMA | {"sliding_window": 65}),  # of the lengths of prompts and labels
    "mistral": ("mistral", LLAMA | {"sliding_window": 8}),
    "bloom": ("bloom", SIZES | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba": ("mamba", SIZES | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "recurrent": ("rwkv", SIZES | {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 256}),
}  # fmt: skip


def make_model(folder: Path, tokenizer: Path, kind: str, settings: dict) -> Path:
    """Save a causal model with random weights that are far apart, and a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind, settings", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_labels_on_other_architectures_equal_by_hand(llmcli, base, tmp_path, kind, settings):
    folder = make_model(tmp_path / "model", base, kind, settings)
    labels = ["fox", "fox and dog", "lazy fox and then", "lazy dog"]
    options = "-m", folder, "--dtype", "float32", "--prompt", SHARED, "--labels", as_list(labels), "--jsonl"
    together = llmcli("classify", *options, stdin=lines(TEXTS))
    assert together.exit_status == 0, together.stderr
    for record in together.records:
        assert logs(scores(record)) == pytest.approx(logs(by_hand(folder, record["text"], labels, SHARED)), abs=1e-3)
    alone = llmcli("classify", *options, "--batch-size", "1", stdin=lines(TEXTS))
    for one, other in zip(alone.records, together.records, strict=True):
        assert logs(scores(one)) == pytest.approx(logs(scores(other)), abs=1e-3)
