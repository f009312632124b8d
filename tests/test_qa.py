"""llmcli qa: where questions and contexts come from, and what is answered."""

import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
MODEL = GOLDEN / "distilbert-qa"
CLOCK = "The harbour clock was repaired in 1951 by an apprentice who had never seen the sea."
FERRY = "The ferry from Bergen leaves at a quarter to six, though never on Sundays."


@pytest.fixture
def qa(llmcli):
    return lambda *args, model=MODEL, **settings: llmcli("qa", *args, "-m", model, "--dtype", "float32", **settings)


def test_from_an_argument_stdin_or_a_file_it_is_the_same(qa, tmp_path):
    (tmp_path / "clock.txt").write_text(CLOCK + "\n")
    answers = [
        qa("Who?", "-c", CLOCK).stdout,
        qa("Who?", stdin=CLOCK.encode()).stdout,
        qa("Who?", "-f", tmp_path / "clock.txt").stdout,
    ]
    assert len(set(answers)) == 1
    assert answers[0].strip() in CLOCK


def test_all_files_are_one_context(qa, tmp_path):
    files = {"a.txt": CLOCK, "b.txt": FERRY}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    ran = qa("When?", "-f", tmp_path / "a.txt", "-f", tmp_path / "b.txt", "--json", "--top-k", 6)
    (record,) = ran.records
    assert record["question"] == "When?"
    assert "context" not in record
    assert len(record["answers"]) == 6
    assert [answer["score"] for answer in record["answers"]] == sorted(
        (answer["score"] for answer in record["answers"]), reverse=True
    )
    assert {Path(answer["file"]).name for answer in record["answers"]} == set(files)
    for answer in [record, *record["answers"]]:
        assert files[Path(answer["file"]).name][answer["start"] : answer["end"]] == answer["answer"]


def test_lines_are_contexts_or_with_a_context_questions(qa):
    ran = qa("When?", "--lines", stdin=f"{CLOCK}\n{FERRY}\n".encode())
    assert [answer in text for answer, text in zip(ran.stdout.splitlines(), (CLOCK, FERRY), strict=True)] == [True] * 2
    ran = qa("-c", CLOCK, "--lines", stdin=b"Who?\nWhen?\n")
    assert [answer in CLOCK for answer in ran.stdout.splitlines()] == [True, True]


def test_records_lack_nothing_that_the_command_line_gives(qa):
    lines = [{"question": "Who?", "text": CLOCK}, {"text": FERRY}, {"question": "Who?"}]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    ran = qa("When?", "--jsonl", "--field", "context=text", stdin=data)
    assert ran.exit_status == 3
    assert [record["question"] for record in ran.records] == ["Who?", "When?", "Who?"]
    assert ran.records[2]["error"] == {
        "type": "missing_field", "message": "missing field 'text': available fields: question",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        ((), 2, "no question"),
        (("Who?", "-c", CLOCK, "--lines"), 2, "cannot combine QUESTION, -c and input files"),
        (("Who?", "-c", CLOCK, "--temperature", "0.5"), 2, "temperature cannot be used with"),
        (("Who?", "-c", CLOCK, "--doc-stride", "99999"), 2, "cannot overlap by 99999"),
        (("Who?", "-f", "/"), 2, "is a directory"),
        (("Who?", "-f", "absent.txt"), 2, "no such file"),
        (("Who?", "-c", CLOCK, "--prompt", "{question}"), 2, "--prompt cannot be used with"),
    ],
)
def test_what_is_wrong_is_said(qa, args, status, said):
    ran = qa(*args)
    assert (ran.exit_status, ran.stdout) == (status, "")
    assert said in ran.stderr


def test_a_file_that_is_no_text(qa, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n")
    ran = qa("Who?", "-f", tmp_path / "picture.png")
    assert (ran.exit_status, "cannot decode byte 0x89 at offset 0" in ran.stderr) == (1, True)


def test_an_empty_context_has_no_answer(qa):
    ran = qa("Who?", "-c", "", "--json")
    assert (ran.exit_status, ran.records[0]["answer"]) == (0, None)


def test_a_language_model_answers_with_a_passage(qa, chatty):
    ran = qa("Who?", "-c", CLOCK, "--json", "--max-new-tokens", 4, model=chatty)
    (record,) = ran.records
    assert record["answer"]
    assert CLOCK[record["start"] : record["end"]] == record["passage"]
    assert record["usage"]["completion_tokens"] <= 4
    ran = qa("Who?", "-c", CLOCK, "--top-k", 2, model=chatty)
    assert (ran.exit_status, "top_k is for extractive models" in ran.stderr) == (2, True)


def test_of_a_long_text_the_nearest_passages_go_in(qa, chatty, encoder, home, tmp_path, monkeypatch):
    from llmcli import config
    from llmcli.pipelines.causal import CausalPipeline

    seen: list[list[dict[str, str]]] = []
    preprocess = CausalPipeline.preprocess
    monkeypatch.setattr(
        CausalPipeline, "preprocess", lambda self, text, **rest: (seen.append(text), preprocess(self, text, **rest))[1]
    )
    (home / "config" / "llmcli").mkdir(parents=True)
    (home / "config" / "llmcli" / "config.toml").write_text(f'[defaults]\nsearch = "{encoder}"\n')
    config.settings.cache_clear()
    text = "\n\n".join(["the lazy dog sleeps in the warm sun"] * 300 + ["who leaves Bergen?"])
    (tmp_path / "long.txt").write_text(text)
    ran = qa("who leaves Bergen?", "-f", tmp_path / "long.txt", "--json", "--max-new-tokens", 4, model=chatty)
    assert ran.exit_status == 0
    prompt = seen[-1][-1]["content"]
    assert prompt.count("Bergen") == 2  # the question, and its passage
    assert len(prompt) < len(text) / 2
    record = ran.records[0]
    assert text[record["start"] : record["end"]] == record["passage"]


def test_unknown_is_null(qa, chatty, home):
    from llmcli.tasks import prompting

    first = qa("Who?", "-c", CLOCK, "--json", "--max-new-tokens", 4, model=chatty).records[0]["answer"]
    (home / "config" / "llmcli").mkdir(parents=True, exist_ok=True)
    (home / "config" / "llmcli" / "prompts.toml").write_text(f"[qa.chat]\nunknown = [{json.dumps(first)}]\n")
    prompting.load_prompts.cache_clear()
    ran = qa("Who?", "-c", CLOCK, "--json", "--max-new-tokens", 4, model=chatty)
    assert (ran.exit_status, ran.records[0]["answer"], ran.records[0]["passage"]) == (0, None, None)


def test_no_answer_is_one_of_the_answers_where_that_is_allowed(qa):
    args = ("Who?", "-c", "The dog", "--json", "--top-k")
    assert "" not in [answer["answer"] for answer in qa(*args, 3).records[0]["answers"]]
    (nothing,) = [each for each in qa(*args, 4, "--allow-no-answer").records[0]["answers"] if not each["answer"]]
    assert nothing["score"] > 0
    assert (nothing["start"], nothing["end"]) == (0, 0)


def test_top_k_answers_are_lines_of_text(qa):
    ran = qa("Who?", "-c", CLOCK, "--top-k", 3)
    assert len(ran.stdout.splitlines()) == 3


def test_chinese_stays_as_it_is(qa):
    context = "学徒修复了钟。"
    ran = qa("谁修复了钟？", "-c", context, "--json")
    assert "谁修复了钟？" in ran.stdout
    assert ran.records[0]["answer"] in context


@pytest.mark.parametrize(
    ("model", "hint"),
    [("marian", "it can summarize, translate"), ("t5", "it can embed, search, summarize, translate")],
)
def test_a_model_without_such_a_head(qa, model, hint):
    ran = qa("Who?", "-c", CLOCK, model=GOLDEN / model)
    assert ran.exit_status == 4
    assert hint in ran.stderr


def test_a_question_answering_model_can_say_what_it_can(llmcli):
    ran = llmcli("summarize", "x", "-m", MODEL)
    assert (ran.exit_status, ran.stderr.splitlines()[1]) == (4, "hint: it can embed, inspect attention, qa, search")


def test_a_prompt_of_ones_own(qa, base):
    from transformers import AutoTokenizer

    ran = qa("Who?", "-c", CLOCK, "--prompt", "{question} {context}", "--max-new-tokens", 4, "--json", model=base)
    expected = AutoTokenizer.from_pretrained(base)(f"Who? {CLOCK}")["input_ids"]
    assert ran.records[0]["usage"]["prompt_tokens"] == len(expected)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[qaa.base]\nprompt = "x"\n', "did you mean 'qa'"),
        ('[qa.base]\npromt = "x"\n', "did you mean 'prompt'"),
        ("[qa.base]\nprompt = 5\n", "'prompt' must be of type str"),
        ("[qa]\nbase = 5\n", "[qa.base] is not a table"),
    ],
)
def test_prompts_that_make_no_sense(qa, base, home, text, says):
    from llmcli.tasks import prompting

    (home / "config" / "llmcli").mkdir(parents=True)
    (home / "config" / "llmcli" / "prompts.toml").write_text(text)
    prompting.load_prompts.cache_clear()
    ran = qa("Who?", "-c", CLOCK, model=base)
    assert (ran.exit_status, ran.stdout) == (2, "")
    assert says in ran.stderr
