"""llmcli rerank: texts ranked as CrossEncoder of sentence-transformers ranks them."""

import json

import pytest
from encoders import save_cross_encoder, save_encoder, write
from heads import EMOTIONS, save_head

QUERY = "Who repaired the old clock?"
TEXTS = ["The clock was repaired in 1951.", "A dog.", "The sky is blue, and the sea is too.", "Repaired by whom? " * 30]
IDENTITY = "torch.nn.modules.linear.Identity"


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    return save_cross_encoder(tmp_path_factory.mktemp("models") / "cross-encoder", "bert")


@pytest.fixture
def rerank(llmcli, cross_encoder):
    return lambda *args, **settings: llmcli("rerank", "-m", cross_encoder, "--dtype", "float32", *args, **settings)


def lines(*texts):
    return "".join(f"{text}\n" for text in texts).encode()


def assert_ranks_as_cross_encoder(llmcli, folder):
    from sentence_transformers import CrossEncoder

    expected = CrossEncoder(str(folder), device="cpu").rank(QUERY, TEXTS, return_documents=True, batch_size=1)
    for batch_size in ("auto", 1):
        args = "rerank", "-m", folder, "--dtype", "float32", "--batch-size", batch_size, "--json", QUERY
        records = llmcli(*args, stdin=lines(*TEXTS)).records
        assert [record["text"] for record in records] == [known["text"] for known in expected]
        scores = [known["score"] for known in expected]
        assert [record["score"] for record in records] == pytest.approx(scores, abs=1e-4)
        assert [record["rank"] for record in records] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "settings", [{}, {"activation": IDENTITY}, {"sbert_ce_default_activation_function": IDENTITY}], ids=str
)
def test_rerank_equals_cross_encoder(llmcli, tmp_path, settings):
    assert_ranks_as_cross_encoder(llmcli, save_cross_encoder(tmp_path / "model", "roberta", **settings))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "distilbert", "electra", "deberta-v2", "modernbert", "qwen2"])
def test_rerank_equals_cross_encoder_for_each_kind(llmcli, tmp_path, kind):
    assert_ranks_as_cross_encoder(llmcli, save_cross_encoder(tmp_path / "model", kind))


def test_rerank_reads_the_files_of_release_6(llmcli, tmp_path):
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(save_cross_encoder(tmp_path / "old", "bert")), device="cpu", max_length=24)
    model.prompts, model.default_prompt_name = {"find": "find: "}, "find"
    model.save_pretrained(str(tmp_path / "new"))
    assert_ranks_as_cross_encoder(llmcli, tmp_path / "new")


def test_text_mode_prints_places_and_scores(rerank, tmp_path):
    (tmp_path / "a.txt").write_text("A dog.\n\nThe  clock was repaired.\n")
    (tmp_path / "b.txt").write_text("The sky is blue.")
    ran = rerank(QUERY, tmp_path / "a.txt", tmp_path / "b.txt")
    known = {(record["file"], record["line"]): record for record in rerank(QUERY, tmp_path / "a.txt", "--json").records}
    printed = ran.stdout.splitlines()
    assert len(printed) == 3
    score = known[str(tmp_path / "a.txt"), 3]["score"]
    assert f"{tmp_path / 'a.txt'}:3: The clock was repaired. ({score:.3f})" in printed
    assert rerank(QUERY, "-n", 1, stdin=lines("A dog.")).stdout.startswith("1: A dog. (0.")
    assert rerank(QUERY, "-n", 2, tmp_path / "a.txt", tmp_path / "b.txt").stdout.splitlines() == printed[:2]
    assert rerank(QUERY, "--null", stdin=b"A dog.\nA cat.\0Sun\0").stdout.count("\0") == 2


def test_records_keep_their_fields_and_failures_come_last(rerank):
    data = b'{"id": 1, "body": "A dog."}\n{"id": 2}\n{"id": 3, "body": " "}\n{"id": 4, "body": "The clock."}\n'
    ran = rerank("--jsonl", "--field", "body", QUERY, stdin=data)
    assert ran.exit_status == 3
    assert [record.get("rank") for record in ran.records] == [1, 2, None, None]
    assert {record["id"] for record in ran.records[:2]} == {1, 4}
    assert ran.records[0]["score"] >= ran.records[1]["score"]
    assert ran.records[2]["error"]["type"] == "missing_field"
    assert ran.records[3]["score"] is None
    limited = rerank("--jsonl", "--field", "body", "-n", 1, QUERY, stdin=data)
    assert [record["id"] for record in limited.records] == [ran.records[0]["id"], 2]


def test_csv_has_columns_for_rank_and_score(rerank):
    header, *rows = rerank("--csv", QUERY, stdin=b"id,text\n1,A dog.\n2,The clock.\n").stdout.splitlines()
    assert header == "id,text,rank,score,truncated,model,error"
    assert [row.split(",")[2] for row in rows] == ["1", "2"]


def test_equal_texts_keep_their_order(rerank):
    ran = rerank("--jsonl", QUERY, stdin=b'{"id": 1, "text": "A dog."}\n{"id": 2, "text": "A dog."}\n')
    assert [record["id"] for record in ran.records] == [1, 2]


def test_long_text_is_truncated_with_a_warning(rerank):
    ran = rerank(QUERY, "--json", stdin=lines("a dog " * 100))
    assert ran.records[0]["truncated"] > 100
    assert ran.stderr.startswith("warning: line 1: truncated by ")


def test_rerank_refuses_what_it_cannot_do(llmcli, rerank, encoder, tiny, tmp_path):
    assert rerank(" ", stdin=b"x\n").exit_status == 2
    assert rerank(QUERY, "--output", tmp_path / "out", "--resume", "--json", stdin=b"x\n").exit_status == 2
    assert rerank(QUERY, stdin=b"").stdout == ""
    ran = llmcli("rerank", QUERY, stdin=b"x\n")
    assert (ran.exit_status, "-m ms-marco-minilm" in ran.stderr) == (2, True)
    several = save_head(tmp_path / "several", "bert", "SequenceClassification", EMOTIONS)
    for folder, reason in ((several, "have 4 labels, not one"), (encoder, "no sequence-classification head"),
                           (tiny, "no sequence-classification head")):  # fmt: skip
        ran = llmcli("rerank", QUERY, "-m", folder, stdin=b"x\n")
        assert (ran.exit_status, reason in ran.stderr) == (4, True), ran.stderr
    custom = save_cross_encoder(tmp_path / "custom", "bert", "my.package.Activation")
    ran = llmcli("rerank", QUERY, "-m", custom, stdin=b"x\n")
    assert (ran.exit_status, "activation my.package.Activation" in ran.stderr) == (4, True)


def test_output_file_and_scores_in_a_nested_job(rerank, cross_encoder, tmp_path):
    from llmcli.engines.local import LocalEngine
    from llmcli.job import Job, LoadOptions, Record

    rerank(QUERY, "--json", "--output", tmp_path / "out", stdin=lines("A dog."))
    (record,) = map(json.loads, (tmp_path / "out").read_text().splitlines())
    job = Job("rerank", str(cross_encoder), parameters={"query": QUERY}, load_options=LoadOptions(dtype="float32"))
    (result,) = LocalEngine().run(job, [Record({"text": "A dog."})])
    assert result.output["score"] == record["score"]


def test_an_encoder_names_rerank_for_cross_encoders(llmcli, tmp_path):
    folder = save_encoder(tmp_path / "model", "bert", [("Pooling", {"pooling_mode": "cls"})])
    write(folder / "config_sentence_transformers.json", {"model_type": "CrossEncoder"})
    ran = llmcli("embed", "dog", "-m", folder)
    assert (ran.exit_status, "llmcli rerank" in ran.stderr) == (4, True)
