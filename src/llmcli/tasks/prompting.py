"""Prompts for tasks that a language model does by instruction: prompts.toml, and the user's own file over it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from llmcli.errors import UsageError
from llmcli.job import Job, JsonObject
from llmcli.models import registry
from llmcli.tasks import Prompt, TaskModel, data_files
from llmcli.tasks.templates import check_template, fill_template

FILE = "prompts.toml"
GREEDY = {"do_sample": False, "max_new_tokens": 256}
KEYS: dict[str, type] = {
    **dict.fromkeys(("system", "user", "prompt"), str),
    **dict.fromkeys(("max_new_tokens", "part", "condense"), int),
    **dict.fromkeys(("examples", "stop", "unknown"), list),
    "options": dict,
}


@dataclass(frozen=True, slots=True)
class TaskPrompt:
    """The prompt of a task for one model.

    Attributes:
        template: The user message for a chat model, or the text that a base model continues.
        system: The system message, if any.
        examples: Fields with an `answer`, shown before the fields of the record (few-shot prompting).
        settings: GenerationConfig values.
        is_chat: Whether the prompt is a list of messages.
        part_tokens: Maximum number of tokens of each part of a text that is too long.
        condensed_tokens: Number of tokens to which a long text is condensed first, for models that need it.
        unknown_answers: Answers that mean that the text does not contain the answer.
    """

    template: str
    system: str | None
    examples: Sequence[Mapping[str, str]]
    settings: JsonObject
    is_chat: bool
    part_tokens: int | None
    condensed_tokens: int | None
    unknown_answers: Sequence[str]

    def render(self, fields: JsonObject, examples: Sequence[Mapping[str, str]] | None = None) -> Prompt:
        """Return the prompt for a record: messages for a chat model, text for a base model.

        Raises:
            RecordError: The record lacks a field that the template names.
        """
        shots = [
            (fill_template(self.template, {**fields, **example}), example["answer"])
            for example in examples or self.examples
        ]
        request = fill_template(self.template, fields)
        if not self.is_chat:
            return "".join(f"{question} {answer}\n\n" for question, answer in shots) + request
        messages = [{"role": "system", "content": fill_template(self.system, fields)}] if self.system else []
        for question, answer in shots:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": request}]

    @property
    def is_one_line(self) -> bool:
        """Whether a newline ends the answer, so that a text is processed line by line."""
        return "\n" in self.settings.get("stop_strings", ())


def prompt_for(job: Job, model: TaskModel) -> TaskPrompt:
    """Return the prompt of the job's task for its model.

    The parameter `prompt` of the job, a template, replaces the messages and the examples of prompts.toml.
    """
    is_chat, styles = model.is_chat, load_prompts()[job.task]
    table = styles["chat" if is_chat else "base"] | styles.get(job.model, {})
    settings = {"max_new_tokens": table["max_new_tokens"], **table.get("options", {})}
    own = job.parameters.get("prompt")
    if (stop := table.get("stop")) and not (own and is_chat):
        settings["stop_strings"] = stop
    return TaskPrompt(
        template=own or table["user" if is_chat else "prompt"],
        system=None if own else table.get("system"),
        examples=() if own else table.get("examples", ()),
        settings=settings,
        is_chat=is_chat,
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
    prompts: dict[str, Any] = data_files.read_package_file(FILE)
    path, own = data_files.user_file(FILE), data_files.read_user_file(FILE)
    for task, styles in data_files.check_table(own, dict.fromkeys(prompts, dict), str(path)).items():
        assert isinstance(styles, dict)
        for style, table in styles.items():
            checked = _check_style(style, table, f"{path}: [{task}.{style}]")
            prompts[task][style] = prompts[task].get(style, {}) | checked
    return prompts


def _check_style(style: str, table: object, source: str) -> dict[str, Any]:
    """Return a table of the user's, after checking it."""
    if style not in ("chat", "base") and "/" not in style and style not in registry.models():
        raise UsageError(f"{source}: unknown style, expected chat, base or the name of a model")
    checked: dict[str, Any] = data_files.check_table(table, KEYS, source)
    for key in checked.keys() & {"user", "prompt"}:
        check_template(checked[key], f"{source}: {key}")
    if not all(isinstance(example, dict) and "answer" in example for example in checked.get("examples", ())):
        raise UsageError(f"{source}: each example must be a table with an answer")
    if not all(isinstance(text, str) for key in ("stop", "unknown") for text in checked.get(key, ())):
        raise UsageError(f"{source}: stop and unknown must be lists of strings")
    return checked
