"""llmcli summarize: in one go, in parts, condensed."""

import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
SENTENCES = ["The harbour clock was repaired in 1951 by an apprentice who had never seen the sea.",
             "Snow covered the pass for eleven days, and the shepherds could not reach the market."]  # fmt: skip
LONG = "\n\n".join(f"{i}. {SENTENCES[i % 2]}" for i in range(60))


@pytest.fixture
def summarize(llmcli):
    return lambda *args, **settings: llmcli(
        "summarize", *args, "--num-beams", 1, "--max-new-tokens", 6, "--dtype", "float32", "--json", **settings
    ).records[0]


def test_a_short_text_goes_in_whole(summarize):
    record = summarize(SENTENCES[0], "-m", GOLDEN / "bart")
    assert (record["chunks"], record["truncated"]) == (1, 0)
    assert record["usage"]["completion_tokens"] <= 6


def test_a_long_text_goes_in_parts_and_none_is_dropped(summarize):
    from transformers import AutoTokenizer

    record = summarize(LONG, "-m", GOLDEN / "bart", "--batch-size", 4)
    tokens = len(AutoTokenizer.from_pretrained(GOLDEN / "bart")(LONG)["input_ids"])
    assert record["chunks"] >= tokens / 256
    assert record["truncated"] == 0
    assert record["usage"]["prompt_tokens"] > tokens  # every part, and the parts' summaries


def test_a_person_sees_how_many_parts_are_done(llmcli):
    args = ("summarize", LONG, "-m", GOLDEN / "bart", "--num-beams", 1, "--max-new-tokens", 6, "--batch-size", 4)
    assert " parts" in llmcli(*args, is_terminal=True).stderr
    assert llmcli(*args).stderr == ""


def test_truncate_takes_the_beginning_and_says_so(summarize):
    record = summarize(LONG, "-m", GOLDEN / "bart", "--truncate")
    assert record["chunks"] == 1
    assert record["truncated"] > 1000
    assert record["usage"]["prompt_tokens"] <= 256


def test_old_names_of_lengths_go_with_encoder_decoders_only(llmcli, chatty):
    args = ("summarize", SENTENCES[0], "-o", "max_length=9", "-o", "min_length=3", "--json")
    ran = llmcli(*args, "-m", GOLDEN / "t5")
    assert ran.exit_status == 0
    assert ran.records[0]["usage"]["completion_tokens"] <= 9
    ran = llmcli(*args, "-m", chatty)
    assert (ran.exit_status, "--max-new-tokens" in ran.stderr) == (2, True)


def test_by_a_prompt_in_parts(summarize, chatty):
    record = summarize(LONG, "-m", chatty)
    assert record["chunks"] > 1


def test_condensed_texts_have_a_sentence_of_each_part(encoder, chatty, home, monkeypatch):
    from llmcli import config
    from llmcli.engines.local import LocalEngine
    from llmcli.job import Job
    from llmcli.tasks import Strategy, Task, TaskResult
    from llmcli.tasks.summarize import condense

    (home / "config" / "llmcli").mkdir(parents=True)
    (home / "config" / "llmcli" / "config.toml").write_text(f'[defaults]\nembed = "{encoder}"\n')
    config.settings.cache_clear()
    parts = [f"{SENTENCES[0]} {SENTENCES[1]}", f"{SENTENCES[1]} And what of that?"]

    def steps(job, prepared, model):
        text = yield from condense(job, parts, lambda text: len(text.split()), 40)
        return TaskResult({}, text)

    from llmcli import tasks

    task = Task(lambda job, fields: fields, (), {}, {"causal": Strategy(steps)})
    monkeypatch.setattr(tasks, "load_task", lambda name, load=tasks.load_task: task if name == "test" else load(name))
    from llmcli.job import Record

    (result,) = LocalEngine().run(Job("test", str(chatty)), [Record({"text": "x"})])
    assert sum(sentence in result.text for sentence in SENTENCES) == 2 or result.text.count(SENTENCES[1]) == 2


def test_empty_and_chinese(llmcli):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("", "三位石匠和一位画家修复了圆顶。"))
    ran = llmcli("summarize", "--jsonl", "-m", GOLDEN / "t5", stdin=lines.encode(), is_terminal=False)
    assert ran.exit_status == 0
    assert ran.records[0]["summary_text"] == ""
    assert "三位石匠和一位画家修复了圆顶。" in ran.stdout


def test_several_summaries_of_a_long_text(llmcli):
    args = ("--num-beams", 2, "-n", 2, "--max-new-tokens", 6, "--dtype", "float32")
    (record,) = llmcli("summarize", LONG, "-m", GOLDEN / "bart", "--json", *args).records
    assert len(record["summary_texts"]) == 2
    assert record["summary_text"] == record["summary_texts"][0]


def test_t5_has_a_prefix_and_lengths_of_its_own(llmcli):
    from transformers import AutoTokenizer

    (record,) = llmcli("summarize", "A fox.", "-m", GOLDEN / "t5", "--json", "--dtype", "float32").records
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "t5")
    assert record["usage"]["prompt_tokens"] == len(tokenizer("summarize: A fox.")["input_ids"])
    assert record["usage"]["completion_tokens"] <= 40


def test_a_file_that_is_no_text_harms_no_other(llmcli, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "a.txt").write_text(SENTENCES[0])
    files = ("-f", tmp_path / "photo.jpg", "-f", tmp_path / "a.txt")
    ran = llmcli("summarize", "-m", GOLDEN / "bart", *files, "--json", "--max-new-tokens", 4)
    failed, done = ran.records
    why = "cannot decode byte 0xff at offset 0: use --encoding, or convert it to UTF-8 with iconv"
    assert failed == {
        "error": {"type": "invalid_utf8", "message": why},
        "file": str(files[1]),
    }  # fmt: skip
    assert (done["file"], bool(done["summary_text"]), ran.exit_status) == (str(files[3]), True, 3)
    assert "is a directory" in llmcli("summarize", "-m", GOLDEN / "bart", "-f", tmp_path).stderr


def test_a_model_that_is_cached_stands_in_for_one_that_is_not(llmcli, home, monkeypatch):
    from llmcli import config

    (home / "config" / "llmcli").mkdir(parents=True)
    own = home / "config" / "llmcli" / "config.toml"
    own.write_text(f'[defaults]\nsummarize = ["no-such/model", "{GOLDEN / "bart"}"]\n')
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config.settings.cache_clear()
    args = ("summarize", "A fox.", "--max-new-tokens", 4)
    assert f"no-such/model is not cached; using {GOLDEN / 'bart'}" in llmcli(*args).stderr
    assert llmcli(*args, "-q").stderr == ""


def test_of_models_none_of_which_is_cached_the_first_that_can_be_pulled(llmcli, tiny, home, tmp_path):
    from weights import make_gguf

    from llmcli import config

    make_gguf(tiny, tmp_path / "tiny.gguf")  # it has to be converted first
    (home / "config" / "llmcli").mkdir(parents=True)
    own = home / "config" / "llmcli" / "config.toml"
    own.write_text(f'[defaults]\nsummarize = ["no-such/model", "{tmp_path / "tiny.gguf"}"]\n')
    config.settings.cache_clear()
    ran = llmcli("summarize", "the fox", "--prompt", "{text}", "--max-new-tokens", 4, "--offline")
    assert ran.exit_status == 0
    assert "instead of no-such/model: no-such/model is not cached, and this call is offline" in ran.stderr
