"""What people and tokenizers call languages, which one a text is in, and its sentences."""

import random
import subprocess
import sys

import pytest

from llmcli.errors import RecordError, UsageError
from llmcli.text.languages import detect, english_name, find_codes, find_nearest, match, parse, rank, split_sentences

NLLB = ["ar", "ca", "da", "de", "en", "es", "fr", "ko", "nb", "nn", "pt", "sr", "sv", "zh-Hans", "zh-Hant"]


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("en", "en"),
        (" EN ", "en"),
        ("zh-Hans", "zh-Hans"),
        ("pt-BR", "pt-BR"),
        ("pt_br", "pt-BR"),
        ("zh_CN", "zh-CN"),
        ("french", "fr"),
        ("French", "fr"),
        ("français", "fr"),
        ("Chinese", "zh"),
        ("simplified chinese", "zh-Hans"),
        ("中文", "zh"),
        ("繁體中文", "zh-Hant"),
        ("Brazilian Portuguese", "pt-BR"),
        ("norsk", "no"),
        ("norsk bokmål", "nb"),
        ("Farsi", "fa"),
        ("fra", "fr"),
        ("eng_Latn", "en"),
        ("zho_Hans", "zh-Hans"),
        ("zho_Hant", "zh-Hant"),
        ("arb_Arab", "ar"),
        ("kor_Hang", "ko"),
        ("srp_Cyrl", "sr"),
        ("sr-Latn", "sr-Latn"),
        ("pbt_Arab", "ps"),
        ("en_XX", "en"),
        ("iw", "he"),
        ("cmn", "zh"),
        ("tl", "fil"),
    ],
)
def test_a_language_by_what_people_call_it(text, tag):
    assert parse(text) == tag
    assert parse(tag) == tag


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("frnch", "; did you mean 'French'?"),
        ("frensh", "; did you mean 'French'?"),  # begins as the Tok Pisin name does
        ("GERMN", "; did you mean 'German'?"),
        ("espanol", "; did you mean 'Español'?"),
        ("french language", ""),
        ("allemand", ""),  # neither English nor German
        ("xx", ""),
        ("qqq", ""),
        ("und", ""),
        ("mul", ""),
        ("jp", ""),
        ("x-mine", ""),
        ("en_US.UTF-8", ""),
        ("", ""),
        ("-", ""),
        ("\udcff", ""),
    ],
)
def test_what_is_no_language_is_refused(text, suggestion):
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert caught.value.message == f"unknown language {text!r}{suggestion}"


@pytest.mark.parametrize(
    ("tag", "english"),
    [
        ("fr", "French"),
        ("zh", "Chinese"),
        ("zh-Hans", "Simplified Chinese"),
        ("zh-TW", "Traditional Chinese"),
        ("pt-BR", "Brazilian Portuguese"),
        ("nb", "Norwegian Bokmål"),
        ("sr-Latn", "Serbian (Latin)"),
        ("yue", "Cantonese"),
    ],
)
def test_the_name_for_a_prompt(tag, english):
    assert english_name(tag) == english


@pytest.mark.parametrize(
    ("tokens", "tags"),
    [
        (["fra_Latn", "zho_Hans", "zho_Hant", "kor_Hang"], ["fr", "zh-Hans", "zh-Hant", "ko"]),
        (["prs_Arab", "pes_Arab", "ace_Arab", "ace_Latn"], ["fa-AF", "fa", "ace-Arab", "ace"]),
        (["fr_XX", "zh_CN", "ar_AR", "tl_XX"], ["fr", "zh", "ar", "fil"]),
        (["__fr__", "__ns__", "__ast__"], ["fr", "nso", "ast"]),
        ([">>fra<<", ">>cmn_Hant<<", ">>pt<<", ">>pt_BR<<"], ["fr", "zh-Hant", "pt", "pt-BR"]),
        ([">>zh_TW<<"], ["zh-TW"]),
    ],
)
def test_the_languages_among_a_tokenizers_tokens(tokens, tags):
    others = [
        "<pad>",
        "</s>",
        "<unk>",
        "[MASK]",
        "<2fr>",
        "fr",
        "__long_name__",
        ">>pob<<",
        "xx_XX",
        "foo_Barr",
        "zxx_Latn",
    ]
    assert find_codes(["<s>", *tokens, *others]) == dict(zip(tokens, tags, strict=True))


@pytest.mark.parametrize(
    ("wanted", "known", "found"),
    [
        ("fr", ["en", "fr"], "fr"),
        ("zh", ["zh-Hant", "zh-Hans"], "zh-Hans"),
        ("zh-TW", ["zh-Hans", "zh-Hant"], "zh-Hant"),
        ("zh-CN", ["zh"], "zh"),
        ("pt-BR", ["pt"], "pt"),
        ("pt", ["pt-PT", "pt-BR"], "pt-BR"),
        ("pt-PT", ["pt", "pt-PT"], "pt-PT"),
        ("en", ["en-GB", "en-US"], "en-US"),
        ("en-AU", ["en-US", "en-GB"], "en-GB"),
        ("no", ["nn", "nb"], "nb"),
        ("nb", ["nn", "no"], "no"),
        ("sr-Cyrl", ["sr"], "sr"),
        ("acm", ["acm-Arab"], "acm-Arab"),  # of which langcodes knows no script
        ("fr", ["ca", "oc"], None),
        ("no", ["nn", "da"], None),
        ("zh-Hant", ["zh-Hans", "zh"], None),
        ("sr-Latn", ["sr", "hr"], None),
        ("lb", ["de"], None),
        ("fr", [], None),
    ],
)
def test_the_tag_that_serves_another(wanted, known, found):
    assert match(wanted, known) == found


def test_the_nearest_come_first_and_then_the_alphabet():
    assert find_nearest("zh-Hant", NLLB, limit=2) == ["zh-Hant", "zh-Hans"]
    assert find_nearest("gl", ["it", "pt", "es", "de"], limit=3) == ["es", "de", "it"]


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("The weather is nice today.", "en"),
        ("How are you?", "en"),
        ("HOW ARE YOU?", "en"),
        ("Il fait beau", "fr"),
        ("Das Wetter ist heute schön.", "de"),
        ("Ella compró un coche nuevo la semana pasada.", "es"),
        ("Hon köpte en ny bil förra veckan.", "sv"),
        ("На прошлой неделе она купила новую машину.", "ru"),
        ("اشترت سيارة جديدة الأسبوع الماضي.", "ar"),
        ("天气很好", "zh"),
        ("今日はいい天気ですね。", "ja"),
        ("오늘 날씨가 좋네요.", "ko"),
        ("How are you? " * 100_000, "en"),
        ("How are you, \ud800?", "en"),
    ],
)
def test_the_language_of_a_text(text, tag):
    assert detect(text) == tag


@pytest.mark.parametrize(
    ("text", "among", "problem"),
    [
        ("Hello", [], "the language may be Breton or Finnish"),
        ("Hvordan har du det?", NLLB, "the language may be Danish or Norwegian Bokmål"),
        ("Hvordan har du det?", ["en", "fr"], "the language may be Danish or Norwegian"),
        ("Il fait beau", ["en", "de"], "the language seems to be French"),
        ("Il fait beau", ["tlh"], "the language seems to be French"),  # no detector knows Klingon
        ("1 + 1 = 2", [], "cannot detect the language"),
        ("OK", [], "cannot detect the language"),
        ("", NLLB, "cannot detect the language"),
    ],
)
def test_an_unsure_language_is_asked_for(text, among, problem):
    with pytest.raises(RecordError) as caught:
        detect(text, among)
    assert (caught.value.kind, caught.value.message) == ("unsure_language", problem)
    assert caught.value.hint == "pass --from LANG"


@pytest.mark.parametrize(
    ("text", "among", "tag"),
    [
        ("天气很好", NLLB, "zh-Hans"),
        ("天气很好", ["en", "zh-Hant"], "zh-Hant"),
        ("Hvordan har du det?", ["en", "nb"], "nb"),
        ("Bom dia", ["pt-BR", "en"], "pt-BR"),
        ("Magandang umaga", ["fil", "en"], "fil"),
    ],
)
def test_fewer_languages_are_easier_and_keep_their_tags(text, among, tag):
    assert detect(text, among) == tag


def test_guesses_are_probabilities_best_first():
    guesses = rank("Hvordan har du det?", NLLB)
    assert {tag for tag, _ in guesses[:2]} == {"da", "nb"}
    assert sum(probability for _, probability in guesses) == pytest.approx(1)
    assert guesses == sorted(guesses, key=lambda one: -one[1])


@pytest.mark.parametrize(
    ("text", "tag", "cut"),
    [
        ("Dr. Smith left.  He was late.", "en", ["Dr. Smith left.  ", "He was late."]),
        ("天气很好。我们走吧！", "zh-Hans", ["天气很好。", "我们走吧！"]),
        ("One.\r\n\r\nTwo.\n", "en", ["One.", "\r\n\r\n", "Two.\n"]),
        ("M\xa0. Dupont. Ça va\xa0?", "fr", ["M\xa0. Dupont. ", "Ça va\xa0?"]),
        ("\ud800. No.", "tlh", ["\ud800. ", "No."]),
        ("", "en", []),
    ],
)
def test_sentences(text, tag, cut):
    assert split_sentences(text, tag) == cut


@pytest.mark.parametrize("tag", ["en", "zh-Hant", "de", "hi", "nb", "tlh"])
def test_nothing_of_a_text_is_lost_between_its_sentences(tag):
    pieces = [
        *" .!?。…\n\r\t\u2028\x00\x85\u200b\"'()«»،।؟é中😀\u0301\ufeff\xa0\ud800",
        "word",
        "Dr. ",
        "\n\n",
        "слово ",
    ]
    chance = random.Random(tag)
    for length in [*range(200), 20_000]:
        text = "".join(chance.choices(pieces, k=length))
        assert "".join(split_sentences(text, tag)) == text


def test_importing_it_imports_nothing_heavy():
    heavy = "{'langcodes', 'language_data', 'numpy', 'sentencex'}"
    script = f"import sys, llmcli.text.languages; print({heavy} & {{*sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
