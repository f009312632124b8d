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
    from llmcli.tasks import Answer, Task, Way
    from llmcli.tasks.condense import condensed

    (home / "config" / "llmcli").mkdir(parents=True)
    (home / "config" / "llmcli" / "config.toml").write_text(f'[defaults]\nembed = "{encoder}"\n')
    config.settings.cache_clear()
    parts = [f"{SENTENCES[0]} {SENTENCES[1]}", f"{SENTENCES[1]} And what of that?"]

    def steps(job, prepared, model):
        text = yield from condensed(job, parts, lambda text: len(text.split()), 40)
        return Answer({}, text)

    from llmcli import tasks

    task = Task(lambda job, fields: fields, (), {}, {"causal": Way(steps)})
    monkeypatch.setattr(tasks, "find", lambda name, find=tasks.find: task if name == "test" else find(name))
    from llmcli.job import Record

    (result,) = LocalEngine().run(Job("test", str(chatty)), [Record({"text": "x"})])
    assert sum(sentence in result.text for sentence in SENTENCES) == 2 or result.text.count(SENTENCES[1]) == 2


def test_empty_and_chinese(llmcli):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("", "三位石匠和一位画家修复了圆顶。"))
    ran = llmcli("summarize", "--jsonl", "-m", GOLDEN / "t5", stdin=lines.encode(), is_terminal=False)
    assert ran.exit_status == 0
    assert ran.records[0]["summary_text"] == ""
    assert "三位石匠和一位画家修复了圆顶。" in ran.stdout
