"""Messages -> token IDs, by the chat template of a tokenizer. What messages say stays text, whatever it looks like."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmcli.compat.templates import limited
from llmcli.errors import RecordError
from llmcli.tasks.fields import FilledTemplate
from llmcli.text.thoughts import OPENING, SPECIAL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmcli.tasks import Messages

LIMIT_S = 2.0
BREAK = "\ue0f1"  # of private use: where a rendered prompt is cut, so that no token is read across
PROBE = "Zebra"  # a message that is found again in the prompt
# What turns thinking off, as templates name it. Each template reads only the names that it knows.
SWITCHES = ("enable_thinking", "thinking", "use_thinking", "enable_reasoning", "reasoning", "think")
THINKING_OFF = {**dict.fromkeys(SWITCHES, False), "disable_thinking": True, "thinking_budget": 0}


class ChatTemplate:
    """The chat template of a tokenizer, which may be any program."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer

    def render(self, messages: "Messages", *, can_think: bool = True) -> str:
        """Return the prompt as text, with breaks. Without `can_think`, thinking is off if the model has a switch."""
        if messages[0]["role"] == "system" and not self._takes_system:
            messages = _move_system(messages)
        messages = [self._break(message, message["role"] == "assistant") for message in messages]
        switches = {} if can_think else self._switches
        prompt = self._apply(messages, add_generation_prompt=True, **switches)
        if not can_think and (opening := OPENING.search(prompt)):  # The template begins a thought in any case.
            prompt += f"\n</{opening[1]}>\n\n"
        return prompt

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of a text for a model that continues it. A template's own text may have control tokens."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        if isinstance(text, FilledTemplate) and self._control.search("\0".join(text.pieces[::2])):
            head = [token for token in ids[:1] if token == self._tokenizer.bos_token_id]
            ids = self.encode(self._break(text, is_answer=False))
            return ids if ids[:1] == head else head + ids
        return ids

    def encode(self, prompt: str) -> list[int]:
        """Return the tokens of a rendered prompt."""
        first, *pieces = prompt.split(BREAK)
        ids, newline = self._tokenize(first), self._tokenize("\n") if pieces else []
        for piece in filter(None, pieces):
            # SentencePiece puts a space before the beginning of a text, but not after a newline.
            new = self._tokenize(f"\n{piece}")
            ids += new[len(newline) :] if new[: len(newline)] == newline else self._tokenize(piece)
        return ids

    @functools.cached_property
    def answer_space(self) -> str:
        """The white space that the template writes between the beginning of an answer's turn and the answer."""
        before, beginning = self._try(user="x", assistant=PROBE).partition(PROBE)[0], self._try(True, user="x")
        space = before.removeprefix(beginning)
        return space if before.startswith(beginning) and space.isspace() else ""

    @functools.cached_property
    def end_of_turn(self) -> int | None:
        """The special token that the template writes after an answer, or None."""
        token = self._control.match(self._example.partition(PROBE)[2].lstrip())
        return self._tokenizer.convert_tokens_to_ids(token[0]) if token else None

    @functools.cached_property
    def thought_marks(self) -> dict[int, str]:
        """The special tokens that may mark thoughts."""
        return {id: token.content for id, token in self._added if token.special and SPECIAL.search(token.content)}

    def _apply(self, messages: "Messages", **settings: object) -> str:
        try:
            with limited(LIMIT_S):
                prompt: str = self._tokenizer.apply_chat_template(messages, tokenize=False, **settings)
                return prompt
        except (TimeoutError, MemoryError) as exc:
            what = f"longer than {LIMIT_S:g} seconds" if isinstance(exc, TimeoutError) else "too much memory"
            raise RecordError("bad_messages", f"chat template takes {what}") from exc
        except Exception as exc:  # A template is a program, and may raise anything.
            raise RecordError("bad_messages", f"chat template rejected the messages: {exc}") from exc

    @functools.cached_property
    def _source(self) -> str:
        try:
            return str(self._tokenizer.get_chat_template())
        except Exception:  # Rendering will say what is wrong.
            return ""

    @functools.cached_property
    def _switches(self) -> dict[str, object]:
        effort = "none" if re.search("""["']none["']""", self._source) else "low"
        switches = {**THINKING_OFF, "reasoning_effort": effort}
        return {name: value for name, value in switches.items() if name in self._source}

    @functools.cached_property
    def _takes_system(self) -> bool:
        return PROBE in self._try(system=PROBE, user="x")

    @functools.cached_property
    def _example(self) -> str:
        """A conversation with all roles that the template takes, or none if it refuses that."""
        return self._try(False, **({"system": "x"} if self._takes_system else {}), user="x", assistant=PROBE)

    def _try(self, begins_answer: bool = False, /, **messages: str) -> str:
        conversation = [{"role": role, "content": content} for role, content in messages.items()]
        try:
            return self._apply(conversation, add_generation_prompt=begins_answer)
        except RecordError:
            return ""

    @functools.cached_property
    def _added(self) -> list[tuple[int, Any]]:
        return [*getattr(self._tokenizer, "added_tokens_decoder", {}).items()]  # Mistral's own tokenizer has none.

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        """Special tokens and, as templates use them like these, other added tokens that the template writes."""
        written = self._source + self._example
        tokens = [token for _, token in self._added if token.special or token.content in written]
        names = {name for token in tokens for name in (token.content, self._normalize(token.content))}
        longest_first = sorted((name for name in names if len(name.strip()) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @functools.cached_property
    def _normalize(self) -> Callable[[str], str]:
        """What the tokenizer does to a text before it looks for added tokens."""
        normalizer = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "normalizer", None)
        return normalizer.normalize_str if normalizer and any(token.normalized for _, token in self._added) else str

    def _break(self, value: Any, is_answer: bool) -> Any:
        """Return a message with breaks in what would be control tokens; an answer may have thoughts."""

        def split(token: re.Match[str]) -> str:
            return token[0] if is_answer and SPECIAL.search(token[0]) else BREAK.join(token[0]) + BREAK

        if isinstance(value, FilledTemplate):
            return "".join(self._break(piece, is_answer) if i % 2 else piece for i, piece in enumerate(value.pieces))
        if isinstance(value, str):
            text = value.replace(BREAK, "")
            normalized = self._normalize(text)
            if normalized != text and len(self._control.findall(normalized)) > len(self._control.findall(text)):
                text = normalized
            return self._control.sub(split, text)
        if isinstance(value, Mapping):
            return {key: item if key == "role" else self._break(item, is_answer) for key, item in value.items()}
        return [self._break(item, is_answer) for item in value] if isinstance(value, list) else value

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        return ids


def _move_system(messages: "Messages") -> Sequence[Mapping[str, str]]:
    """Put the system message into the first user message, for a template that refuses or drops it."""
    system, *others = messages
    if others and others[0]["role"] == "user":
        return [{**others[0], "content": f"{system['content']}\n\n{others[0]['content']}"}, *others[1:]]
    return [{**system, "role": "user"}, *others]
