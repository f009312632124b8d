"""Languages: what people and tokenizers call them, which one a text is in, and its sentences."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcli import config
from llmcli.errors import RecordError, UsageError

if TYPE_CHECKING:
    from langcodes import Language

# How tokenizers write a language: NLLB fra_Latn, mBART fr_XX, M2M100 __fr__, Marian >>fra<<.
TOKEN = re.compile(r"([a-z]{3}_[A-Z][a-z]{3}|[a-z]{2}_[A-Z]{2})|__([a-z]{2,3})__|>>(\w+)<<")
SYNONYMS = {"ns": "nso", "pbt": "ps", "quy": "qu"}  # codes of M2M100 and NLLB that langcodes leaves alone
NO_LANGUAGE = {"und", "mis", "mul", "zxx"}
SURE = 0.9
ENOUGH = 4000  # characters to tell a language by
PARAGRAPHS = re.compile(r"((?:\r*\n[ \t]*){2,})")
ODD = re.compile(r"[^\S \t\r\n]|[\ud800-\udfff]")


def parse(text: str) -> str:
    """The tag of `pt_br`, `fra_Latn`, `French` or `中文`. Raises UsageError for what is no language."""
    written = text.strip().encode(errors="replace").decode()  # an argument's bytes need not be UTF-8
    if found := _language(written) or _named(written):
        return str(found)
    from language_data.name_data import CODE_TO_NAMES

    common = [code for code in CODE_TO_NAMES if len(code) == 2 and code == str(_language(code))]
    known = [names[of].capitalize() for code in common for of in ("en", code) if of in (names := CODE_TO_NAMES[code])]
    raise UsageError(f"unknown language {text!r}{config.did_you_mean(written.capitalize(), known)}")


def name(tag: str) -> str:
    """Its English name, as one says it: `Simplified Chinese`, not `Chinese (Simplified)`."""
    from langcodes import Language
    from language_data.names import code_to_names

    language = Language.get(tag)
    if language.language == "zh" and language.territory:  # of Chinese, a country says the script
        language = Language.make(language="zh", script=language.maximize().script)
    return str(code_to_names(str(language)).get("en") or language.display_name())


def codes(names: Iterable[str]) -> dict[str, str]:
    """Those of a tokenizer's tokens that are languages, with their tags."""
    found: dict[str, Language] = {}
    for token in names:
        form = TOKEN.fullmatch(token)
        if form and (language := _language(form[form.lastindex or 0])):
            found[token] = language
    several = Counter(language.language for language in found.values())
    for token, language in found.items():
        plain = language.update_dict({"territory": None})
        # mBART writes ar_AR for all Arabic: a country means something where it tells two tokens apart.
        if several[language.language] == 1 and _script(plain) == _script(language):
            found[token] = plain
    return {token: str(language) for token, language in found.items()}


def match(wanted: str, known: Iterable[str]) -> str | None:
    """The known tag of the same language in the same script, of the nearest country."""
    same = [tag for tag in known if _same(wanted, tag)]
    return min(same, key=lambda tag: (tag != wanted, _distance(wanted, tag), tag), default=None)


def nearest(wanted: str, known: Iterable[str], limit: int = 5) -> list[str]:
    """The known tags that readers of the wanted one understand best."""
    return sorted(known, key=lambda tag: (_distance(wanted, tag), tag))[:limit]


def guess(text: str, among: Collection[str] = ()) -> list[tuple[str, float]]:
    """The languages it may be in, with their probabilities, best first; of `among`, those that the model knows."""
    tags, text = _detectable(tuple(among)), text[:ENOUGH]
    scores = [(tags[label], score) for label, score in _identifier().rank(text) if label in tags]
    # The scores add up a text's features as if each were news, so they grow apart too fast with its length: its root
    # tempers them. With 0.4, of the short sentences that reach SURE one in a hundred is wrong.
    heat = 0.4 * math.sqrt(len(text.encode(errors="replace")) or 1)
    weights = [math.exp((score - scores[0][1]) / heat) for _, score in scores]
    total = sum(weights)
    return [(tag, weight / total) for (tag, _), weight in zip(scores, weights, strict=True)]


def detect(text: str, among: Collection[str] = ()) -> str:
    """The language of `among`, or of all, that the text is in. Raises RecordError where that is not sure."""
    guesses, anything = guess(text, among), guess(text)
    families = {_family(tag) for tag, _ in guesses}
    others = [(tag, probability) for tag, probability in anything if _family(tag) not in families]
    if anything[0][1] == anything[1][1] or not any(map(str.isalpha, text)):
        exc = "the language cannot be told from the text"
    elif sum(probability for _, probability in others) >= SURE:  # then the best of `among` is the best of a bad lot
        exc = f"the language {_likely(others)}"
    elif guesses[0][1] < SURE:
        exc = f"the language {_likely(guesses)}"
    else:
        return guesses[0][0]
    raise RecordError("unsure_language", exc, hint="say it: --from LANG")


def likely(text: str) -> str | None:
    """The language that the text is in, where that is sure."""
    try:
        return detect(text)
    except RecordError:
        return None


def sentences(text: str, tag: str) -> list[str]:
    """The text cut into sentences, with the white space after them: joined, they are the text."""
    import sentencex

    found: list[str] = []
    for part in filter(None, PARAGRAPHS.split(text)):  # sentencex loses breaks between the paragraphs of a long text
        plain = ODD.sub(" ", part)  # ... and panics at `M<no-break space>.`
        pieces = sentencex.segment(_family(tag), plain)
        start = 0
        for piece in pieces if part.strip() and "".join(pieces) == plain else [plain]:
            found.append(part[start : start + len(piece)])
            start += len(piece)
    return found


def _likely(guesses: list[tuple[str, float]]) -> str:
    (best, probability), *rest = guesses
    return f"seems to be {name(best)}" if probability >= SURE else f"may be {name(best)} or {name(rest[0][0])}"


@cache
def _language(tag: str) -> "Language | None":
    """Of a tag or a code, in its shortest form. None for what is no language."""
    from langcodes import Language

    try:
        read = Language.get(tag).prefer_macrolanguage()
    except ValueError:
        return None
    code = SYNONYMS.get(read.language or "", read.language or "")
    if not re.fullmatch("[a-z]{2,3}", code) or code in NO_LANGUAGE or "qaa" <= code <= "qtz":  # those are private
        return None
    usual = {Language.make(language=code).maximize().script, "Hang" if code == "ko" else None}
    script = None if code != "zh" and read.script in usual else read.script  # Chinese has two usual ones
    found = Language.make(language=code, script=script, territory=read.territory if read.territory != "XX" else None)
    return found if found.is_valid() else None


def _named(text: str) -> "Language | None":
    """The language of this name, in English or in itself."""
    from language_data.names import get_trie_value, load_trie, name_to_code, normalize_name
    from language_data.util import data_filename

    itself = _language(name_to_code("language", text) or "")  # by the beginning of a name: `frensh` is found too
    for code in ["en", *([itself.language] if itself else [])]:
        path = Path(data_filename(f"trie/{code}/name_to_language.marisa"))
        names = load_trie(str(path)) if path.exists() else {}
        if normalize_name(text) in names:
            return _language(get_trie_value(names, normalize_name(text)))
    return None


def _family(tag: str) -> str:
    """The language itself, under one code for Norwegian and its Bokmål."""
    code = tag.split("-")[0]
    return "no" if code == "nb" else code


def _script(language: "Language") -> str | None:
    """Said or usual, where that is known: langcodes takes English for all it does not know."""
    from langcodes.data_dicts import LIKELY_SUBTAGS

    return language.maximize().script if language.script or language.language in LIKELY_SUBTAGS else None


def _same(wanted: str, known: str) -> bool:
    """Whether they are one language in one script."""
    one, other = _language(wanted), _language(known)
    if not one or not other or _family(str(one)) != _family(str(other)):
        return False
    scripts = {_script(one), _script(other)}
    return len(scripts) == 1 or None in scripts


def _distance(wanted: str, known: str) -> int:
    one, other = _language(wanted), _language(known)
    return one.distance(other) if one and other else 1000


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


@cache
def _detectable(among: tuple[str, ...]) -> dict[str, str]:
    """The detector's labels, each with its tag of `among`. Its rare languages have three letters; they draw short
    texts to them."""
    labels = {label: str(_language(label)) for label in _identifier().labels if len(label) == 2}
    by_family: dict[str, list[str]] = {}
    for tag in among or labels.values():
        by_family.setdefault(_family(str(_language(tag))), []).append(tag)
    return {
        label: match(tag, same) or same[0] for label, tag in labels.items() if (same := by_family.get(_family(tag)))
    }
