"""Shell completion of option values. The shell asks at each key press, so nothing heavy is imported."""

from collections.abc import Callable, Iterable
from contextlib import suppress

from llmcli.errors import LlmcliError
from llmcli.models import registry
from llmcli.tasks.prompting import load_presets


def _complete_from(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        with suppress(LlmcliError):  # A configuration file is broken: the command itself will report it.
            return [name for name in names() if name.startswith(incomplete)]
        return []

    return complete


def _languages() -> Iterable[str]:
    from llmcli.tasks import translate

    return sorted({tag for sentence in translate.load_examples() for tag in sentence})


def _language_names() -> list[str]:
    from language_data.name_data import CODE_TO_NAMES

    codes = [code for code in CODE_TO_NAMES if len(code) == 2 and code.islower()]
    return sorted(CODE_TO_NAMES[code]["en"].lower() for code in codes if "en" in CODE_TO_NAMES[code])


def languages(incomplete: str) -> list[str]:
    """Return the tags that begin like this, or else the names, which take longer to import."""
    return _complete_from(_languages)(incomplete) or _complete_from(_language_names)(incomplete.lower())


models = _complete_from(lambda: [name for name in registry.models() if "{" not in name])
presets = _complete_from(load_presets)
devices = _complete_from(lambda: ("auto", "cpu", "cuda", "mps", "xpu"))
