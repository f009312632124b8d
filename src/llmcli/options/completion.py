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


def _languages() -> list[str]:
    from llmcli.tasks import translate

    return sorted({tag for sentence in translate.load_examples() for tag in sentence})


models = _complete_from(lambda: [name for name in registry.models() if "{" not in name])
languages = _complete_from(_languages)
presets = _complete_from(load_presets)
devices = _complete_from(lambda: ("auto", "cpu", "cuda", "mps", "xpu"))
