"""Languages: parses and names tags, detects the language of a text, and splits it into sentences.

No other module uses the private names of langcodes, language_data and py3langid.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from llmcli import config
from llmcli.errors import RecordError, UsageError

if TYPE_CHECKING:
    from langcodes import Language
    from py3langid.langid import LanguageIdentifier

# How tokenizers write a language: NLLB fra_Latn, mBART fr_XX, M2M100 __fr__, Marian >>fra<<.
TOKEN = re.compile(r"([a-z]{3}_[A-Z][a-z]{3}|[a-z]{2}_[A-Z]{2})|__([a-z]{2,3})__|>>(\w+)<<")
SYNONYMS = {"ns": "nso", "pbt": "ps", "quy": "qu"}  # codes of M2M100 and NLLB that langcodes does not replace
NO_LANGUAGE = {"und", "mis", "mul", "zxx"}
MIN_PROBABILITY = 0.9  # of a detected language
MAX_DETECTION_CHARACTERS = 4000
PARAGRAPHS = re.compile(r"((?:\r*\n[ \t]*){2,})")
ODD_CHARACTERS = re.compile(r"[^\S \t\r\n]|[\ud800-\udfff]")


def parse(text: str) -> str:
    """Return the tag of a language from a tag, a tokenizer's code or a name: `pt_br`, `fra_Latn` or `French`."""
    written = text.strip().encode(errors="replace").decode()  # The bytes of an argument may not be UTF-8.
    if language := _language(written) or _language(_find_code(written) or ""):
        return str(language)
    from language_data.name_data import CODE_TO_NAMES as NAMES  # by language, then by the language of the name

    common = [code for code in NAMES if len(code) == 2 and code == str(_language(code))]
    known = [NAMES[code][key].capitalize() for code in common for key in ("en", code) if key in NAMES[code]]
    raise UsageError(f"unknown language {text!r}{config.did_you_mean(written.capitalize(), known)}")


def english_name(tag: str) -> str:
    """Return the English name of a language for use in a sentence: `Simplified Chinese`, not `Chinese (Simplified)`."""
    from langcodes import Language
    from language_data.name_data import CODE_TO_NAMES

    language = Language.get(tag)
    if language.language == "zh" and language.territory:  # The country of Chinese implies the script.
        language = Language.make(language="zh", script=language.maximize().script)
    name: str | None = CODE_TO_NAMES.get(str(language), {}).get("en")
    return name or language.display_name()


def find_codes(tokens: Iterable[str]) -> dict[str, str]:
    """Return the tokens of a tokenizer that are language codes, and the tag of each."""
    languages: dict[str, Language] = {}
    for token in tokens:
        match = TOKEN.fullmatch(token)
        if match and (language := _language(match[match.lastindex or 0])):
            languages[token] = language
    counts = Counter(language.language for language in languages.values())
    for token, language in languages.items():
        # mBART writes ar_AR for all Arabic. A country is significant only if it distinguishes two tokens.
        plain = language.update_dict({"territory": None})
        if counts[language.language] == 1 and _script(plain) == _script(language):
            languages[token] = plain
    return {token: str(language) for token, language in languages.items()}


def match(wanted: str, known: Iterable[str]) -> str | None:
    """Return the known tag of the same language and script, preferring the closest country."""
    from langcodes import closest_supported_match

    # langcodes would also accept a related language, or the same language in a script that most of its readers know.
    return closest_supported_match(wanted, sorted(tag for tag in known if _is_same(wanted, tag)), max_distance=1000)


def find_nearest(wanted: str, known: Iterable[str], limit: int = 5) -> list[str]:
    """Return the known tags that readers of a language understand best, best first."""
    from langcodes import tag_distance

    return sorted(known, key=lambda tag: (tag_distance(wanted, tag), tag))[:limit]


def rank(text: str, candidates: Collection[str] = ()) -> list[tuple[str, float]]:
    """Return the candidates, by default all languages, and the probability that a text is in each, best first."""
    tags, text = _tags_by_label(tuple(candidates)), text[:MAX_DETECTION_CHARACTERS]
    scores = [(tags[label], score) for label, score in _load_identifier().rank(text) if label in tags]
    # The detector adds up the features of a text as if they were independent, so its scores grow apart too fast with
    # the length. The square root of the length corrects that. With the factor 0.4, one in a hundred short sentences
    # that reach MIN_PROBABILITY is wrong.
    temperature = 0.4 * math.sqrt(len(text.encode(errors="replace")) or 1)
    weights = [math.exp((score - scores[0][1]) / temperature) for _, score in scores]
    total = sum(weights)
    return [(tag, weight / total) for (tag, _), weight in zip(scores, weights, strict=True)]


def detect(text: str, candidates: Collection[str] = ()) -> str:
    """Return the language of a text. Raises RecordError if it is unsure, or is probably not among the candidates."""
    ranked, ranked_all = rank(text, candidates), rank(text)
    families = {_family(tag) for tag, _ in ranked}
    others = [(tag, probability) for tag, probability in ranked_all if _family(tag) not in families]
    if ranked_all[0][1] == ranked_all[1][1] or not any(map(str.isalpha, text)):
        message = "cannot detect the language"
    elif sum(probability for _, probability in others) >= MIN_PROBABILITY:
        message = f"the language {_describe(others)}"
    elif ranked[0][1] < MIN_PROBABILITY:
        message = f"the language {_describe(ranked)}"
    else:
        return ranked[0][0]
    raise RecordError("unsure_language", message, hint="pass --from LANG")


def detect_or_none(text: str) -> str | None:
    """Return the language of a text, or None if it is unsure."""
    try:
        return detect(text)
    except RecordError:
        return None


def split_sentences(text: str, tag: str | None = None) -> list[str]:
    """Return the sentences of a text, each with the white space after it. No tag: the language is detected."""
    import sentencex

    family = _family(tag or detect_or_none(text) or "en")
    sentences: list[str] = []
    for part in filter(None, PARAGRAPHS.split(text)):  # sentencex loses breaks between the paragraphs of a long text
        plain = ODD_CHARACTERS.sub(" ", part)  # ... and panics at `M<no-break space>.`
        pieces = sentencex.segment(family, plain)
        start = 0
        for piece in pieces if part.strip() and "".join(pieces) == plain else [plain]:
            sentences.append(part[start : start + len(piece)])
            start += len(piece)
    return sentences


def _describe(ranked: list[tuple[str, float]]) -> str:
    (best, probability), *rest = ranked
    if probability >= MIN_PROBABILITY:
        return f"seems to be {english_name(best)}"
    return f"may be {english_name(best)} or {english_name(rest[0][0])}"


@cache
def _language(code: str) -> "Language | None":
    """Return the language of a tag or a tokenizer's code in its shortest form, or None if it is not a language."""
    from langcodes import Language

    try:
        given = Language.get(code).prefer_macrolanguage()
    except ValueError:
        return None
    base = SYNONYMS.get(given.language or "", given.language or "")
    is_private = "qaa" <= base <= "qtz"
    if not re.fullmatch("[a-z]{2,3}", base) or base in NO_LANGUAGE or is_private:
        return None
    usual_scripts = {Language.make(language=base).maximize().script, "Hang" if base == "ko" else None}
    is_implied = base != "zh" and given.script in usual_scripts  # Chinese has two usual scripts.
    script = None if is_implied else given.script
    territory = None if given.territory == "XX" else given.territory
    language = Language.make(language=base, script=script, territory=territory)
    return language if language.is_valid() else None


def _family(tag: str) -> str:
    """Return the language subtag, with one code for Norwegian and its Bokmål."""
    code = tag.split("-")[0]
    return "no" if code == "nb" else code


def _script(language: "Language") -> str | None:
    """Return the given or usual script, or None if it is unknown."""
    from langcodes.data_dicts import LIKELY_SUBTAGS

    # The script that langcodes adds to a language it does not know is that of English.
    is_known = language.script or language.language in LIKELY_SUBTAGS
    return language.maximize().script if is_known else None


def _is_same(wanted: str, known: str) -> bool:
    """Return whether two tags are of one language and, as far as the scripts are known, in one script."""
    one, other = _language(wanted), _language(known)
    if not one or not other or _family(str(one)) != _family(str(other)):
        return False
    scripts = {_script(one), _script(other)}
    return len(scripts) == 1 or None in scripts


@cache
def _tags_by_label(candidates: tuple[str, ...]) -> dict[str, str]:
    """Return the labels of the detector, each with the candidate that it stands for."""
    # Labels of three letters are rare languages, and short texts are wrongly assigned to them.
    labels = {label: str(_language(label)) for label in _load_identifier().labels if len(label) == 2}
    by_family: dict[str, list[str]] = {}
    for tag in candidates or labels.values():
        by_family.setdefault(_family(str(_language(tag))), []).append(tag)
    return {
        label: match(tag, same) or same[0] for label, tag in labels.items() if (same := by_family.get(_family(tag)))
    }


def _find_code(name: str) -> str | None:
    """Return the code of the language that has exactly this name, in English or in the language itself."""
    # langcodes.find accepts any name in any language, and longer text that begins with one, such as "frensh".
    from language_data.names import get_trie_value, load_trie, name_to_code, normalize_name
    from language_data.util import data_filename

    own_code = (name_to_code("language", name) or "").partition("-")[0]
    for code in filter(None, ["en", own_code]):
        path = Path(data_filename(f"trie/{code}/name_to_language.marisa"))
        names = load_trie(str(path)) if path.exists() else {}
        if (key := normalize_name(name)) in names:
            return str(get_trie_value(names, key))
    return None


@cache
def _load_identifier() -> "LanguageIdentifier":
    """Load py3langid's model, without its global state."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)
