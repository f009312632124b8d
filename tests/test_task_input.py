"""Odd input of the tasks: blank texts, failed records, fields, and files of the user's own that make no sense."""

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
    lines = b'{"error": "old", "x": 1}\nbad\n'
    old, bad = llmcli("qa", "Who?", "-m", GOLDEN / "bert-qa", "--jsonl", stdin=lines).records
    assert old == {"error": "old", "x": 1}
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
