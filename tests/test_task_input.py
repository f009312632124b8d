"""Odd input of the tasks: blank texts, failed records, fields, and files of the user's own that make no sense."""

import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
S = ("--max-new-tokens", 4, "--num-beams", 1)


@pytest.mark.parametrize("text", ["```x``` is how code looks. Words.", "~~~~\n```\ncode\n~~~~"])
def test_code_in_a_line_opens_no_block(llmcli, text):
    ran = llmcli("translate", f"{text}\n" + "More words to come. " * 20, "--to", "fr", "-m", GOLDEN / "marian", *S)
    assert "More words" not in ran.stdout


@pytest.mark.parametrize(
    "command", [("translate", "--to", "fr", "-m", GOLDEN / "nllb"), ("summarize", "-m", GOLDEN / "bart")]
)
def test_a_blank_text_takes_no_model(llmcli, command):
    (record,) = llmcli(*command, *S, "--jsonl", stdin=b'{"text": " \\n "}\n').records
    assert record["usage"] == {"prompt_tokens": 0, "completion_tokens": 0}


def test_no_model_is_sought_without_work(llmcli):
    assert llmcli("translate", "--to", "fr", "--from", "en", "--offline", "--lines", stdin=b"").exit_status == 0


def test_what_failed_before_is_passed_on_as_it_is(llmcli):
    lines = b'{"error": {"type": "old", "message": "m"}, "x": 1}\nbad\n'
    old, bad = llmcli("qa", "Who?", "-m", GOLDEN / "bert-qa", "--jsonl", stdin=lines).records
    assert old == {"error": {"type": "old", "message": "m"}, "x": 1}
    assert list(bad) == ["line", "error"]


def test_csv_has_its_columns_from_the_first_row_on(llmcli, base):
    data = b"question,context\nWho?,\nWho?,The dog\n"
    args = ("qa", "--csv", "--offline")
    assert llmcli(*args, "-m", GOLDEN / "bert-qa", "--top-k", 2, stdin=data).exit_status == 0
    assert llmcli(*args, "-m", base, "--max-new-tokens", 4, stdin=data).exit_status == 0


def test_csv_names_a_column_once(llmcli):
    ran = llmcli("summarize", "--csv", "--truncate", "-m", GOLDEN / "bart", *S, stdin=b"text\nhi\n")
    header = ran.stdout.splitlines()[0].split(",")
    assert len(header) == len(set(header))


def test_several_generated_answers(llmcli, base):
    ran = llmcli("qa", "Who?", "-c", "The dog.", "-m", base, "-n", 2, "--num-beams", 2, "--max-new-tokens", 4, "--json")
    assert ran.exit_status == 2 or len(ran.records[0]["answers"]) == 2


def test_a_preset_reads_the_named_field(llmcli, base):
    ran = llmcli(
        "generate",
        "--preset",
        "poem",
        "--jsonl",
        "--field",
        "topic",
        "-m",
        base,
        "--max-new-tokens",
        2,
        stdin=b'{"topic": "the dog"}\n',
    )
    assert ran.exit_status == 0


def test_more_answers_than_there_are(llmcli):
    ran = llmcli("qa", "Who?", "-c", "The dog", "-m", GOLDEN / "distilbert-qa", "--json", "--top-k", 8)
    assert all(answer["answer"] and answer["start"] < answer["end"] for answer in ran.records[0]["answers"])


def own(home, name, text):
    from llmcli import config
    from llmcli.tasks import prompting, translate

    (home / "config" / "llmcli").mkdir(parents=True, exist_ok=True)
    (home / "config" / "llmcli" / name).write_text(text)
    config.settings.cache_clear()
    prompting.load_prompts.cache_clear()
    translate.load_examples.cache_clear()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("presets.toml", '[story]\nprompt = "{text}"\noptions = 5\n'),
        ("presets.toml", '[story]\nprompt = "{text}"\nbegins = 5\n'),
        ("prompts.toml", 'qa = "x"\n'),
        ("prompts.toml", '[qa.bas]\nprompt = "{context}"\n'),
        ("prompts.toml", '[qa.base]\nprompt = "{question} {context"\nexamples = []\n'),
        ("prompts.toml", '[qa.base]\nexamples = [{question = "a"}]\n'),
        ("prompts.toml", "[qa.base]\noptions = {tempratur = 1}\n"),
        ("prompts.toml", "[qa.base]\nstop = [5]\n"),
        ("prompts.toml", "[qa.base]\nmax_new_tokens = true\n"),
        ("translations.toml", "x = 1\n"),
    ],
)
def test_files_of_ones_own_that_make_no_sense(llmcli, base, home, name, text):
    own(home, name, text)
    command = {
        "presets.toml": ("generate", "a", "--preset", "story"),
        "prompts.toml": ("qa", "Who?", "-c", "The dog."),
        "translations.toml": ("translate", "the dog", "--from", "en", "--to", "fr"),
    }[name]
    ran = llmcli(*command, "-m", base, "--max-new-tokens", 2)
    assert ran.exit_status == 2
    assert name in ran.stderr


def test_a_default_that_has_gone_is_passed_over(llmcli, home, tmp_path):
    own(home, "config.toml", f'[defaults]\nsummarize = ["{tmp_path / "gone"}", "{GOLDEN / "bart"}"]\n')
    assert llmcli("summarize", "a fox", *S).exit_status == 0


def test_an_empty_list_of_defaults(llmcli, home):
    own(home, "config.toml", "[defaults]\nsummarize = []\n")
    assert "--from" not in llmcli("summarize", "a fox").stderr


WHITE = ["", " ", "\n\t ", "\u00a0", "\u3000\u2003", "\u2028\x1f"]


@pytest.fixture
def no_model(monkeypatch):
    """No task may ask for a model."""
    from llmcli.engines.local import LocalEngine

    monkeypatch.setattr(LocalEngine, "find_model", lambda self, job: pytest.fail("the model was asked for"))


@pytest.mark.parametrize(
    ("command", "result"),
    [
        (("generate",), {"generated_text": ""}),
        (("generate", "--full-text"), {"generated_text": ""}),
        (("generate", "--prompt", "Review: {text} Mood:"), {"generated_text": ""}),
        (("generate", "--prompt", "{title}: {text}"), {"generated_text": ""}),
        (("generate", "--preset", "poem"), {"generated_text": ""}),
        (("chat", "-s", "Be brief."), {"generated_text": ""}),
        (("chat", "--prompt", "Classify {text}"), {"generated_text": ""}),
        (("translate", "--to", "fr"), {"translation_text": ""}),
        (("translate", "--to", "fr", "--prompt", "{text}"), {"translation_text": ""}),
        (("summarize",), {"summary_text": ""}),
        (("summarize", "--prompt", "{title} {text}"), {"summary_text": ""}),
        (("embed",), {"embedding": None}),
        (("score",), {"perplexity": None, "tokens": 0}),
        (("score", "--condition", "title"), {"perplexity": None, "tokens": 0}),
        (("qa", "--field", "context=text"), {"answer": None}),
        (("qa", "--field", "question=text", "--field", "context=title"), {"answer": None}),
        (("qa", "Who?", "--field", "context=text"), {"answer": None}),
    ],
)
def test_white_space_is_an_empty_text(llmcli, no_model, command, result):
    data = "".join(json.dumps({"text": t, "title": "a", "question": "Who?"}) + "\n" for t in WHITE).encode()
    ran = llmcli(*command, "-m", "absent/model", "--jsonl", stdin=data)
    assert (ran.exit_status, ran.stderr) == (0, "")
    assert [record.items() >= result.items() for record in ran.records] == [True] * len(WHITE)


def test_white_space_is_an_empty_line(llmcli, no_model):
    data = "".join(f"{text}\n" for text in WHITE if "\n" not in text).encode()
    for command in (("generate",), ("generate", "--prompt", "a {text}"), ("chat",), ("summarize",)):
        assert llmcli(*command, "-m", "absent/model", "--lines", stdin=data).stdout == "\n" * data.count(b"\n")
        assert llmcli(*command, "-m", "absent/model", " \u00a0").stdout == "\n"


def test_blank_fields_of_a_template_are_an_empty_text(llmcli, no_model):
    data = b'{"review": " ", "note": ""}\n'
    for prompt in ("Review: {review} Mood:", "{review} {note}"):
        ran = llmcli("generate", "-m", "absent/model", "--jsonl", "--prompt", prompt, stdin=data)
        assert (ran.records[0]["generated_text"], ran.exit_status) == ("", 0)


def test_template_with_one_filled_field_is_run(llmcli, base):
    args = ("generate", "-m", base, "--max-new-tokens", 2, "--jsonl", "--prompt", "{a} {n} fox")
    for data in (b'{"a": " ", "n": 5}', b'{"a": "the", "n": ""}'):
        assert llmcli(*args, stdin=data).records[0]["generated_text"]


@pytest.mark.parametrize("text", WHITE)
def test_conversation_with_blank_last_message_takes_no_model(llmcli, no_model, text):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
    data = json.dumps({"messages": [*messages, {"role": "user", "content": text}]}).encode()
    ran = llmcli("chat", "-m", "absent/model", "-s", "Be brief.", "--jsonl", stdin=data)
    assert (ran.records[0]["generated_text"], ran.exit_status) == ("", 0)


def test_white_space_has_no_passage(llmcli, encoder, tmp_path):
    (tmp_path / "a").write_text("".join(WHITE))
    (tmp_path / "b").write_text(f"{WHITE[3]}\n\nthe dog sleeps\n\n{WHITE[4]}\n")
    for files, count in ((["a"], 0), (["a", "b"], 1)):
        ran = llmcli("search", "dog", "-m", encoder, *(tmp_path / name for name in files), "--json")
        assert (len(ran.records), ran.exit_status) == (count, 0)
    ran = llmcli("search", "dog", "-m", encoder, stdin="\n".join(WHITE).encode())
    assert (ran.stdout, ran.exit_status) == ("", 0)
    assert llmcli("search", WHITE[4], tmp_path / "b", "-m", encoder).exit_status == 2


@pytest.mark.parametrize(
    "command",
    [
        ("generate",), ("generate", "--field", "review"), ("generate", "--prompt", "{text} {review}"), ("chat",),
        ("generate", "--preset", "poem"), ("translate", "--to", "fr"), ("summarize",),
        ("embed",), ("score",), ("score", "--field", "id", "--condition", "text"), ("qa",), ("qa", "Who?"),
        ("translate", "--from", "en", "--to", "fr", "--field", "id", "--prompt", "{text} {review}"),
        ("summarize", "--field", "id", "--prompt", "{review}"),
    ],
)  # fmt: skip
def test_missing_csv_column_is_one_usage_error(llmcli, base, encoder, command):
    model = encoder if command[0] == "embed" else base
    ran = llmcli(*command, "-m", model, "--csv", stdin=b"id,product\n one,a\nfox,b\n")
    assert (ran.exit_status, ran.stdout) == (2, "")
    error, hint = ran.stderr.splitlines()
    assert error.startswith("error: missing field '")
    assert error.endswith("' in all records")
    assert hint.startswith("hint: available fields: ")
    assert "id, product" in hint


def test_missing_json_field_fails_its_record(llmcli, base):
    ran = llmcli("generate", "-m", base, "--max-new-tokens", 1, "--jsonl", stdin=b'{"id": 1}\n{"text": "the"}\n')
    assert (ran.exit_status, ["error" in record for record in ran.records]) == (3, [True, False])
