"""Prompts and writing presets: the TOML files of this package, and the user's own next to config.toml over them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmcli import config
from llmcli.errors import UsageError
from llmcli.job import Job, JsonObject
from llmcli.models import registry
from llmcli.tasks import Prompt, TaskModel
from llmcli.tasks.fields import FilledTemplate, check_template, fill_template

GREEDY = {"do_sample": False, "max_new_tokens": 256}
PRESET_KEYS = {"description": str, "prompt": str, "begins": str, "options": dict}
PROMPT_KEYS: dict[str, Any] = {
    **dict.fromkeys(("style", "system", "user", "prompt"), str),
    **dict.fromkeys(("max_new_tokens", "part", "condense"), int),
    **dict.fromkeys(("stop", "unknown"), list[str]),
    "examples": list,
    "options": dict,
}


@dataclass(frozen=True, slots=True)
class TaskPrompt:
    """The prompt of a task for one model.

    Attributes:
        template: The user message for a chat model, or the text that a base model continues.
        examples: Fields with an `answer`, shown before the fields of the record (few-shot prompting).
        settings: GenerationConfig values.
        part_tokens: Maximum number of tokens of each part of a text that is too long.
        condensed_tokens: Number of tokens to which a long text is condensed first, for models that need it.
        unknown_answers: Answers that mean that the text does not contain the answer.
    """

    is_chat: bool
    template: str
    system: str | None
    examples: Sequence[Mapping[str, str]]
    settings: JsonObject
    part_tokens: int | None
    condensed_tokens: int | None
    unknown_answers: Sequence[str]

    def render(self, fields: JsonObject, examples: Sequence[Mapping[str, str]] = ()) -> Prompt:
        """Return the prompt for a record: messages for a chat model, text for a base model."""
        examples = examples or self.examples
        shots = [(fill_template(self.template, {**fields, **shot}), shot["answer"]) for shot in examples]
        request = fill_template(self.template, fields)
        if not self.is_chat:
            before = (piece for question, answer in shots for piece in (*question.pieces, f" {answer}\n\n", ""))
            return FilledTemplate([*before, *request.pieces])
        messages = [{"role": "system", "content": fill_template(self.system, fields)}] if self.system else []
        for question, answer in shots:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": request}]


def prompt_for(job: Job, model: TaskModel) -> TaskPrompt:
    """Return the prompt of the job's task for its model. The job's parameter `prompt` is a template in its place."""
    styles, own = load_prompts()[job.task], job.parameters.get("prompt")
    style = styles.get(job.model, {})
    is_chat = model.is_chat and (own is not None or style.get("style") != "base")
    table = styles["chat" if is_chat else "base"] | style
    settings = {"max_new_tokens": table.get("max_new_tokens"), **table.get("options", {})}
    if (stop := table.get("stop")) and not (own and is_chat):
        settings["stop_strings"] = stop
    return TaskPrompt(
        is_chat=is_chat,
        template=own or table["user" if is_chat else "prompt"],
        system=None if own else table.get("system"),
        examples=() if own else table.get("examples", ()),
        settings=settings,
        part_tokens=table.get("part"),
        condensed_tokens=table.get("condense"),
        unknown_answers=table.get("unknown", ()),
    )


def prompt_settings(job: Job, model: TaskModel) -> JsonObject:
    """Return the GenerationConfig values of the job's prompt, as the `parameters` of a Strategy."""
    return prompt_for(job, model).settings


@cache
def load_prompts() -> Mapping[str, Any]:
    """Return prompts.toml by task and style, under the user's own. Raises UsageError if that file is invalid."""
    prompts, own, path = read_tables("prompts.toml")
    for task, styles in config.check_table(own, dict.fromkeys(prompts, dict), str(path)).items():
        for style, table in styles.items():
            checked = _check_style(style, table, f"{path}: [{task}.{style}]")
            prompts[task][style] = prompts[task].get(style, {}) | checked
    return prompts


def load_presets() -> dict[str, Any]:
    """Return the tables of all writing presets by name."""
    presets, own, _ = read_tables("presets.toml")
    return presets | own


def load_preset(name: str | None) -> tuple[dict[str, str], JsonObject]:
    """Return the job's parameters of a preset, `prompt` and the `begins` of it that is printed, and its options."""
    if name is None:
        return {}, {}
    presets = load_presets()
    if name not in presets:
        did_you_mean = config.did_you_mean(name, presets)
        raise UsageError(f"unknown preset {name!r}{did_you_mean}", hint=f"presets: {', '.join(presets)}")
    source = f"{config.config_file().with_name('presets.toml')}: [{name}]"
    table = config.check_table(presets[name], PRESET_KEYS, source)
    if "prompt" not in table:
        raise UsageError(f"{source} requires a prompt", hint='e.g. prompt = "A fable about {text}."')
    begins = table.get("begins", "")
    prompt = table["prompt"] + begins
    check_template(prompt, f"{source}: prompt")
    return {"prompt": prompt, "begins": begins}, table.get("options", {})


def read_tables(name: str) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Return the tables of a TOML file of this package, those of the user's file of that name, and its path."""
    path = config.config_file().with_name(name)
    return config.read_toml(Path(__file__).with_name(name)), config.read_toml(path) if path.exists() else {}, path


def _check_style(style: str, table: object, source: str) -> dict[str, Any]:
    if style not in ("chat", "base") and "/" not in style and style not in registry.models():
        raise UsageError(f"{source}: unknown style, expected chat, base or the name of a model")
    checked = config.check_table(table, PROMPT_KEYS, source)
    for key in checked.keys() & {"user", "prompt"}:
        check_template(checked[key], f"{source}: {key}")
    if not all(isinstance(example, dict) and "answer" in example for example in checked.get("examples", ())):
        raise UsageError(f"{source}: each example must be a table with an answer")
    return checked
