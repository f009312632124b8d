"""The private names of langcodes, language_data and py3langid that llmcli uses, and no other module may."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier


def find_code(name: str) -> str | None:
    """Return the code of the language that has exactly this name, in English or in the language itself.

    langcodes.find accepts any name in any language, and longer text that begins with one, such as "frensh".
    """
    from language_data.names import get_trie_value, load_trie, name_to_code, normalize_name
    from language_data.util import data_filename

    own_code = (name_to_code("language", name) or "").partition("-")[0]
    for code in filter(None, ["en", own_code]):
        path = Path(data_filename(f"trie/{code}/name_to_language.marisa"))
        names = load_trie(str(path)) if path.exists() else {}
        if (key := normalize_name(name)) in names:
            return str(get_trie_value(names, key))
    return None


def names_by_code() -> Mapping[str, Mapping[str, str]]:
    """Return the names of all languages: by the code of the language, then by the code of the name's language."""
    from language_data.name_data import CODE_TO_NAMES

    names: Mapping[str, Mapping[str, str]] = CODE_TO_NAMES
    return names


def has_known_script(code: str) -> bool:
    """Return whether langcodes knows the usual script of a language. If not, `maximize` returns that of English."""
    from langcodes.data_dicts import LIKELY_SUBTAGS

    return code in LIKELY_SUBTAGS


@cache
def load_identifier() -> "LanguageIdentifier":
    """Load py3langid's model, without its global state."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)
