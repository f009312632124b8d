"""llmcli embed: vectors as sentence-transformers defines them."""

import json
import math
import shutil

import pytest
import torch
from encoders import SHAPES, save_encoder, write
from safetensors.torch import save_file

QUICK = ("qwen3", "gemma")  # shapes that the fast tests try
TEXTS = ["The Clock was repaired", "Dog", "A lazy dog sleeps in the warm sun, and the Fox is quick", "Où est le chien?"]


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
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "median"}')
    ran = llmcli("embed", "the quick", "-m", folder)
    assert (ran.exit_status, "pooling by median is not supported" in ran.stderr) == (4, True)


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


def assert_embeds_as_sentence_transformers(llmcli, folder):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    methods = {None: model.encode, "query": model.encode_query, "document": model.encode_document}
    for batch_size, (role, encode) in zip(("auto", 1, 4), methods.items(), strict=True):
        as_role = ("--as", role) if role else ()
        args = "embed", "-m", folder, "--dtype", "float32", "--lines", "--batch-size", batch_size, *as_role
        records = llmcli(*args, stdin="".join(f"{text}\n" for text in TEXTS).encode()).records
        for record, vector in zip(records, encode(TEXTS, batch_size=1), strict=True):
            assert record["embedding"] == pytest.approx(vector.tolist(), abs=1e-5), role


@pytest.mark.parametrize("shape", QUICK)
def test_vectors_equal_sentence_transformers(llmcli, tmp_path, shape):
    assert_embeds_as_sentence_transformers(llmcli, save_encoder(tmp_path / "model", **SHAPES[shape]))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in QUICK])
def test_vectors_of_each_shape_equal_theirs(llmcli, tmp_path, shape):
    assert_embeds_as_sentence_transformers(llmcli, save_encoder(tmp_path / "model", **SHAPES[shape]))


def test_dimensions_are_cut_and_normalized_again(llmcli, tmp_path):
    folder = save_encoder(tmp_path / "model", **SHAPES["labse"])
    args = "embed", "the clock", "-m", folder, "--dtype", "float32"
    (whole,), (cut,) = llmcli(*args).records, llmcli(*args, "--dimensions", 8).records
    length = math.hypot(*whole["embedding"][:8])
    assert cut["embedding"] == pytest.approx([value / length for value in whole["embedding"][:8]], abs=1e-6)
    ran = llmcli(*args, "--dimensions", 33)
    assert (ran.exit_status, "--dimensions 33 exceeds the 32 dimensions" in ran.stderr) == (2, True)


def test_dimensions_of_the_folder_are_kept_as_saved(llmcli, tmp_path):
    folder = save_encoder(tmp_path / "model", **SHAPES["arctic"])
    write(folder / "config_sentence_transformers.json", {"truncate_dim": 8})
    assert_embeds_as_sentence_transformers(llmcli, folder)


def test_folders_saved_by_release_6_are_read(llmcli, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(save_encoder(tmp_path / "old", **SHAPES["joined"])), device="cpu")
    model.prompts |= {"passage": "passage: "}
    model.save_pretrained(str(tmp_path / "new"))
    assert_embeds_as_sentence_transformers(llmcli, tmp_path / "new")


def test_prompts_count_and_are_cut_with_the_text(llmcli, tmp_path):
    folder = save_encoder(tmp_path / "model", **SHAPES["nomic"], max_length=16)
    (plain,), (query,) = (
        llmcli("embed", "the clock", "-m", folder, *args).records for args in ((), ("--as", "query"))
    )  # fmt: skip
    assert query["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    ran = llmcli("embed", "dog " * 10, "-m", folder, "--as", "query")
    assert (ran.exit_status, "exceeds the context length of 16" in ran.stderr) == (1, True)
    (record,) = llmcli("embed", "dog " * 10, "-m", folder, "--as", "query", "--truncate").records
    assert record["usage"]["prompt_tokens"] == 16


def list_modules(*names, path="1_X"):
    """Return what replaces the list of modules with these, which may have a package of their own."""
    types = [name if "." in name else f"sentence_transformers.models.{name}" for name in names]
    paths = ["", *[path] * len(names)]
    return lambda folder: write(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": paths[i], "type": name} for i, name in enumerate(types)],
    )


def change(file, **changes):
    return lambda folder: write(folder / file, {**json.loads((folder / file).read_text()), **changes})


SETTINGS, TRANSFORMER = "config_sentence_transformers.json", "sentence_bert_config.json"
UNSUPPORTED = {  # what the error names, and a change of the folder
    "StaticEmbedding": list_modules("StaticEmbedding"),
    "CLIPModel": list_modules("CLIPModel"),
    "Router": list_modules("Router"),
    "module Pooling": list_modules("Pooling", "Transformer"),
    "module LayerNorm": list_modules("Transformer", "LayerNorm"),
    "modules.json without Pooling": list_modules("Transformer", "Normalize"),
    "module LSTM": list_modules("Transformer", "LSTM"),
    "module custom_st.Transformer, which is custom code,": list_modules("custom_st.Transformer"),
    "in directory '../1_Pooling'": list_modules("Transformer", "Pooling", path="../1_Pooling"),
    "SparseEncoder": change(SETTINGS, model_type="SparseEncoder"),
    "special token": change(SETTINGS, prompts={"query": "[SEP] "}),
    "setting query_length": change(TRANSFORMER, query_length=8),
    "setting config_args": change(TRANSFORMER, config_args={"num_hidden_layers": 1}),
    "modality_config": change(TRANSFORMER, modality_config={"message": {}}),
    "activation my.Swish": change("2_Dense/config.json", activation_function="my.Swish"),
    "2_Dense/model.safetensors": lambda folder: (folder / "2_Dense" / "model.safetensors").unlink(),
    "linear.weight": lambda folder: save_file({"x": torch.ones(2)}, folder / "2_Dense" / "model.safetensors"),
    "damaged": lambda folder: (folder / "2_Dense" / "model.safetensors").write_bytes(b"x" * 64),
    "failed to load": lambda folder: (folder / "modules.json").write_text("[{]"),
}


@pytest.fixture(scope="module")
def labse(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("models") / "labse", **SHAPES["labse"])


@pytest.mark.parametrize("named", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(llmcli, labse, tmp_path, named):
    folder = shutil.copytree(labse, tmp_path / "model")
    UNSUPPORTED[named](folder)
    ran = llmcli("embed", "dog", "-m", folder)
    assert (ran.exit_status, named in ran.stderr, ran.stdout) == (4, True, ""), ran.stderr


@pytest.mark.slow
def test_quantized_copies_keep_the_dense_module(llmcli, labse):
    ran = llmcli("embed", "the clock", "-m", labse, "--quantize", "int8")
    assert (ran.exit_status, len(ran.records[0]["embedding"])) == (0, 32)


def test_embed_resume_refuses_another_prompt(llmcli, labse, tmp_path):
    args = "embed", "a dog", "-m", labse, "--output", tmp_path / "out", "--resume"
    assert llmcli(*args).exit_status == 0
    assert llmcli(*args, "--as", "query").exit_status == 2
