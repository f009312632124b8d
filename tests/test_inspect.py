"""llmcli inspect: what it shows is what the model computes."""

import re
import shutil

import pytest

TEXT = "the quick brown fox sleeps"


@pytest.fixture
def inspect(llmcli, tiny):
    return lambda what, *args, **settings: llmcli(
        "inspect", what, *args, "-m", tiny, *(["--dtype", "float32"] if what != "tokens" else []), **settings
    )


@pytest.fixture
def coloured(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "80")


def plain(shown):
    return re.sub(r"\x1b\[[\d;]*m", "", shown)


def encoded(folder, text):
    import torch
    from transformers import AutoTokenizer

    return torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])


def saved(model, folder, tiny):
    """With the tiny Llama's tokenizer, and weights that make a difference."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


# attention


def softmax_of_qk(queries, keys, *, is_causal):
    """softmax(QKᵀ/√d) of (H, T, d) queries and keys, in float64."""
    import torch

    scores = queries.double() @ keys.double().transpose(1, 2) / queries.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


def llama_attention(folder, text):
    """(L, H, T, T), from the projections that the model itself makes, turned by its own rotary embedding."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, kept = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), {}
    for i, layer in enumerate(model.model.layers):
        for name in ("q_proj", "k_proj"):
            projection = getattr(layer.self_attn, name)
            projection.register_forward_hook(lambda _, __, made, at=(i, name): kept.update({at: made}))
    ids = encoded(folder, text)
    with torch.no_grad():
        model(ids)
        turn = model.model.rotary_emb(torch.zeros(1), torch.arange(ids.shape[1])[None])
    found, config = [], model.config
    for i in range(config.num_hidden_layers):
        shape = (1, ids.shape[1], -1, config.head_dim)
        queries, keys = (kept[i, name].view(shape).transpose(1, 2) for name in ("q_proj", "k_proj"))
        queries, keys = apply_rotary_pos_emb(queries, keys, *turn)
        keys = keys.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 1)
        found.append(softmax_of_qk(queries[0], keys[0], is_causal=True))
    return torch.stack(found)


def flat(record):
    return [weight for row in record["attention"] for weight in row]


def check_rows(weights, *, is_causal):
    for i, row in enumerate(weights):
        assert sum(row) == pytest.approx(1, abs=1e-5)
        assert not is_causal or not any(row[i + 1 :])


def test_attention_is_softmax_of_q_and_k(inspect, tiny):
    expected = llama_attention(tiny, TEXT)
    for layer, head in ((0, 0), (1, 3), (0, None), (None, 2), (None, None)):
        args = [*(["--layer", layer] if layer is not None else []), *(["--head", head] if head is not None else [])]
        (record,) = inspect("attention", TEXT, "--json", *args).records
        wanted = expected.mean(0) if layer is None else expected[layer]
        wanted = wanted.mean(0) if head is None else wanted[head]
        assert flat(record) == pytest.approx(wanted.flatten().tolist(), abs=1e-5)
        check_rows(record["attention"], is_causal=True)
        assert (record["layers"], record["heads"]) == (2, 4)
    assert "".join(record["tokens"]) == TEXT


def test_a_long_text_is_told_by_its_end(inspect, tmp_path):
    (tmp_path / "long.txt").write_text("the quick brown fox " * 40)
    ran = inspect("next", "-f", tmp_path / "long.txt", "--json")
    assert (ran.exit_status, "tokens at the beginning" in ran.stderr) == (0, True)
    assert inspect("next", "x", "-f", tmp_path / "long.txt").exit_status == 2
    assert "is treated as text; to read the file, use -f" in inspect("tokens", tmp_path / "long.txt").stderr


def test_attention_of_gpt2(llmcli, tiny, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    size = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **size))
    folder, kept = saved(model, tmp_path, tiny), []
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.transformer.h[1].attn.c_attn.register_forward_hook(lambda _, __, made: kept.append(made))
    ids = encoded(folder, TEXT)
    with torch.no_grad():
        model(ids)
    queries, keys, _ = (part.view(ids.shape[1], 4, 8).transpose(0, 1) for part in kept[0][0].split(32, -1))
    expected = softmax_of_qk(queries, keys, is_causal=True)[2]
    (record,) = llmcli(
        "inspect", "attention", TEXT, "--json", "-m", folder, "--layer", 1, "--head", 2, "--dtype", "float32"
    ).records
    assert flat(record) == pytest.approx(expected.flatten().tolist(), abs=1e-5)
    check_rows(record["attention"], is_causal=True)


def test_attention_of_an_encoder_looks_both_ways(llmcli, encoder):
    import torch
    from transformers import AutoModel

    model, kept = AutoModel.from_pretrained(encoder), {}
    attention = model.encoder.layer[1].attention.self
    for name in ("query", "key"):
        getattr(attention, name).register_forward_hook(lambda _, __, made, at=name: kept.update({at: made[0]}))
    ids = encoded(encoder, TEXT)
    with torch.no_grad():
        model(ids)
    queries, keys = (kept[name].view(ids.shape[1], 4, 8).transpose(0, 1) for name in ("query", "key"))
    expected = softmax_of_qk(queries, keys, is_causal=False).mean(0)
    (record,) = llmcli(
        "inspect", "attention", TEXT, "--json", "-m", encoder, "--layer", 1, "--dtype", "float32"
    ).records
    assert flat(record) == pytest.approx(expected.flatten().tolist(), abs=1e-5)
    check_rows(record["attention"], is_causal=False)
    assert record["attention"][0][-1] > 0


@pytest.mark.real
@pytest.mark.slow
def test_attention_of_the_real_model(llmcli, real_cache, smollm2):
    text = "The cat sat on the mat because it was tired."
    expected = llama_attention(smollm2, text)
    (record,) = llmcli("inspect", "attention", text, "--json", "--layer", 7, "--dtype", "float32").records
    assert flat(record) == pytest.approx(expected[7].mean(0).flatten().tolist(), abs=1e-4)
    check_rows(record["attention"], is_causal=True)


def test_what_has_no_such_attention(inspect, llmcli, tiny, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    ran = inspect("attention", TEXT, "--layer", 2)
    assert (ran.exit_status, "this model has 2, from 0 to 1" in ran.stderr) == (2, True)
    ran = inspect("attention", "the fox", "--dtype", "bfloat16")
    assert ran.exit_status == 0
    ran = inspect("attention", "the " * 600)
    assert (ran.exit_status, "tokens, expected 1 to" in ran.stderr) == (1, True)
    folder = saved(MambaForCausalLM(MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2)), tmp_path, tiny)
    ran = llmcli("inspect", "attention", TEXT, "-m", folder)
    assert (ran.exit_status, "mamba models do not return attention weights" in ran.stderr) == (4, True)
    ran = llmcli("inspect", "attention", TEXT, "-m", "tests/golden/marian")
    assert (ran.exit_status, "marian models have an encoder and a decoder" in ran.stderr) == (4, True)


# next


def next_logits(folder, text):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(encoded(folder, text)).logits[0, -1]


@pytest.mark.parametrize("temperature", [0.5, 1, 2])
def test_next_is_the_softmax_of_the_logits_before_and_after(inspect, tiny, temperature):
    logits = next_logits(tiny, TEXT).double()
    (record,) = inspect("next", TEXT, "--json", "-n", 400, "--temperature", temperature, "--top-p", 0.9).records
    best = logits.softmax(-1).sort(descending=True)
    assert [token["id"] for token in record["next"]] == best.indices.tolist()
    assert [token["probability"] for token in record["next"]] == pytest.approx(best.values.tolist(), abs=1e-6)
    # Nucleus: the fewest tokens that together have 0.9, at that temperature.
    heated = (logits / temperature).softmax(-1)[best.indices]
    kept = heated * (heated.cumsum(0) - heated < 0.9)
    drawn = [token["sampling_probability"] for token in record["next"]]
    assert drawn == pytest.approx((kept / kept.sum()).tolist(), abs=1e-5)
    assert sum(drawn) == pytest.approx(1, abs=1e-4)
    assert record["sampling"] == {"temperature": temperature, "top_p": 0.9}


def test_next_as_generate_draws_it_by_default(inspect):
    (record,) = inspect("next", TEXT, "--json").records
    assert record["sampling"] == {"temperature": 0.8, "top_p": 0.95}
    assert len(record["next"]) == 10
    (record,) = inspect("next", TEXT, "--json", "--temperature", 0, "--top-k", 3).records
    assert [token["sampling_probability"] for token in record["next"]] == [1] + [0] * 9
    assert record["sampling"] == {"temperature": 0}
    (record,) = inspect("next", TEXT, "--json", "--top-k", 3, "--top-p", 1).records
    assert sum(token["sampling_probability"] > 0 for token in record["next"]) == 3


def follow(llmcli, text, model, steps):
    """What a greedy `generate` adds, and what the first bars add one by one."""
    common = ("-m", model, "--dtype", "float32", "--json")
    (record,) = llmcli("generate", text, "--temperature", 0, "--max-new-tokens", steps, *common).records
    followed = ""
    for _ in range(steps):
        (found,) = llmcli("inspect", "next", text + followed, "-n", 1, *common).records
        followed += found["next"][0]["token"]
    return record["generated_text"], followed


@pytest.mark.real
@pytest.mark.slow
def test_greedy_generate_follows_the_first_bars(llmcli, real_cache, smollm2):
    generated, followed = follow(llmcli, "Once upon a time", "smollm2", 6)
    assert generated == followed
    text = "The capital of France is"
    (record,) = llmcli("inspect", "next", text, "--json", "--dtype", "float32").records
    best = next_logits(smollm2, text).double().softmax(-1).topk(10)
    assert [token["id"] for token in record["next"]] == best.indices.tolist()
    assert [token["probability"] for token in record["next"]] == pytest.approx(best.values.tolist(), rel=1e-3)
    assert record["next"][0]["token"] == " Paris"


# tokens


def test_tokens_are_the_tokenizers(inspect, tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    (record,) = inspect("tokens", "the fox</s> é\n", "--json").records
    ids = [token["id"] for token in record["tokens"]]
    assert ids == tokenizer("the fox</s> é\n")["input_ids"]
    assert [token["piece"] for token in record["tokens"]] == tokenizer.convert_ids_to_tokens(ids)
    assert [token["token"] for token in record["tokens"] if token["special"]] == ["</s>"]
    texts = [token["token"] for token in record["tokens"]]
    assert "".join(texts) == "the fox</s> \\xc3\\xa9\n"
    rows = inspect("tokens", "the\t fox").stdout.splitlines()
    assert [row.split("\t")[3] for row in rows] == ['"the"', '"\\t"', '" fox"']
    assert inspect("tokens", stdin=b"the fox\n").stdout == inspect("tokens", "the fox").stdout
    assert (inspect("tokens", "").stdout, inspect("tokens", "", "--json").records[0]["tokens"]) == ("", [])


@pytest.mark.real
@pytest.mark.slow
def test_tokens_of_real_models_side_by_side(llmcli, real_cache, coloured, monkeypatch):
    args = ("inspect", "tokens", "Hi 你好 🦊", "-m", "smollm2", "-m", "gemma3-270m", "-m", "minilm")
    smollm2, gemma, minilm = llmcli(*args, "--json").records
    assert [token["token"] for token in gemma["tokens"]] == ["<bos>", "Hi", " 你", "好", " ", "🦊"]
    assert [token["token"] for token in minilm["tokens"]][0::3] == ["[CLS]", "[UNK]"]
    assert [token["token"] for token in smollm2["tokens"]][:3] == ["Hi", " ", "\\xe4\\xbd"]
    shown = plain(llmcli(*args, is_terminal=True).stdout).splitlines()
    assert re.fullmatch(r" +smollm2 +\d+  gemma3-270m +6  minilm +\d+ *", shown[0])
    from rich.cells import cell_len, chop_cells

    place = shown[0].index("gemma3-270m")
    for line, token in zip(shown[1:], gemma["tokens"], strict=False):
        assert "".join(chop_cells(line, place)[1:]).startswith(token["token"].replace(" ", "·"))
        assert cell_len(line) <= 80
    monkeypatch.setenv("COLUMNS", "40")
    narrow = plain(llmcli(*args, is_terminal=True).stdout).splitlines()
    assert all(cell_len(line) <= 40 for line in narrow)
    assert sum("minilm" in line for line in narrow) == 1


# pictures


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize(
    "args",
    [("tokens", "the 你好 fox\n\x1b[31m " + "x" * 90), ("next", TEXT), ("attention", "the 你好 fox " * 6)],
    ids=lambda args: args[0],
)
def test_no_screen_is_too_narrow(inspect, coloured, monkeypatch, width, args):
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", str(width))
    for variable in ("COLUMNS", "NO_COLOR"):
        monkeypatch.setenv(variable, str(width))
        ran = inspect(*args, is_terminal=True)
        assert ran.exit_status == 0
        assert ran.stdout.strip()
        assert all(cell_len(line) <= width for line in plain(ran.stdout).splitlines())
        assert "\x1b[31m" not in ran.stdout
        assert ("the terminal shows the first" in ran.stderr) == (args[0] == "attention")


def test_a_matrix_has_its_labels_on_the_diagonal(inspect, coloured, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    ran = inspect("attention", "the fox", is_terminal=True)
    header, *lines, of, scale = plain(ran.stdout).splitlines()
    assert (header, of) == (" 0 1", "mean of 2 layers, mean of 4 heads")
    assert scale == "0   ░░▒▒▓▓██ 1: rows attend to columns"
    assert [re.sub("[░▒▓█ ]{2}", "#", line.rstrip(), count=i + 1) for i, line in enumerate(lines)] == [
        "# 0 the",
        "## 1 ·fox",
    ]
    ran = inspect("attention", "the fox " * 9, "--layer", 1, "--head", 0, is_terminal=True)
    many, *_, of, _ = plain(ran.stdout).splitlines()
    assert (many.split()[-2:], of) == (["16", "18"], "layer 1, head 0")


@pytest.mark.parametrize("width", [40, 41, 60, 80])
@pytest.mark.parametrize("token", [")", "x" * 40, "你好你好你好你好"])
def test_numbers_are_never_cut(width, token):
    from llmcli.draw import figures

    tokens = [{"token": token, "logprob": -2.0, "probability": 0.1234, "sampling_probability": 4e-06}]
    screen = figures.Console(width=width)
    shown = figures.render(figures.draw_next_tokens({"next": tokens, "sampling": {}}, width), screen)
    assert ("0.1234" in shown, "4e-06" in shown) == (True, True)
    shown = figures.render(figures.probability_table(tokens, width), screen)
    assert ("0.1353" in shown, "PROBABILITY" in shown) == (True, True)


def test_tokens_are_no_markup(inspect, coloured, tmp_path, monkeypatch):
    text = "the [/INST] [i] :smile: [bold]x"
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        for what in ("tokens", "attention"):
            shown = plain(
                inspect(what, text, "--svg", tmp_path / "a.svg").stderr + inspect(what, text, is_terminal=True).stdout
            )
            assert "[" in shown
            assert "/" in shown
    from llmcli.draw import figures

    tokens = [{"token": "[/INST]", "logprob": -1.0, "probability": 0.5, "sampling_probability": 0.5}]
    screen = figures.terminal()
    for picture in (
        figures.probability_table(tokens, 80),
        figures.draw_next_tokens({"next": tokens, "sampling": {}}, 80),
    ):
        assert "[/INST]" in figures.render(picture, screen)


def test_files_that_need_nothing_beside_them(inspect, tmp_path):
    import xml.etree.ElementTree as ElementTree

    for args in (("tokens", "the <fox> & 你好"), ("next", TEXT), ("attention", TEXT)):
        svg, html = tmp_path / f"{args[0]}.svg", tmp_path / f"{args[0]}.html"
        ran = inspect(*args, "--svg", svg, "--html", html)
        assert (ran.stdout, ran.exit_status) == ("", 0)
        assert ran.stderr == f"note: saved {svg}\nnote: saved {html}\n"
        picture = svg.read_text(encoding="utf-8")
        ElementTree.fromstring(picture)
        assert picture in html.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\"' ]+", html.read_text())) == {"http://www.w3.org/2000/svg"}
        inspect(*args, "--svg", svg)  # a picture may be drawn again
        assert svg.read_text(encoding="utf-8") == picture


def test_wide_characters_fill_two_columns(inspect, tmp_path):
    inspect("attention", "fox 你", "--svg", tmp_path / "a.svg")
    texts = re.findall(r'<text x="([\d.]+)".*textLength="([\d.]+)".*>(.*)</text>', (tmp_path / "a.svg").read_text())
    widths = {text: float(width) / 8.4 for _, width, text in texts}
    assert widths["\\xe4"] == pytest.approx(4)
    import llmcli.draw.svg

    wide = re.findall(r'x="([\d.]+)".*textLength="([\d.]+)".*>(.*)</text>', llmcli.draw.svg.svg("ab你好c", "x"))
    assert [(float(width) / 8.4, text) for _, width, text in wide] == [(2, "ab"), (4, "你好"), (1, "c")]
    assert [(float(x) - 14) / 8.4 for x, _, _ in wide] == pytest.approx([0, 2, 6])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("next", "x", "--svg", "notes.md"), "--svg requires a name that ends in .svg, got 'notes.md'"),
        (("next", "x", "--html", "/nowhere/x.html"), "no such file"),
        (("next", "x", "--svg", "x.svg", "--html", "x.htm"), "--html requires a name that ends in .html, got 'x.htm'"),
        (("next", "x", "-n", "0"), "--limit"),
        (("tokens",), "no input"),
        (("next", "x", "--batch-size", "2"), "No such option: --batch-size"),
        (("attention", "x", "--batch-size", "2"), "No such option: --batch-size"),
        (("attention", "x", "--head", "-1"), "--head"),
    ],
)
def test_usage_errors(inspect, args, says):
    ran = inspect(*args)
    assert (ran.exit_status, ran.stdout) == (2, "")
    assert says in ran.stderr


def test_it_does_not_read_what_is_no_text(inspect):
    ran = inspect("tokens", stdin=b"\xff")
    assert (ran.exit_status, "cannot decode byte" in ran.stderr) == (1, True)


def test_a_model_of_another_kind(llmcli, encoder):
    ran = llmcli("inspect", "next", "x", "-m", encoder)
    assert (ran.exit_status, "bert cannot inspect next" in ran.stderr.replace(str(encoder), "bert")) == (4, True)


def test_attention_leaves_the_model_as_it_was(llmcli, encoder):
    from llmcli import pipelines
    from llmcli.job import LoadOptions

    pipeline = pipelines.load("attention", encoder, LoadOptions(dtype="float32"))
    usual = pipeline.model.config._attn_implementation
    pipeline(TEXT)
    assert pipeline.model.config._attn_implementation == usual != "eager"
    embedding = pipelines.wrap_as("embedding", pipeline)
    assert embedding.model is pipeline.model
    assert len(embedding(TEXT)["embedding"]) == 32


def test_copies_of_a_model_are_told_apart_by_name(llmcli, tiny, tmp_path):
    other = shutil.copytree(tiny, tmp_path / "other")
    ran = llmcli("inspect", "tokens", "the fox", "-m", tiny, "-m", other)
    assert {line.split("\t")[0] for line in ran.stdout.splitlines()} == {str(tiny), str(other)}
