"""llmcli score: against float64 arithmetic on the model's own float32 logits."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "and",
    "then",
    "a",
    "lazy",
    "dog",
    "sleeps",
    "in",
    "the",
    "warm",
    "sun",
    "once",
    "upon",
]


@pytest.fixture
def score(llmcli, tiny):
    return lambda *args, **settings: llmcli("score", "-m", tiny, "--dtype", "float32", *args, **settings)


def logprobs(folder, ids, *, window=None, stride=None, first=1):
    """Of each token from `first` on, in float64, as transformers' page on perplexity has it: windows that begin every
    `stride` tokens, in each of which those tokens count that no window before it held."""
    import torch
    from transformers import AutoModelForCausalLM

    model, found, end_before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), {}, 0
    for begin in range(0, len(ids), stride or len(ids)):
        end = min(begin + (window or len(ids)), len(ids))
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:end]])).logits[0].double()
        chances = logits - logits.exp().sum(-1, keepdim=True).log()
        for at in range(max(end_before, first), end):
            found[at] = chances[at - begin - 1, ids[at]].item()
        end_before = end
        if end == len(ids):
            break
    return [found[at] for at in sorted(found)]


def encode(folder, text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def bytes_after_first(folder, text):
    """Of the tokens that count: without those of the first, which stands for its own letters."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = tokenizer(text)["input_ids"][0]
    return len(text.encode()) - (0 if first in tokenizer.all_special_ids else len(tokenizer.decode([first]).encode()))


def check(record, expected, tokens, size):
    """The fields of a result, by the log-probabilities of the tokens that count, and their bytes."""
    assert record["logprob"] == pytest.approx(math.fsum(expected), rel=1e-3)
    assert record["perplexity"] == pytest.approx(math.exp(-math.fsum(expected) / len(expected)), rel=1e-3)
    assert record["bits_per_byte"] == pytest.approx(-math.fsum(expected) / math.log(2) / size, rel=1e-3)
    assert record["tokens"] == tokens


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_it_equals_float64_whatever_the_batch_size(score, tiny, batch_size):
    texts = [" ".join(WORDS[i : i + 2 + 3 * (i % 4)]) for i in range(7)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    for text, record in zip(texts, score("--jsonl", "--batch-size", batch_size, stdin=lines).records, strict=True):
        ids = encode(tiny, text)
        check(record, logprobs(tiny, ids), len(ids), bytes_after_first(tiny, text))


@pytest.mark.parametrize("stride", [1, 7, 32, 63, None])
@pytest.mark.parametrize("batch_size", [1, "auto"])
def test_a_long_text_goes_through_a_sliding_window(score, tiny, stride, batch_size):
    text = " ".join(WORDS * 12)
    ids = encode(tiny, text)
    assert len(ids) > 2 * 64
    (record,) = score(text, "--json", "--batch-size", batch_size, *(["--stride", stride] if stride else [])).records
    check(record, logprobs(tiny, ids, window=64, stride=stride or 32), len(ids), bytes_after_first(tiny, text))


def test_parts_of_a_batch_that_is_too_large_at_once(score, tiny, monkeypatch):
    from llmcli.pipelines import scoring

    monkeypatch.setattr(scoring, "LOGITS", 5000)  # a dozen tokens of this vocabulary
    texts = [" ".join(WORDS[:n]) for n in (3, 9, 15)]
    for text, record in zip(texts, score(*texts, "--json").records, strict=True):
        ids = encode(tiny, text)
        check(record, logprobs(tiny, ids), len(ids), bytes_after_first(tiny, text))


@pytest.mark.parametrize("logits", [2**27, 5000], ids=["whole", "parts"])
@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "mamba"])
def test_other_causal_models(llmcli, tiny, tmp_path, monkeypatch, kind, logits):
    import torch
    from transformers import (
        AutoTokenizer,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GPT2Config,
        GPT2LMHeadModel,
        MambaConfig,
        MambaForCausalLM,
    )

    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    torch.manual_seed(0)
    size = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **size)),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                num_key_value_heads=2, max_position_embeddings=64, sliding_window=8, final_logit_softcapping=5.0,
                **size,
            )
        ),
        "mamba": lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, **size)),
    }[kind]()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    from llmcli.pipelines import scoring

    monkeypatch.setattr(scoring, "LOGITS", logits)
    texts = [" ".join(WORDS), "the quick"]
    ran = llmcli("score", *texts, "--json", "-m", tmp_path, "--dtype", "float32", "--stride", 40)
    for text, record in zip(texts, ran.records, strict=True):
        ids = encode(tmp_path, text)
        check(record, logprobs(tmp_path, ids), len(ids), bytes_after_first(tmp_path, text))


def test_special_tokens_are_the_tokenizers_own(llmcli, tiny, tmp_path):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny, tmp_path / "bos")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save_pretrained(folder)
    (record,) = llmcli("score", "dog", "--json", "-m", folder, "--dtype", "float32").records
    ids = encode(folder, "dog")
    assert ids[0] == 0
    check(record, logprobs(folder, ids), len(ids), 3)


def test_a_condition_stands_before_and_does_not_count(score, tiny):
    pairs = [
        ("the quick brown", " fox"),
        ("once upon", " a dog sleeps"),
        ("", "the fox"),
        (" ".join(WORDS * 12), " dog"),
    ]
    lines = "".join(json.dumps({"q": q, "a": a, "id": i}) + "\n" for i, (q, a) in enumerate(pairs)).encode()
    ran = score("--jsonl", "--field", "a", "--condition", "q", stdin=lines)
    for (q, a), record in zip(pairs, ran.records, strict=True):
        ids, known = encode(tiny, q + a), len(encode(tiny, q))
        expected = logprobs(tiny, ids, window=64, stride=32, first=max(known, 1))
        check(record, expected, len(ids) - known, len(a) if q else bytes_after_first(tiny, a))
        assert (record["q"], record["a"]) == (q, a)


def test_tokens_of_the_text_alone_with_their_probabilities(score, tiny):
    ran = score("--jsonl", "--tokens", "--condition", "q", stdin=b'{"q": "the quick", "text": " brown fox"}\n')
    (record,) = ran.records
    assert [each["token"] for each in record["token_logprobs"]] == [" brown", " fox"]
    expected = logprobs(tiny, encode(tiny, "the quick brown fox"), first=2)
    assert [each["logprob"] for each in record["token_logprobs"]] == pytest.approx(expected, rel=1e-3)
    (record,) = score("the fox é", "--json", "--tokens").records
    first, *others = record["token_logprobs"]
    assert score("", "--json", "--tokens").records[0]["token_logprobs"] == []
    assert first["logprob"] is None
    assert math.fsum(each["logprob"] for each in others) == pytest.approx(record["logprob"])
    assert "".join(each["token"] for each in record["token_logprobs"]) == "the fox \\xc3\\xa9"


def test_one_token_and_none(score):
    ran = score("--jsonl", stdin=b'{"text": "the"}\n{"text": ""}\n')
    for record, tokens in zip(ran.records, (1, 0), strict=True):
        assert (record["logprob"], record["perplexity"], record["bits_per_byte"]) == (0, None, None)
        assert record["tokens"] == tokens


def test_text_mode_is_a_number_and_a_name(score, tmp_path):
    (tmp_path / "fox.txt").write_text("the quick\nbrown fox\n")
    perplexity = score("the fox", "--json").records[0]["perplexity"]
    assert score("the fox").stdout == f"{perplexity:.0f}\tthe fox\n"
    assert score("the").stdout == "-\tthe\n"
    value, name = score("-f", tmp_path / "fox.txt").stdout.rstrip("\n").split("\t")
    assert (float(value) > 1, name) == (True, str(tmp_path / "fox.txt"))
    lines = score("--lines", "-f", tmp_path / "fox.txt").stdout.splitlines()
    assert [line.partition("\t")[2] for line in lines] == ["the quick", "brown fox"]


@pytest.fixture
def scored(score):
    """Lines, and their perplexities."""
    texts = ["the quick", "brown fox", "then a", "lazy dog", "in the sun", "once upon"]
    return {text: score(text, "--json").records[0]["perplexity"] for text in texts}


def test_a_filter_keeps_order_and_fields(score, scored):
    middle, above = sorted(scored.values())[2:4]
    bound = (middle + above) / 2
    low, high = ([text for text, value in scored.items() if (value <= middle) is wanted] for wanted in (True, False))
    lines = "".join(f"{text}\n" for text in scored).encode()
    assert score("--lines", "--max-perplexity", bound, stdin=lines).stdout.splitlines() == low
    assert score("--lines", "--min-perplexity", bound, stdin=lines).stdout.splitlines() == high
    records = [{"id": i, "text": text, "more": [i, {"x": None}]} for i, text in enumerate(scored)]
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    kept = score("--jsonl", "--max-perplexity", bound, stdin=data).records
    assert [{name: record[name] for name in ("id", "text", "more")} for record in kept] == [
        record for record in records if record["text"] in low
    ]
    assert all(record["perplexity"] <= bound for record in kept)
    both = score("--lines", "--min-perplexity", middle * 0.99, "--max-perplexity", bound, stdin=lines)
    assert both.stdout.splitlines() == [text for text, value in scored.items() if value == middle]
    rows = score("--csv", "--max-perplexity", bound, stdin=b"text,n\n" + b"".join(
        f"{text},{i}\n".encode() for i, text in enumerate(scored))).stdout.splitlines()  # fmt: skip
    assert rows[0].startswith("text,n,logprob,perplexity")
    assert [row.split(",")[0] for row in rows[1:]] == low


def test_a_filter_that_passes_nothing_is_1_as_grep(score):
    ran = score("--lines", "--max-perplexity", 1, stdin=b"the quick\nbrown fox\n\nthe\n")
    assert (ran.stdout, ran.exit_status) == ("", 1)
    assert ran.stderr == "note: records with fewer than two tokens pass no filter: 2\n"
    assert score("--lines", "--max-perplexity", 1, stdin=b"the quick\n").stderr == ""


def test_what_fails_is_never_filtered_from_records(score):
    ran = score("--jsonl", "--max-perplexity", 1, stdin=b'{"text": "the quick"}\n{"id": 2}\n{"error": {"x": 1}}\n')
    assert [set(record) for record in ran.records] == [{"id", "error"}, {"error"}]
    assert ran.exit_status == 3


def test_a_filtered_run_resumes(score, scored, tmp_path):
    middle = sum(sorted(scored.values())[2:4]) / 2
    source, out, whole = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in scored))
    args = ("--jsonl", "--max-perplexity", middle, "-f", source, "--resume", "--output")
    assert score(*args, whole).exit_status == 0
    log = whole.with_name("whole.jsonl.state").read_bytes().splitlines(keepends=True)
    for cut in range(1, len(log)):
        out.write_bytes(whole.read_bytes())
        out.with_name("out.jsonl.state").write_bytes(b"".join(log[:cut]))
        assert score(*args, out).exit_status == 0
        for ours, theirs in zip(*(path.read_text().splitlines() for path in (out, whole)), strict=True):
            ours, theirs = json.loads(ours), json.loads(theirs)
            assert ours["text"] == theirs["text"]
            assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-4)
    changed = score("--jsonl", "--max-perplexity", middle + 1, "-f", source, "--resume", "--output", out)
    assert (changed.exit_status, "the command has changed" in changed.stderr) == (2, True)
    nothing = ("--jsonl", "--max-perplexity", 1, "-f", source, "--resume", "--output", tmp_path / "none.jsonl")
    assert [score(*nothing).exit_status for _ in range(2)] == [1, 1]


def test_a_heat_map_shows_whole_characters():
    from llmcli.draw import figures

    tokens = [("a", None), (" \\xf0\\x9f", -7.0), ("\\xa6", -1.0), ("\\x8a", -0.1), ("é\n", -0.01), ("\\xe4", -9.0)]
    text = figures.heat_map([{"token": token, "logprob": logprob} for token, logprob in tokens])
    assert text.plain == "a 🦊é\n\N{REPLACEMENT CHARACTER}"
    assert figures.heat_map([{"token": "a\x1b[31m\n", "logprob": None}]).plain == "a\\x1b[31m\n"
    broken = figures.heat_map([{"token": "\\xe9", "logprob": None}, {"token": " b", "logprob": -9.0}])
    assert (broken.plain, len(broken.spans)) == ("\N{REPLACEMENT CHARACTER} b", 1)
    assert "".join(text.plain[span.start : span.end] for span in text.spans) == " 🦊"
    assert {span.style.bgcolor.triplet for span in text.spans} == {(204, 76, 2)}
    table = figures.probability_table([{"token": "x" * 80, "logprob": -0.1}], 40)
    shown = figures.render(table, figures.Console(width=40)).splitlines()
    assert all(figures.cell_len(line) <= 40 for line in shown)


def test_a_heat_map_on_a_terminal(score, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    shown = score("the fox", "--tokens", is_terminal=True).stdout
    assert "\x1b[" in shown
    assert shown.endswith(" fox\x1b[0m\n")
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            plain = score("the fox", "--tokens", is_terminal=True).stdout
        assert "\x1b[" not in plain.replace("\x1b[1m", "").replace("\x1b[0m", "")
        assert "·fox" in plain
    value, *rows = score("the fox", "--tokens").stdout.splitlines()
    assert [row.split("\t")[1] for row in rows] == ['"the"', '" fox"']


def test_a_file_gets_no_colours(score, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    score("the fox", "--tokens", "--output", tmp_path / "out.txt", is_terminal=True)
    assert (tmp_path / "out.txt").read_text().splitlines()[1:][1].endswith('\t" fox"')
    assert "\x1b" not in (tmp_path / "out.txt").read_text()


def test_a_filtered_table_keeps_its_header_when_failures_are_tried_again(score, tmp_path, monkeypatch):
    from llmcli.pipelines import scoring

    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("text,id\nthe quick,1\nbrown fox,2\nthen a,3\n")
    args = ("--csv", "-f", source, "--output", out, "--resume", "--batch-size", 1)
    perplexities = {name: float(score(name).stdout.split("\t")[0]) for name in ("the quick", "brown fox", "then a")}
    bound = perplexities["the quick"] * 1.01
    right = scoring.ScoringPipeline.postprocess

    def broken(self, windows, **settings):
        if len(windows[0]["ids"]) and self.tokenizer.decode(windows[0]["ids"].tolist()) == "brown fox":
            raise MemoryError
        return right(self, windows, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(scoring.ScoringPipeline, "postprocess", broken)
        assert score(*args, "--min-perplexity", bound).exit_status == 3
    whole = score("--csv", "-f", source, "--min-perplexity", bound)
    assert score(*args, "--min-perplexity", bound, "--retry-errors").exit_status == 0
    assert [row.split(",")[:2] for row in out.read_text().splitlines()] == [
        row.split(",")[:2] for row in whole.stdout.splitlines()
    ]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--lines", "--condition", "q"], "--condition requires records with fields"),
        (["--lines", "--tokens"], "--tokens requires whole texts"),
        (["--stride", "0"], "--stride"),
        (["--max-perplexity", "0.5"], "--max-perplexity"),
        (["--stride", "64"], "windows of this model have 64 tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(score, args, says):
    ran = score(*args, stdin=b"the quick\n")
    assert (ran.exit_status, ran.stdout) == (2, "")
    assert says in ran.stderr


def test_a_model_that_is_no_causal_one(llmcli, encoder):
    ran = llmcli("score", "the fox", "-m", encoder)
    assert ran.exit_status == 4
    assert "bert models do not continue text" in ran.stderr
    assert "it can embed, inspect attention, search" in ran.stderr


@pytest.mark.slow
def test_warm_it_is_the_same_and_shares_the_models_weights(process, place, tiny):
    common = ("-m", tiny, "--dtype", "float32")
    environment = {**os.environ, "LLMCLI_KEEP_ALIVE": "10m"}
    cold = process("score", "the quick brown", "--json", "--keep-alive", "0", *common)
    assert process("generate", "the", "--temperature", "0", *common, env=environment).returncode == 0
    warm = process("score", "the quick brown", "--json", *common, env=environment)
    assert (warm.stdout, warm.returncode) == (cold.stdout, 0)
    assert len(json.loads(process("ps", "--json").stdout)["models"]) == 1


@pytest.mark.real
@pytest.mark.slow
def test_ten_thousand_tokens_of_the_real_model(llmcli, smollm2, tmp_path):
    from transformers import AutoTokenizer

    model = shutil.copytree(smollm2, tmp_path / "model")
    config = json.loads((smollm2 / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    pages = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("src/llmcli/*.py"))]
    ids = encode(model, "\n".join(page.read_text(encoding="utf-8") for page in pages))[:10_000]
    text = AutoTokenizer.from_pretrained(model).decode(ids).strip()  # a text's last line end is not its own
    ids = encode(model, text)
    assert abs(len(ids) - 10_000) < 20
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    ran = llmcli("score", "--json", "-m", model, "--dtype", "float32", "--stride", 768, "-f", tmp_path / "long.txt")
    check(ran.records[0], logprobs(model, ids, window=1024, stride=768), len(ids), bytes_after_first(model, text))
