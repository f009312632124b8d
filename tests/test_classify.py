"""classify: probabilities of labels against a computation by hand, options, errors."""

import functools
import json
import math
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
from conftest import WORDS
from heads import EMOTIONS, GOLDEN, NLI, save_head

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


@functools.lru_cache(maxsize=2)
def load_exact(folder: Path):
    """Return a tokenizer and a model in float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def by_hand(folder: Path, text: str, labels: list[str], prompt: str = PROMPT) -> dict[str, float]:
    """The same from texts, for a chat model or a base model, by tokenizers alone."""
    tokenizer, model = load_exact(folder)
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


def cases(names, quick: tuple[str, ...]) -> list:
    """Return the names, as slow tests if they are not quick ones."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", cases(LABELS, ("lengths", "two_extensions", "special", "unicode")))
@pytest.mark.parametrize("model", ["chatty", "base"])
def test_labels_equal_computation_by_hand(llmcli, request, model, name):
    folder, labels = request.getfixturevalue(model), LABELS[name]
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
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2}
LLAMA = SIZES | WIDTHS | {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 4}
GEMMA = LLAMA | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES = {
    "gpt2": ("gpt2", GPT2 | {"n_positions": 256}),
    "opt": ("opt", SIZES | WIDTHS | {"ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32}),
    "window_beyond": ("gemma3_text", GEMMA | {"sliding_window": 512}),
    "window_within": ("gemma3_text", GEMMA | {"sliding_window": 8}),
    "window_between": ("gemma3_text", GEMMA | {"sliding_window": 65}),  # of the lengths of prompts and labels
    "mistral": ("mistral", LLAMA | {"sliding_window": 8}),
    "bloom": ("bloom", SIZES | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba": ("mamba", SIZES | WIDTHS | {"state_size": 8}),
    "recurrent": ("rwkv", SIZES | WIDTHS | {"context_length": 256}),
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


@pytest.mark.parametrize("name", cases(ARCHITECTURES, ("gpt2", "window_between", "mamba")))
def test_labels_on_other_architectures_equal_by_hand(llmcli, base, tmp_path, name):
    folder = make_model(tmp_path / "model", base, *ARCHITECTURES[name])
    labels = ["fox", "fox and dog", "lazy fox and then", "lazy dog"]
    options = "-m", folder, "--dtype", "float32", "--prompt", SHARED, "--labels", as_list(labels), "--jsonl"
    together = llmcli("classify", *options, stdin=lines(TEXTS))
    assert together.exit_status == 0, together.stderr
    for record in together.records:
        assert logs(scores(record)) == pytest.approx(logs(by_hand(folder, record["text"], labels, SHARED)), abs=1e-3)
    alone = llmcli("classify", *options, "--batch-size", "1", stdin=lines(TEXTS))
    for one, other in zip(alone.records, together.records, strict=True):
        assert logs(scores(one)) == pytest.approx(logs(scores(other)), abs=1e-3)


def make_sentencepiece(folder: Path) -> Path:
    """Save a Llama whose tokenizer writes spaces as ▁, puts one before each text, and falls back to bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([*["".join(f" {word}" for word in WORDS)] * 20, "fox:\n"], trainer)
    parts = json.loads(tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    for i in range(256):
        vocabulary[f"<0x{i:02X}>"] = len(vocabulary)
    parts["decoder"] = json.loads(decoders.ByteFallback().__getstate__())
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder / "tokenizer")
    return make_model(folder / "model", folder / "tokenizer", "llama", LLAMA)


@pytest.mark.parametrize("name", cases(LABELS, ("special", "unicode")))
def test_sentencepiece_labels_equal_by_hand(llmcli, tmp_path, name):
    folder, labels = make_sentencepiece(tmp_path), LABELS[name]
    options = "-m", folder, "--dtype", "float32", "--prompt", PROMPT, "--labels", as_list(labels), "--jsonl"
    ran = llmcli("classify", *options, stdin=lines(TEXTS))
    assert ran.exit_status == 0, ran.stderr
    for record in ran.records:
        assert logs(scores(record)) == pytest.approx(logs(by_hand(folder, record["text"], labels)), abs=1e-3)


@pytest.fixture
def classify(llmcli, base):
    """`classify("--labels", "a,b", TEXT)` runs the tiny base model."""
    return lambda *args, model=base, **settings: llmcli(
        "classify", "-m", model, "--dtype", "float32", "--device", "cpu", *args, **settings
    )


def test_text_mode_prints_one_label_per_record(classify, tmp_path):
    (tmp_path / "in.txt").write_text("brown fox\n\nlazy dog\n")
    ran = classify("--labels", "fox, dog", "--lines", "-f", tmp_path / "in.txt")
    labels = ran.stdout.split("\n")
    assert ran.exit_status == 0
    assert len(labels) == 4
    assert labels[1] == labels[3] == ""
    assert labels[0] in ("fox", "dog")
    assert labels[2] in ("fox", "dog")
    assert classify("--labels", "fox,dog", "brown fox").stdout == labels[0] + "\n"
    assert classify("--labels", "fox,dog", stdin=b"brown fox").stdout == labels[0] + "\n"


def test_records_keep_their_fields(classify):
    record = {"id": 7, "review": "the quick fox", "labels": "of mine"}
    (result,) = classify(
        "--labels", "fox,dog", "--jsonl", "--field", "review", stdin=json.dumps(record).encode()
    ).records  # fmt: skip
    assert {name: result[name] for name in record} == record
    assert sum(scores(result).values()) == pytest.approx(1, abs=1e-5)
    assert list(scores(result)) == sorted(scores(result), key=scores(result).get, reverse=True)
    ran = classify("--labels", "fox,dog", "--csv", "--field", "review", stdin=b"id,review\n7,the quick fox\n8,\n")
    rows = ran.stdout.splitlines()
    assert rows[0] == "id,review,label,score,scores,truncated,model,error"
    assert rows[1].startswith(f"7,the quick fox,{result['label']},{result['score']},")
    assert rows[2].startswith("8,,,,[],,")


def test_blank_text_has_no_label(classify):
    (record,) = classify("--labels", "fox,dog", "--json", "  ").records
    assert (record["label"], record["score"], record["scores"]) == (None, None, [])


def test_prompt_is_filled_with_fields_and_labels(classify, base):
    prompt = "the {title} and {text}: {labels} fox:"
    options = "--labels", "sun,warm dog", "--prompt", prompt
    (record,) = classify(*options, "--jsonl", stdin=b'{"title": "sun", "text": "a lazy dog"}').records
    expected = by_hand(base, "a lazy dog", ["sun", "warm dog"], prompt.replace("{title}", "sun"))
    assert scores(record) == pytest.approx(expected, abs=1e-3)
    assert "missing field 'title': available fields: text\n" in classify(*options, "x").stderr
    reviews = "--prompt", "{labels}? {review}:", "--labels", "sun,fox", "--jsonl"
    empty, missing = classify(*reviews, "--field", "review", stdin=b'{"review": " "}\n{"body": ""}').records
    assert empty["label"] is None  # whatever the labels are
    assert missing["error"]["message"] == "missing field 'review': available fields: body"


@pytest.mark.parametrize("end", [": ", ":\n", ":\n\n", " ", "("])
def test_label_joins_a_prompt_as_text_goes_on(classify, base, end):
    """The end of the prompt, its spaces included, and a label are divided into tokens together."""
    tokenizer, model = load_exact(base)
    labels = ["quick", "warm sun", "zebra"]
    space = "" if end[-1].isspace() else " "
    rows = [plain(tokenizer, f"the fox{end}{space}{label}") for label in labels]
    shared = next(i for i in range(len(rows[0])) if len({tuple(row[: i + 1]) for row in rows}) > 1)
    expected = probabilities(model, rows[0][:shared], [row[shared:] for row in rows])
    (record,) = classify("--labels", ",".join(labels), "--prompt", "the {text}" + end, "--json", "fox").records
    assert scores(record) == pytest.approx(dict(zip(labels, expected, strict=True)), abs=1e-3)


@pytest.mark.parametrize("model", ["chatty", "base"])
def test_calibrated_scores_are_divided_by_those_of_an_empty_text(classify, request, model):
    folder, labels = request.getfixturevalue(model), ["sun", "quick fox", "dog"]
    options = "--labels", ",".join(labels), "--prompt", SHARED, "--calibrate", "--jsonl"
    empty = by_hand(folder, "", labels, SHARED)
    for record in classify(*options, model=folder, stdin=lines(TEXTS)).records:
        raw = by_hand(folder, record["text"], labels, SHARED)
        ratios = {label: raw[label] / empty[label] for label in labels}
        expected = {label: ratio / sum(ratios.values()) for label, ratio in ratios.items()}
        assert scores(record) == pytest.approx(expected, abs=1e-3)


def test_labels_alone_follow_the_token_that_ends_texts(llmcli, base, tmp_path):
    """No token of an empty prompt remains, and the tokenizer begins texts with none."""
    import torch
    from tokenizers import processors
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, labels = make_model(tmp_path / "model", base, "llama", LLAMA), ["fox", "lazy dog"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rows = [plain(tokenizer, f" {label}") for label in labels]
    empty = probabilities(model, [tokenizer.eos_token_id], rows)
    raw = probabilities(model, plain(tokenizer, "the sun"), rows)
    ratios = [one / other for one, other in zip(raw, empty, strict=True)]
    expected = {label: ratio / sum(ratios) for label, ratio in zip(labels, ratios, strict=True)}
    options = "-m", folder, "--dtype", "float32", "--labels", ",".join(labels), "--prompt", "{text}", "--calibrate"
    for size in (1, 8):
        (record,) = llmcli("classify", *options, "--json", "--batch-size", size, "the sun").records
        assert scores(record) == pytest.approx(expected, abs=1e-3)


def test_file_of_labels_has_descriptions(classify, base, tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufefffox: a quick, brown animal\r\n\r\nsun \r\ndog:\r\nhttp://x\r\n".encode())
    (record,) = classify("--labels", f"@{path}", "--prompt", "{text}\n{labels}:", "--json", "once").records
    labels = ["fox", "sun", "dog", "http://x"]
    listed = "- fox: a quick, brown animal\n- sun\n- dog\n- http://x"
    assert scores(record) == pytest.approx(by_hand(base, "once", labels, f"{{text}}\n{listed}:"), abs=1e-3)


def test_label_with_a_comma_is_quoted(classify):
    (record,) = classify("--labels", '"fox, dog","say ""hi"""', "--json", "once").records
    assert set(scores(record)) == {"fox, dog", 'say "hi"'}


def test_label_below_the_minimum_score_is_empty(classify):
    (record,) = classify("--labels", "fox,dog", "--json", "once").records
    score = record["score"]
    (kept,) = classify("--labels", "fox,dog", "--json", "--min-score", score - 0.001, "once").records
    (left,) = classify("--labels", "fox,dog", "--json", "--min-score", min(1, score + 0.001), "once").records
    assert kept == record
    assert left == record | {"label": None}
    assert classify("--labels", "fox,dog", "--min-score", "1", "once", "upon").stdout == "\n\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "has no labels of its own"),
        (("--labels", ""), "expected 2 to 1000 labels, got 0"),
        (("--labels", "fox"), "got 1\nhint: separate labels with commas"),
        (("--labels", ",".join(map(str, range(10_000)))), "2 to 1000 labels, got 10000\nhint: each record"),
        (("--labels", "fox, dog,fox "), "duplicate label 'fox'"),
        (("--labels", "fox,fox"), "duplicate label 'fox'"),
        (("--labels", "fox,,dog"), "label is empty"),
        (("--labels", 'fox,"dog'), "expected a row of CSV, got 'fox,\"dog'"),
        (("--labels", "fox\ndog"), "expected a row of CSV, got 'fox\\ndog'"),
        (("--labels", "@nowhere.txt"), "nowhere.txt: no such file"),
        (("--labels", "@"), "--labels: @: no such file"),
        (("--labels", "@bytes.txt"), "bytes.txt is not UTF-8"),
        (("--labels", "@empty.txt"), "expected 2 to 1000 labels, got 0"),
        (("--labels", "@duplicate.txt"), "duplicate label 'fox'"),
        (("--labels", "@nameless.txt"), "label is empty"),
        (("--labels", "fox,dog", "--min-score", "1.5"), "--min-score"),
        (("--labels", "fox,dog", "--min-score", "-0.1"), "--min-score"),
        (("--labels", "fox,dog", "--multi-label"), "--multi-label cannot be used"),
        (("--labels", "fox,dog", "--long", "mean"), "--long cannot be used"),
        (("--labels", "fox,dog", "--hypothesis", "It is {}."), "--hypothesis cannot be used"),
        (("--labels", "fox,dog", "--hypothesis", "It is."), "--hypothesis requires one {}"),
        (("--labels", "fox,dog", "--hypothesis", "It is {x}."), "--hypothesis requires one {}"),
        (("--labels", "fox,dog", "--hypothesis", "{} is {}."), "--hypothesis requires one {}"),
        (("--labels", "fox,dog", "--hypothesis", "It is {."), "--hypothesis requires one {}"),
        (("--hypothesis", "It is {}."), "--hypothesis requires --labels"),
        (("--calibrate",), "--calibrate requires --labels"),
    ],
)
def test_invalid_options_are_usage_errors(classify, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("bytes.txt").write_bytes(b"fox\n\xff\n")
    Path("empty.txt").write_text("\n  \n")
    Path("duplicate.txt").write_text("fox: a\ndog\nfox : b\n")
    Path("nameless.txt").write_text("fox\n: what\n")
    ran = classify(*options, "once")
    assert (ran.exit_status, ran.stdout) == (2, "")
    assert message in ran.stderr


def test_labels_of_the_same_tokens_are_a_usage_error(classify, base, tmp_path):
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    make_model(tmp_path / "model", base, "llama", LLAMA)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(tmp_path / "model")
    ran = classify("--labels", "fox,Fox", "once", model=tmp_path / "model")
    assert ran.exit_status == 2
    assert "label 'Fox' has the tokens of 'fox'" in ran.stderr


def test_truncated_prompt_keeps_instruction_and_end(llmcli, tiny):
    """A context of 64 tokens: what is too long loses the end of its text."""
    words = [*WORDS] * 10
    prompt, labels = "{labels} once: {text} upon", ["fox", "warm sun"]
    options = "-m", tiny, "--dtype", "float32", "--labels", ",".join(labels), "--prompt", prompt, "--json"
    ran = llmcli("classify", *options, " ".join(words))
    assert ran.exit_status == 1
    assert "exceeds the context length of 64" in ran.stderr
    (record,) = llmcli("classify", *options, "--truncate", " ".join(words)).records
    short = " ".join(words[: -record["truncated"]])
    assert scores(record) == pytest.approx(by_hand(tiny, short, labels, prompt), abs=1e-3)


SWITCH = "enable_thinking is defined and not enable_thinking"
TEMPLATES = {  # what each writes before an answer, and in a prompt: the answer begins after both
    "space": ("[I] {{ m.content }} [/I]", " {{ m.content }}</s>", "", "[I] once [/I]", " "),
    "switch": ("[I] {{ m.content }} [/I]", " {{ m.content }}</s>", "{% if " + SWITCH + " %}<think></think>{% endif %}",
               "[I] once [/I]<think></think>", " "),
    "empty thought": ("U: {{ m.content }}</s>", "A: <think></think>\n{{ m.content }}</s>", "A: ",
                      "U: once</s>A: <think></think>\n", ""),
    "open thought": ("U: {{ m.content }}</s>", "A: {{ m.content }}</s>", "A: <think>\n",
                     "U: once</s>A: <think>\n\n</think>\n\n", ""),
    "channels": ("<|start|>user<|message|>{{ m.content }}<|end|>",
                 "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>", "<|start|>assistant",
                 "<|start|>user<|message|>once<|end|><|start|>assistant<|channel|>final<|message|>", ""),
}  # fmt: skip


@pytest.mark.parametrize(("user", "answer", "begin", "prompt", "space"), TEMPLATES.values(), ids=TEMPLATES)
def test_label_is_where_the_template_puts_an_answer(base, tmp_path, user, answer, begin, prompt, space):
    from transformers import AutoTokenizer

    from llmcli import pipelines
    from llmcli.job import LoadOptions

    folder = make_model(tmp_path / "model", base, "llama", LLAMA | {"vocab_size": 500})
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}" + user + "{% else %}" + answer + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + begin + "{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    pipeline = pipelines.load("label", folder, LoadOptions(device="cpu"))
    messages = [{"role": "user", "content": "once"}]
    row = pipeline.preprocess({"prompt": messages, "labels": ["fox", "dog"]})
    assert tokenizer.decode(row["input_ids"].tolist()) == prompt
    assert row["labels"] == [tuple(plain(tokenizer, space + label)) for label in ("fox", "dog")]


def test_single_token_labels_take_one_pass(base, monkeypatch):
    from llmcli import pipelines
    from llmcli.engines.batch_runner import BatchRunner
    from llmcli.engines.batching import TokenBatchPolicy
    from llmcli.engines.memory import MemoryEstimator, MemoryUsage
    from llmcli.engines.requests import Request
    from llmcli.job import LoadOptions

    pipeline = pipelines.load("label", base, LoadOptions(device="cpu"))
    shapes, forward = [], pipeline.model.forward

    def spy(*args, **settings):
        shapes.append(tuple((*args, settings.get("input_ids"))[0].shape))
        return forward(*args, **settings)

    monkeypatch.setattr(pipeline.model, "forward", spy)
    policy = TokenBatchPolicy(None, "cpu", MemoryEstimator(lambda: MemoryUsage(0, 0, 2**40)))
    runner = BatchRunner(pipeline, policy, {}, truncate=False)
    prompts = [SHARED.replace("{text}", text) for text in ("brown fox", "lazy dog", "warm sun")]
    requests = [Request({"prompt": prompt, "labels": ["fox", "dog", "sun"]}) for prompt in prompts]
    runner.add(requests)
    while runner.queue:
        runner.step()
    assert not any(request.failure for request in requests)
    prefix, batch = shapes
    assert prefix[0] == 1
    assert prefix[1] > 16
    assert batch[0] == 3
    assert batch[1] < 16


def test_head_has_labels_of_its_own(llmcli, tmp_path):
    head = save_head(tmp_path / "head", "bert", "SequenceClassification", EMOTIONS)
    (record,) = llmcli("classify", "-m", head, "--json", "The clock is late.").records
    assert set(scores(record)) == set(EMOTIONS.values())
    assert sum(scores(record).values()) == pytest.approx(1, abs=1e-5)
    ran = llmcli("classify", "-m", head, "--multi-label", "--min-score", "0", "The clock is late.", "")
    assert ran.stdout == ",".join(scores(record)) + "\n\n"
    (first, second) = llmcli("classify", "-m", head, "--multi-label", "--json", "The clock is late.", "").records
    assert first["labels"] == [label for label, score in scores(record).items() if score >= 0.5]
    assert second["labels"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--labels", "a,b"), "hint: its labels: anger, joy, fear, love"),
        (("--labels", "a,b", "--calibrate"), "--calibrate cannot be used"),
    ],
)
def test_head_rejects_options_of_language_models(llmcli, tmp_path, options, message):
    head = save_head(tmp_path / "head", "bert", "SequenceClassification", EMOTIONS)
    ran = llmcli("classify", "-m", head, *options, "The clock is late.")
    assert ran.exit_status == 2
    assert message in ran.stderr


@pytest.mark.parametrize("option", [("--multi-label",), ("--min-score", "0.5")])
def test_regression_has_no_probabilities(llmcli, tmp_path, option):
    settings = {"problem_type": "regression"}
    head = save_head(tmp_path / "head", "bert", "SequenceClassification", {0: "stars"}, **settings)
    ran = llmcli("classify", "-m", head, *option, "The clock is late.")
    assert ran.exit_status == 2
    assert f"{option[0]} cannot be used" in ran.stderr


def test_inference_lists_labels_with_commas_quoted(llmcli, tmp_path):
    head = save_head(tmp_path / "head", "bert", "SequenceClassification", NLI)
    options = "--labels", '"red, green",blue', "--hypothesis", "It is {}.", "--multi-label", "--min-score", "0"
    ran = llmcli("classify", "-m", head, *options, "The clock is late.")
    assert ran.exit_status == 0
    assert sorted(ran.stdout.strip()) == sorted('"red, green",blue')


def test_seq2seq_model_without_a_head_cannot_classify(llmcli):
    ran = llmcli("classify", "-m", GOLDEN / "marian", "--labels", "a,b", "The clock is late.")
    assert ran.exit_status == 4
    assert "cannot classify" in ran.stderr
    assert "translate" in ran.stderr


def test_resumed_run_requires_the_same_labels(classify, tmp_path):
    out = tmp_path / "out.jsonl"
    options = "--jsonl", "--output", out, "--resume"
    assert classify("--labels", "fox,dog", *options, stdin=lines(TEXTS)).exit_status == 0
    written = out.read_text()
    assert len(written.splitlines()) == len(TEXTS)
    assert classify("--labels", "fox,dog", *options, stdin=lines(TEXTS)).exit_status == 0
    ran = classify("--labels", "fox,sun", *options, stdin=lines(TEXTS))
    assert ran.exit_status == 2
    assert out.read_text() == written


def test_many_labels_of_several_tokens_are_read(classify, base):
    labels = [f"{first} {second}" for first in WORDS for second in WORDS]
    (record,) = classify("--labels", ",".join(labels), "--prompt", "the {text}:", "--json", "fox").records
    assert scores(record) == pytest.approx(by_hand(base, "fox", labels, "the {text}:"), abs=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("real_cache")
@pytest.mark.parametrize("prompt", [None, "Is this text about sports or food?\n\n{text}"])
def test_real_labels_equal_computation_by_hand(llmcli, smollm2, prompt):
    """Labels after the base prompt of SmolLM2, and after its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    labels = ["sports", "sports and politics", "food", "<|im_end|>", "Food", "l'économie 🎉"]
    texts = ["The goalkeeper saved two penalties.", "Simmer the onions in butter until they are golden."]
    options = ("--prompt", prompt) if prompt else ()
    template = tomllib.loads((files("llmcli.tasks") / "prompts.toml").read_text())["classify"]["base"]["prompt"]
    ran = llmcli("classify", "--dtype", "float32", "--labels", as_list(labels), *options, "--json", *texts)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float64)
    for text, record in zip(texts, ran.records, strict=True):
        if prompt:  # a chat
            messages = [{"role": "user", "content": prompt.format(text=text)}]
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            rows = [plain(tokenizer, label) for label in labels]
        else:
            ids = plain(tokenizer, template.format(labels=", ".join(labels), text=text))
            rows = [plain(tokenizer, f" {label}") for label in labels]
        expected = dict(zip(labels, probabilities(model, ids, rows), strict=True))
        assert scores(record) == pytest.approx(expected, abs=1e-3)
