"""Prompts for tasks that a language model does by instruction: prompts.toml, overlaid by the user's own file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmcli import config
from llmcli.errors import UsageError
from llmcli.job import Job
from llmcli.models import registry
from llmcli.tasks.fields import check, fill

HERE = Path(__file__).parent
GREEDY = {"do_sample": False, "max_new_tokens": 256}
KEYS = {
    "system": str,
    "user": str,
    "prompt": str,
    "examples": list,
    "max_new_tokens": int,
    "stop": list,
    "options": dict,
    "part": int,
    "condense": int,
    "unknown": list,
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """How a task is put to a model: one that chats gets messages, a base model a text to continue. `examples` are
    fields with an `answer`, shown before the record's own."""

    template: str
    system: str | None
    examples: Sequence[Mapping[str, str]]
    settings: Mapping[str, Any]  # GenerationConfig values
    is_chat: bool
    part: int | None  # tokens of a part of a text that is too long
    condense: int | None  # tokens that such a text is brought to, by sentences of its own, before it goes in
    unknown: Sequence[str]  # answers that say that there is none

    def __call__(
        self, fields: Mapping[str, Any], examples: Sequence[Mapping[str, str]] | None = None
    ) -> str | list[dict[str, str]]:
        """The pipeline's input. Raises RecordError for a field that the template names and the record lacks."""
        shown = [({**fields, **example}, example["answer"]) for example in examples or self.examples]
        if not self.is_chat:
            before = "".join(f"{fill(self.template, each)} {answer}\n\n" for each, answer in shown)
            return before + fill(self.template, fields)
        messages = [{"role": "system", "content": fill(self.system, fields)}] if self.system else []
        for each, answer in shown:
            messages.append({"role": "user", "content": fill(self.template, each)})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": fill(self.template, fields)}]

    @property
    def is_one_line(self) -> bool:
        """Whether a line end is the end of the answer, so that a text has to go in line by line."""
        return "\n" in self.settings.get("stop_strings", ())


def prompt_for(job: Job, pipeline: Any) -> Prompt:
    """The prompt of the job's task for that model; the job's own template takes the place of all that is said there."""
    is_chat = pipeline.is_chat
    styles = tables()[job.task]
    table = styles["chat" if is_chat else "base"] | styles.get(job.model, {})
    settings = {"max_new_tokens": table["max_new_tokens"], **table.get("options", {})}
    own = job.parameters.get("prompt")
    if (stop := table.get("stop")) and not (own and is_chat):
        settings["stop_strings"] = stop
    return Prompt(
        template=own or table["user" if is_chat else "prompt"],
        system=None if own else table.get("system"),
        examples=() if own else table.get("examples", ()),
        settings=settings,
        is_chat=is_chat,
        part=table.get("part"),
        condense=table.get("condense"),
        unknown=table.get("unknown", ()),
    )


def parameters(job: Job, pipeline: Any) -> Mapping[str, Any]:
    """A Way's `settings`: the prompt's."""
    return prompt_for(job, pipeline).settings


def presets() -> dict[str, Any]:
    """The tables of presets.toml, the user's own over the package's."""
    own_file = config.config_file().with_name("presets.toml")
    return config.read_toml(HERE / "presets.toml") | (config.read_toml(own_file) if own_file.exists() else {})


def preset(name: str | None) -> Mapping[str, Any]:
    """That table of presets.toml as `options`, and a `frame`: the job's parameters prompt and begins. Empty for None.
    Raises UsageError that lists the presets there are."""
    if name is None:
        return {}
    found = presets()
    if name not in found:
        hint = "presets: " + ", ".join(found)
        raise UsageError(f"unknown preset {name!r}{config.did_you_mean(name, found)}", hint=hint)
    where = f"{config.config_file().with_name('presets.toml')}: [{name}]"
    _check_table(found[name], {"description": str, "prompt": str, "begins": str, "options": dict}, where)
    if "prompt" not in found[name]:
        raise UsageError(f"{where}: needs a prompt", hint='like prompt = "A fable about {text}."')
    check(found[name]["prompt"] + found[name].get("begins", ""), f"{where}: prompt")
    begins = found[name].get("begins", "")
    frame = {"prompt": found[name]["prompt"] + begins, "begins": begins}
    return {"options": found[name].get("options", {}), "frame": frame}


@cache
def tables() -> Mapping[str, Any]:
    """Task -> style -> the prompt's table. Raises UsageError for a table of the user's that makes no sense."""
    found = config.read_toml(HERE / "prompts.toml")
    own_file = config.config_file().with_name("prompts.toml")
    for task, styles in (config.read_toml(own_file) if own_file.exists() else {}).items():
        _check_table({task: styles}, dict.fromkeys(found, dict), str(own_file))
        for style, table in styles.items():
            where = f"{own_file}: [{task}.{style}]"
            if style not in ("chat", "base") and "/" not in style and style not in registry.models():
                raise UsageError(f"{where}: a style is chat or base, or the name of a model")
            _check_table(table, KEYS, where)
            for key in table.keys() & {"user", "prompt"}:
                check(table[key], f"{where}: {key}")
            if not all(isinstance(each, dict) and "answer" in each for each in table.get("examples", ())):
                raise UsageError(f"{where}: an example has fields and an answer")
            if not all(isinstance(text, str) for key in ("stop", "unknown") for text in table.get(key, ())):
                raise UsageError(f"{where}: stop and unknown are lists of texts")
            found[task][style] = found[task].get(style, {}) | table
    return found


def _check_table(table: Any, types: Mapping[str, type], where: str) -> None:
    """Raises UsageError for a key that nothing reads, or a value of another type."""
    if not isinstance(table, dict):
        raise UsageError(f"{where} is not a table")
    config.check_keys(table, types, where)
    for key, value in table.items():
        if not isinstance(value, types[key]) or isinstance(value, bool):
            raise UsageError(f"{where}: {key} must be of type {types[key].__name__}")
