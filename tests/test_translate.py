"""llmcli translate: languages, long texts, defaults that fall back."""

import csv
import gc
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

GOLDEN = Path(__file__).parent / "golden"
MARIAN, NLLB, T5 = GOLDEN / "marian", GOLDEN / "nllb", GOLDEN / "t5"
DOCUMENT = """# The harbour

  The clock was repaired in 1951. An apprentice did it!

- a warm coat
    - two bottles

```sh
ferry --book "Bergen"
```

1. Buy a ticket.
---

The end. """


@pytest.fixture
def translate(llmcli):
    return lambda *args, **settings: llmcli(
        "translate", *args, "--max-new-tokens", 4, "--num-beams", 1, "--dtype", "float32", **settings
    )


@pytest.mark.parametrize(
    ("model", "said", "tags"),
    [
        (MARIAN, ("en", "french"), ("en", "fr")),
        (MARIAN, ("eng", "fr"), ("en", "fr")),
        (NLLB, ("English", "simplified chinese"), ("en", "zh-Hans")),
        (NLLB, ("eng_Latn", "zh"), ("en", "zh-Hans")),
        (NLLB, ("fr", "pt-BR"), ("fr", "pt")),
    ],
)
def test_languages_are_written_in_many_ways(translate, model, said, tags):
    ran = translate("The fox sleeps.", "-m", model, "--from", said[0], "--to", said[1], "--json")
    assert (ran.stderr, ran.exit_status) == ("", 0)
    assert (ran.records[0]["from"], ran.records[0]["to"].split("-")[0]) == (tags[0], tags[1].split("-")[0])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--to", "frnch", "-m", MARIAN), ["unknown language 'frnch'", "French"]),
        (("--to", "klingon", "-m", MARIAN), ["does not translate to Klingon"]),
        (("--to", "de", "-m", MARIAN), ["does not translate to German (de)", "fr (French)"]),
        (("--from", "de", "--to", "fr", "-m", MARIAN), ["does not translate from German (de)", "en (English)"]),
        (("--from", "en", "--to", "tlh", "-m", NLLB), ["does not translate to Klingon", "closest supported"]),
        (("--to", "it", "-m", T5), ["does not translate to Italian", "fr (French)"]),
        (("--to", "fr", "-m", MARIAN, "--prompt", "{text}"), ["--prompt cannot be used with"]),
    ],
)
def test_what_cannot_be_translated_is_said_with_what_can(translate, args, said):
    ran = translate("The fox sleeps.", *args)
    assert ran.exit_status == 2
    assert all(text in ran.stderr for text in said), ran.stderr


def test_the_language_is_detected_or_asked_for(translate):
    ran = translate("--lines", "--to", "fr", "-m", NLLB, "--jsonl",
                    stdin=b'{"text": "Das Wetter ist heute sehr sch\xc3\xb6n."}\n{"text": "ok"}\n')  # fmt: skip
    assert ran.exit_status == 2  # two forms
    ran = translate("--to", "fr", "-m", NLLB, "--jsonl",
                    stdin='{"text": "Das Wetter ist heute sehr schön."}\n{"text": "Hello"}\n'.encode())  # fmt: skip
    assert ran.exit_status == 3
    assert ran.records[0]["from"] == "de"
    assert ran.records[1]["error"]["type"] == "unsure_language"
    assert "--from" in ran.stderr


@pytest.mark.parametrize(("model", "target"), [(MARIAN, "fr"), (NLLB, "zh")])
def test_a_long_text_keeps_its_lines(translate, tmp_path, model, target):
    text = DOCUMENT * 8
    (tmp_path / "long.md").write_text(text)
    ran = translate("--from", "en", "--to", target, "-m", model, "-f", tmp_path / "long.md", "--batch-size", 16)
    assert ran.exit_status == 0
    before, after = text.splitlines(), ran.stdout.splitlines()
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert old.strip() or not new.strip()
        indent = len(old) - len(old.lstrip())
        assert new[:indent] == old[:indent]
        for marker in ("# ", "- ", "1. ", "```", "ferry --book", "---"):
            assert old.lstrip().startswith(marker) <= new.lstrip().startswith(marker)


@pytest.mark.parametrize("model", [MARIAN, NLLB])
def test_short_text_keeps_its_lines(translate, model):
    text = "The clock was repaired.\n\n  An apprentice did it. Yes.\nThe end.\n"
    ran = translate("--from", "en", "--to", "fr", "-m", model, "--max-new-tokens", 6, stdin=text.encode())
    lines = ran.stdout.splitlines()
    assert (len(lines), lines[1], lines[2][:2]) == (4, "", "  ")


def test_a_line_that_fits_goes_in_whole(translate):
    text = "The clock was repaired. An apprentice did it."
    ran = translate(text, "--to", "fr", "-m", MARIAN, "--json")
    from transformers import AutoTokenizer

    assert ran.records[0]["usage"]["prompt_tokens"] == len(AutoTokenizer.from_pretrained(MARIAN)(text)["input_ids"])


def test_several_translations_of_a_long_text(translate, llmcli):
    ran = llmcli("translate", DOCUMENT * 4, "--to", "fr", "-m", MARIAN, "-n", 2, "--num-beams", 2, "--json",
                 "--max-new-tokens", 4, "--dtype", "float32")  # fmt: skip
    texts = ran.records[0]["translation_texts"]
    assert texts[0] == ran.records[0]["translation_text"]
    assert [len(text.splitlines()) for text in texts] == [len((DOCUMENT * 4).splitlines())] * 2


@pytest.mark.parametrize("text", ["", "  \n", "```\n42\n```"])
def test_nothing_to_translate(translate, text):
    ran = translate("--to", "fr", "--from", "en", "-m", MARIAN, "--jsonl", stdin=json.dumps({"text": text}).encode())
    assert ran.exit_status == 0


def test_a_base_model_sees_examples_and_goes_line_by_line(translate, base, monkeypatch):
    from llmcli.pipelines.causal import CausalPipeline

    seen: list[str] = []
    preprocess = CausalPipeline.preprocess
    monkeypatch.setattr(
        CausalPipeline, "preprocess", lambda self, text, **rest: (seen.append(text), preprocess(self, text, **rest))[1]
    )
    ran = translate("the fox\n\n  the dog", "--from", "en", "--to", "fr", "-m", base)
    assert ran.exit_status == 0
    assert len(ran.stdout.splitlines()) == 3
    assert [prompt.splitlines()[-2:] for prompt in seen] == [
        ["English: the fox", "French:"],
        ["English: the dog", "French:"],
    ]
    assert seen[0].startswith("English: Frequently asked questions\nFrench: Questions fréquentes")


def test_the_prompt_can_be_ones_own(translate, chatty, home, monkeypatch):
    from llmcli.pipelines.causal import CausalPipeline

    seen: list[list[dict[str, str]]] = []
    preprocess = CausalPipeline.preprocess
    monkeypatch.setattr(
        CausalPipeline, "preprocess", lambda self, text, **rest: (seen.append(text), preprocess(self, text, **rest))[1]
    )
    args = ("the fox", "--from", "en", "--to", "fr", "-m", chatty)
    translate(*args, "--prompt", "Say {text} in {to}")
    (home / "config" / "llmcli").mkdir(parents=True)
    own = home / "config" / "llmcli" / "prompts.toml"
    own.write_text('[translate.chat]\nuser = "{from} to {to}: {text}"\n')
    from llmcli.tasks import prompting

    prompting.load_prompts.cache_clear()
    translate(*args)
    assert [messages[-1]["content"] for messages in seen] == ["Say the fox in French", "English to French: the fox"]
    own.write_text("[translate.chat]\nusr = 1\n")
    prompting.load_prompts.cache_clear()
    ran = translate(*args)
    assert (ran.exit_status, "unknown key 'usr'" in ran.stderr) == (2, True)


def test_the_first_default_that_is_there_is_used(translate, home):
    (home / "config" / "llmcli").mkdir(parents=True)
    own = home / "config" / "llmcli" / "config.toml"
    own.write_text(f'[defaults]\ntranslate = ["opus-mt-{{from}}-{{to}}", "{MARIAN}"]\n')
    from llmcli import config

    config.settings.cache_clear()
    ran = translate("The fox sleeps.", "--from", "en", "--to", "fr", "--offline", "--json")
    assert ran.exit_status == 0, ran.stderr
    assert ran.records[0]["model"] == str(MARIAN)
    assert f"opus-mt-en-fr is not cached; using {MARIAN}" in ran.stderr
    own.write_text('[defaults]\ntranslate = ["opus-mt-{from}-{to}", "nllb-600m"]\n')
    config.settings.cache_clear()
    ran = translate("The fox sleeps.", "--from", "en", "--to", "fr", "--offline")
    assert (ran.exit_status, ran.stdout) == (4, "")
    assert "opus-mt-en-fr is not cached" in ran.stderr


def test_a_model_of_another_kind_is_told_apart(llmcli, encoder):
    ran = llmcli("translate", "the fox", "--from", "en", "--to", "fr", "-m", encoder)
    assert ran.exit_status == 4
    assert "cannot translate" in ran.stderr
    assert "it can embed, inspect attention, search" in ran.stderr
    ran = llmcli("generate", "the fox", "-m", MARIAN)
    assert (ran.exit_status, "it can summarize, translate" in ran.stderr) == (4, True)


def test_what_is_empty_takes_no_model(translate):
    (record,) = translate("", "--to", "fr", "-m", NLLB, "--json").records
    assert (record["translation_text"], record["usage"]["prompt_tokens"]) == ("", 0)


def test_lines_in_lines_out(translate):
    ran = translate("--to", "fr", "-m", MARIAN, "--lines", stdin=b"The fox sleeps.\r\n\nTwo sentences. Here.\n")
    first, blank, last, end = ran.stdout.split("\n")
    assert (blank, end, ran.exit_status) == ("", "", 0)
    assert first
    assert last


def test_a_field_of_ones_own_and_a_record_without_it(translate):
    data = '{"id": 1, "body": "今天天气很好，我们出去走走吧。"}\n{"text": "x"}\n'
    ran = translate("--to", "en", "-m", NLLB, "--jsonl", "--field", "body", stdin=data.encode())
    done, failed = ran.records
    assert (done["id"], done["from"], done["to"]) == (1, "zh-Hans", "en")
    assert "今天天气很好" in ran.stdout
    assert failed["error"]["message"] == "missing field 'body': available fields: text"
    assert ran.exit_status == 3


def test_csv_in_csv_out(translate):
    ran = translate("--to", "fr", "-m", MARIAN, "--csv", "--field", "body", stdin=b"id,body\n1,The fox\n2,\n")
    one, two = csv.DictReader(io.StringIO(ran.stdout))
    assert list(one) == [
        "id", "body", "translation_text", "from", "to", "finish_reason", "usage", "model", "error",
    ]  # fmt: skip
    assert (one["from"], one["to"], bool(one["translation_text"])) == ("en", "fr", True)
    assert (two["id"], two["translation_text"]) == ("2", "")


def test_the_nearest_languages_are_named(translate):
    ran = translate("The fox sleeps.", "--from", "en", "--to", "br", "-m", NLLB)
    assert ran.exit_status == 2
    assert "closest supported: fr (French), oc (Occitan)" in ran.stderr


def test_a_field_that_the_prompt_names_and_nobody_has(translate, base):
    ran = translate("the fox", "--from", "en", "--to", "fr", "-m", base, "--prompt", "{nope} {text}")
    assert ran.exit_status == 1
    assert "missing field 'nope'" in ran.stderr


def test_translation_plan_many_records_made_once(translate, monkeypatch):
    from llmcli.text import languages

    calls: list[int] = []
    find_codes = languages.find_codes
    monkeypatch.setattr(languages, "find_codes", lambda tokens: (calls.append(1), find_codes(tokens))[1])
    ran = translate("--from", "en", "--to", "fr", "-m", NLLB, "--lines", stdin=b"The fox.\nThe dog.\nThe cat.\n")
    assert (ran.exit_status, len(ran.stdout.splitlines()), len(calls)) == (0, 3, 1)


def test_translation_plan_is_made_per_model_and_languages(translate):
    for model, target in ((NLLB, "fr"), (NLLB, "zh-Hans"), (MARIAN, "fr"), (NLLB, "fr")):
        (record,) = translate("The fox.", "--from", "en", "--to", target, "-m", model, "--json").records
        assert (record["model"], record["to"]) == (str(model), target)
    ran = translate("The fox.", "--from", "en", "--to", "zh-Hans", "-m", MARIAN)
    assert (ran.exit_status, "does not translate to Simplified Chinese" in ran.stderr) == (2, True)


def test_translation_plans_end_with_their_model():
    from llmcli.job import Job
    from llmcli.tasks.translation_plan import _plans, plan_for

    tokens = {"eng_Latn": 1, "fra_Latn": 2}

    class FakeModel:
        config = SimpleNamespace(model_type="m2m_100")
        tokenizer = SimpleNamespace(get_added_vocab=lambda: tokens, convert_tokens_to_ids=tokens.get)

    job, count = Job("translate", "nllb", parameters={"to": "fr"}), len(_plans)
    one, other = FakeModel(), FakeModel()
    assert plan_for(job, one) is plan_for(job, one) is not plan_for(job, other)
    assert plan_for(job, one).settings == {"forced_bos_token_id": 2}
    del one, other
    gc.collect()
    assert len(_plans) == count


def test_translate_to_rare_language_complains_of_target(llmcli):
    ran = llmcli("translate", "--to", "klingon", "hello")
    assert ran.exit_status == 2
    assert ran.stderr == "error: no default model translates to Klingon (tlh)\nhint: choose one with -m NAME\n"


@pytest.mark.parametrize(("typed", "offered"), [("fre", ["french"]), ("Ger", ["german"]), ("fr", ["fr"]), ("xx", [])])
def test_completion_offers_languages_by_name(typed, offered):
    from llmcli.options import completion

    assert completion.languages(typed) == offered


@pytest.fixture
def rows(monkeypatch):
    """The tokens that encoder-decoder models read."""
    from llmcli.pipelines.seq2seq import Seq2SeqPipeline

    rows: list[list[int]] = []
    preprocess = Seq2SeqPipeline.preprocess

    def spy(self, text, **settings):
        inputs = preprocess(self, text, **settings)
        rows.append(inputs["input_ids"].tolist())
        return inputs

    monkeypatch.setattr(Seq2SeqPipeline, "preprocess", spy)
    return rows


def test_angle_brackets_at_beginning_are_no_language(translate, rows):
    from transformers import AutoTokenizer

    for text in (">> The fox << sleeps", "The fox sleeps"):
        assert translate(text, "--from", "en", "--to", "fr", "-m", MARIAN).exit_status == 0
    assert "The fox" in AutoTokenizer.from_pretrained(MARIAN).decode(rows[0])
    assert AutoTokenizer.from_pretrained(MARIAN)("The fox sleeps")["input_ids"] == rows[-1]


@pytest.mark.parametrize("model", [MARIAN, NLLB, T5])
def test_special_token_in_translated_text_stays_text(translate, rows, model):
    from transformers import AutoTokenizer

    assert translate("</s> fox <pad> fra_Latn", "--from", "en", "--to", "fr", "-m", model).exit_status == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    usual = [token for token in tokenizer("a")["input_ids"] if token in special]
    assert [token for token in rows[0] if token in special] == usual
