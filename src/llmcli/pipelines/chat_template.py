"""Messages -> token IDs, by the chat template of a tokenizer. What messages say stays text, whatever it looks like."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from llmcli import console
from llmcli.compat.templates import limited, response_marks
from llmcli.errors import RecordError, UsageError
from llmcli.job import JsonObject
from llmcli.tasks.fields import FilledTemplate
from llmcli.text import thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmcli.tasks import Messages

LIMIT_S = 2.0
BREAK = "\ue0f1"  # of private use: where a rendered prompt is cut, so that no token is read across
PROBE = "Zebra"  # a message that is found again in the prompt
RESERVED = ("conversation", "messages", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")


class ChatTemplate:
    """The chat template of a tokenizer, which may be any program."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer

    def render(
        self, messages: "Messages", can_think: bool = True, think: bool | None = None, options: JsonObject | None = None
    ) -> str:
        """Return the prompt as text, with breaks. Without `can_think`, thinking is off unless `think` turns it on."""
        think = False if think is None and not can_think else think
        if messages[0]["role"] == "system" and not self._takes_system:
            messages = _move_system(messages)
        messages = [self._break(message, message["role"] == "assistant") for message in messages]
        if think is not None and self._lines:
            role, first = "system" if self._takes_system else "user", messages[0]
            content = [self._lines["on" if think else "off"], *[first["content"]] * (first["role"] == role)]
            messages = [{"role": role, "content": "\n\n".join(content)}, *messages[len(content) - 1 :]]
        switches = {} if think is None else self._switches(think)
        prompt = self._apply(messages, add_generation_prompt=True, **{**switches, **(options or {})})
        if think is not False or thoughts.find_at_end(prompt, self._marks, 1):
            return prompt
        # Some templates begin a thought in any case, and some models need the name of the answer's channel.
        return prompt + self._final if self._final else thoughts.close_thought(prompt, self._marks)

    def check(self, think: bool | None, options: JsonObject) -> None:
        """Raise UsageError for a variable that the template does not have. Warn if `think` changes nothing."""
        for name in options:
            if name in RESERVED or not re.search(rf"""(?<![\w.'"]){re.escape(name)}\b""", self._source):
                raise UsageError(f"--template-option: chat template has no variable {name!r}")
        if think in (None, bool(self._marks)):
            return
        with suppress(RecordError):
            on, off = (self.render([{"role": "user", "content": "x"}], think=value) for value in (True, False))
            if on == off:
                why = "has no thoughts" if think else "cannot turn thoughts off"
                console.warning(f"--{'' if think else 'no-'}think has no effect: the chat template {why}")

    def find_thoughts(self, prompt: str, can_think: bool) -> thoughts.Thoughts | None:
        """Return how thoughts look: with any known marks if the model names none, and only the answer counts."""
        if marks := self._marks or ([] if can_think else thoughts.ALL_MARKS):
            return thoughts.Thoughts(marks, prompt[-thoughts.MARK_LENGTH :], bool(self._marks), can_think)
        return None

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
        between = self._before_answer()
        return between if between.isspace() else ""

    @functools.cached_property
    def _final(self) -> str:
        """The marks that the template writes there if thinking is off."""
        between = self._before_answer(**self._switches(False))
        return between if self._marks and between.strip() else ""

    def _before_answer(self, **settings: object) -> str:
        before = self._try({"user": "x", "assistant": PROBE}, None, **settings).partition(PROBE)[0]
        beginning = self._begin(**settings)
        return before.removeprefix(beginning) if before.startswith(beginning) else ""

    def _begin(self, **settings: object) -> str:
        return self._try({"user": "x"}, None, add_generation_prompt=True, **settings)

    @functools.cached_property
    def end_of_turn(self) -> int | None:
        """The special token that the template writes after an answer, or None."""
        token = self._control.match(self._example.partition(PROBE)[2].lstrip())
        return self._tokenizer.convert_tokens_to_ids(token[0]) if token else None

    @functools.cached_property
    def thought_marks(self) -> dict[int, str]:
        """The special tokens that may mark thoughts."""
        own, tokens = str(self._own_marks), {id: token.content for id, token in self._added if token.special}
        return {id: text for id, text in tokens.items() if thoughts.SPECIAL.search(text) or text in own}

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
    def _marks(self) -> thoughts.Marks:
        names = [self._source, *(token.content for _, token in self._added)]
        return thoughts.find_marks("\n".join(names), self._own_marks)

    @functools.cached_property
    def _own_marks(self) -> list[tuple[str, str]]:
        """Begin and end of thoughts as the tokenizer names them, or else as the template writes or cuts them."""
        if own := response_marks(self._tokenizer):
            return own
        thought = dict.fromkeys(thoughts.FORMATS["fields"], "Yak")
        written = self._try({"user": "x", "assistant": PROBE}, thought).removeprefix(beginning := self._begin())
        begin, _, end = written.partition("Yak")
        begin = "".join((begin.strip() or beginning).split()[-1:])  # The prompt may begin the thought.
        pairs = [(begin, end.partition(PROBE)[0].strip())]
        pairs += [(cut.replace("/", "", 1), cut) for cut in re.findall(thoughts.FORMATS["cut"], self._source)]
        return [pair for pair in pairs if all(pair)]

    def _switches(self, think: bool) -> JsonObject:
        """Return what turns thinking on or off, of the variables that the template has."""
        switches = thoughts.FORMATS["on" if think else "off"]
        if re.search("""["']none["']""", self._source):
            switches = {**switches, "reasoning_effort": "high" if think else "none"}
        return {name: value for name, value in switches.items() if name in self._source}

    @functools.cached_property
    def _lines(self) -> Mapping[str, str] | None:
        """The lines of a system message that turn thinking on and off, if no variable does."""
        on, off = (self._begin(**self._switches(think)) for think in (True, False))
        named = (lines for lines in thoughts.FORMATS["lines"] if re.search(lines["named"], self._source))
        return next(named, None) if on == off else None

    @functools.cached_property
    def _takes_system(self) -> bool:
        return PROBE in self._try({"system": PROBE, "user": "x"})

    @functools.cached_property
    def _example(self) -> str:
        """A conversation with all roles that the template takes, or none if it refuses that."""
        system = {"system": "x"} if self._takes_system else {}
        return self._try({**system, "user": "x", "assistant": PROBE})

    def _try(self, contents: Mapping[str, str], thought: JsonObject | None = None, **settings: object) -> str:
        """Return a conversation as the template writes it, or nothing if it refuses that. `thought` is of the end."""
        messages = [{"role": role, "content": content} for role, content in contents.items()]
        try:
            return self._apply([*messages[:-1], {**messages[-1], **(thought or {})}], **settings)
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
            is_mark = thoughts.SPECIAL.search(token[0]) or any(token[0] in pair for pair in self._own_marks)
            return token[0] if is_answer and is_mark else BREAK.join(token[0]) + BREAK

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
