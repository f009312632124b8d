"""Presets of `llmcli generate --preset`: presets.toml, and the user's own file over it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmcli.config import did_you_mean
from llmcli.errors import UsageError
from llmcli.tasks import data_files
from llmcli.tasks.templates import check_template

FILE = "presets.toml"
KEYS = {"description": str, "prompt": str, "begins": str, "options": dict}


@dataclass(frozen=True, slots=True)
class Preset:
    """A kind of fiction: parameters of the job (`prompt`, and `begins`, the end of it that is printed), and options."""

    parameters: dict[str, str] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)


def load_presets() -> dict[str, object]:
    """Return the tables of all presets by name."""
    return data_files.read_package_file(FILE) | data_files.read_user_file(FILE)


def load_preset(name: str | None) -> Preset:
    """Return a preset, which is empty for None. Raises UsageError if it is unknown, or the user's file is invalid."""
    if name is None:
        return Preset()
    presets = load_presets()
    if name not in presets:
        raise UsageError(f"unknown preset {name!r}{did_you_mean(name, presets)}", hint=f"presets: {', '.join(presets)}")
    source = f"{data_files.user_file(FILE)}: [{name}]"
    table = data_files.check_table(presets[name], KEYS, source)
    if "prompt" not in table:
        raise UsageError(f"{source} requires a prompt", hint='e.g. prompt = "A fable about {text}."')
    begins, options = str(table.get("begins", "")), table.get("options", {})
    prompt = f"{table['prompt']}{begins}"
    check_template(prompt, f"{source}: prompt")
    assert isinstance(options, dict)
    return Preset({"prompt": prompt, "begins": begins}, options)
