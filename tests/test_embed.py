"""llmcli embed: vectors as sentence-transformers defines them."""

import json
import math
import shutil

import pytest


@pytest.fixture
def embed(llmcli, encoder):
    return lambda *args, **settings: llmcli("embed", "-m", encoder, "--dtype", "float32", *args, **settings)


def expected(folder, text, *, first_token=False):
    """The vector by hand."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(inputs["input_ids"]).last_hidden_state[0]
    vector = states[0] if first_token else states.mean(0)
    return (vector / vector.norm()).tolist()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_mean_pooling_of_length_one_whatever_the_batch_size(embed, encoder, batch_size):
    texts = ["the quick brown fox", "dog", "a lazy dog sleeps in the warm sun"]
    records = embed(
        "--lines", "--batch-size", batch_size, stdin="".join(f"{text}\n" for text in texts).encode()
    ).records
    for text, record in zip(texts, records, strict=True):
        assert record["text"] == text
        assert record["embedding"] == pytest.approx(expected(encoder, text), abs=1e-6)
        assert math.hypot(*record["embedding"]) == pytest.approx(1)
    assert records[1]["usage"] == {"prompt_tokens": 2}


def test_the_models_own_pooling(llmcli, encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "cls")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    (record,) = llmcli("embed", "the quick", "-m", folder, "--dtype", "float32").records
    assert record["embedding"] == pytest.approx(expected(encoder, "the quick", first_token=True), abs=1e-6)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    ran = llmcli("embed", "the quick", "-m", folder)
    assert (ran.exit_status, "lasttoken" in ran.stderr) == (4, True)


def test_a_text_that_is_too_long(embed):
    ran = embed("dog " * 100)
    assert ran.exit_status == 1
    assert "exceeds the context length of 64" in ran.stderr
    (record,) = embed("dog " * 100, "--truncate").records
    assert record["usage"]["prompt_tokens"] == 64


def test_empty_bad_and_foreign_records(embed):
    ran = embed("--jsonl", "--field", "body", stdin=b'{"body": ""}\n{"id": 1}\n{"body": "dog", "id": 2}\n')
    assert ran.records[0]["embedding"] is None
    assert ran.records[1]["error"]["type"] == "missing_field"
    assert len(ran.records[2]["embedding"]) == 32
    assert ran.exit_status == 3


def test_json_option_writes_json_for_csv(embed):
    (record,) = embed("--csv", "--json", stdin=b"text\ndog\n").records
    assert (record["text"], len(record["embedding"])) == ("dog", 32)


def test_csv_holds_vectors_as_json(embed):
    header, row = embed("--csv", stdin=b"text\ndog\n").stdout.splitlines()
    assert header == "text,embedding,usage,model,error"
    assert len(json.loads(row.split('"')[1])) == 32


def test_a_model_that_generates_is_told_apart(llmcli, encoder):
    ran = llmcli("generate", "the quick", "-m", encoder)
    assert ran.exit_status == 4
    assert "bert models do not continue text" in ran.stderr


@pytest.mark.real
@pytest.mark.slow
def test_the_default_encoder_knows_what_is_near(llmcli, real_cache):
    ran = llmcli("embed", "A man is eating food.", "Someone eats a meal.", "The stock market fell.")
    food, meal, market = (record["embedding"] for record in ran.records)
    near, far = (sum(a * b for a, b in zip(food, other, strict=True)) for other in (meal, market))
    assert near > 0.7 > 0.2 > far


def test_embed_resumes_texts_and_files(llmcli, encoder, tmp_path):
    (tmp_path / "a.txt").write_text("the fox")
    args = ("embed", "a dog", "-f", tmp_path / "a.txt", "-m", encoder, "--output", tmp_path / "out", "--resume")
    assert llmcli(*args).exit_status == 0
    complete = (tmp_path / "out").read_bytes()
    assert complete.count(b"\n") == 2
    (tmp_path / "out").write_bytes(complete[:-10])
    assert llmcli(*args).exit_status == 0
    assert (tmp_path / "out").read_bytes() == complete


def test_embed_counts_positions_after_padding_in_roberta_models(llmcli, encoder, tmp_path):
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    folder = tmp_path / "roberta"
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    ran = llmcli("embed", "--lines", "-m", folder, stdin=b"%s\n%s\n" % (b" dog" * 62, b" dog" * 63))
    assert ran.records[0]["usage"] == {"prompt_tokens": 62}
    assert "63 tokens, which exceeds the context length of 62" in ran.records[1]["error"]["message"]
    (tmp_path / "dogs.txt").write_text("dog " * 500)
    assert llmcli("search", "dog", tmp_path / "dogs.txt", "-m", folder).exit_status == 0
