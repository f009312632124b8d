"""What a shell offers for a value that is being typed. It asks at each press of the key: nothing heavy is imported."""

from collections.abc import Callable, Iterable
from contextlib import suppress

from llmcli.errors import LlmcliError
from llmcli.models import registry
from llmcli.tasks.presets import load_presets


def _offered(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Of the names, those that begin with what stands there. Where a file of the user's is broken, none: the command
    itself will say so."""

    def complete(incomplete: str) -> list[str]:
        with suppress(LlmcliError):
            return [name for name in names() if name.startswith(incomplete)]
        return []

    return complete


def _languages() -> list[str]:
    """Common ones: those that there are example sentences in."""
    from llmcli.tasks import translate

    return sorted({tag for sentence in translate.load_examples() for tag in sentence})


models = _offered(lambda: [name for name in registry.models() if "{" not in name])
languages = _offered(_languages)
presets = _offered(load_presets)
devices = _offered(lambda: ("auto", "cpu", "cuda", "mps", "xpu"))
