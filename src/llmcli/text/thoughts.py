"""Thoughts: what some models write before an answer, between marks such as <think> and </think>."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmcli import config, console
from llmcli.errors import NO_ANSWER, RecordError

MARK_LENGTH = 40  # characters: more than a mark has
FORMATS = config.read_toml(Path(__file__).with_name("thoughts.toml"))


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(f"(?is){pattern.replace('TAG', FORMATS['tag'])}")


SPECIAL, CHANNEL, LONE_END = (_compile(FORMATS[name]) for name in ("special", "channel", "lone_end"))
MARK_AT_END = re.compile(r"(?:[<◁][^<◁\s]*|\[/\w*\]?)+\Z|assistant\Z")  # maybe the beginning of one
WRAPPED = _compile(f"{FORMATS['wrapper']}(.*?){FORMATS['wrapper_end']}")  # an answer after a thought
Marks = Sequence[tuple[re.Pattern[str], re.Pattern[str]]]


def find_marks(names: str | None = None, own: Iterable[tuple[str, str]] = ()) -> Marks:
    """Return begin and end of thoughts: all that are known, or those that a text has, and a model's `own` kinds."""
    kinds = [(_compile(kind["begin"]), _compile(kind["end"])) for kind in FORMATS["marks"]]
    marks = []
    for first, last in own:
        if not any(begin.search(first) and end.search(last) for begin, end in kinds):
            marks.append((_compile(re.escape(first)), _compile(re.escape(last))))
        names = f"{names or ''}\n{first}\n{last}"
    for begin, end in kinds:
        found = {mark[0].replace("/", "", 1) for side in (begin, end) for mark in side.finditer(names or "")}
        exact = [re.escape(mark) for mark in sorted(found) if mark and begin.fullmatch(mark)]
        if found or names is None:
            marks.append((_compile("|".join(exact)) if exact else begin, end))
    return marks


ALL_MARKS = find_marks()


def find_at_end(prompt: str, marks: Marks, side: int) -> tuple[str, re.Pattern[str]] | None:
    """Return the begin (side 0) or the end (side 1) of a thought that a prompt ends with, and what ends the thought."""
    tail = prompt[-MARK_LENGTH:].rstrip()
    found = ((mark[0], kind[1]) for kind in marks for mark in kind[side].finditer(tail) if mark.end() == len(tail))
    return next(found, None)


def close_thought(prompt: str, marks: Marks) -> str:
    """Return a prompt with the end of the thought that it begins."""
    if not (opened := find_at_end(prompt, marks, 0)):
        return prompt
    mark, end = opened
    literal = re.sub(r"\(\?is\)|\\", "", end.pattern)
    ends = (f"{mark[0]}/{mark[1:]}", mark.replace("START", "END"), mark.replace("begin", "end"), literal)
    return f"{prompt.rstrip()}\n\n{next(filter(end.fullmatch, ends), literal)}\n\n"


@dataclass(frozen=True, slots=True)
class Thoughts:
    """The thoughts that may be before the answer to a prompt that ends with `tail`.

    `is_sure` says whether the model has these marks. If not, or after another thought, what looks like a thought is the
    answer if nothing follows. Without `can_think`, it never is; and it may lack its begin if the model is sure.
    """

    marks: Marks
    tail: str = ""
    is_sure: bool = True
    can_think: bool = True

    def find(self, text: str, reason: str | None = None) -> tuple[list[str], int, bool]:
        """Return the thoughts, their end, and whether the answer begins there. Without a reason, the text goes on."""
        thoughts, start, (_, end) = list[str](), 0, find_at_end(self.tail, self.marks, 0) or ("", None)
        is_closed = bool(find_at_end(self.tail, self.marks, 1))
        may_answer = self.can_think and (is_closed or not self.is_sure)
        while True:
            before = start
            if not end:
                before = len(text) - len(text[start:].lstrip())
                begun = ((begin.match(text, before), end) for begin, end in self.marks)
                begin, end = next((pair for pair in begun if pair[0]), (None, None))
                if not begin or not end:
                    break
                start = begin.end()
            close = end.search(text, start)
            is_last = reason == "stop" and not (close and text[close.end() :].strip())
            if is_last and may_answer and not text.startswith("<|", before):
                break
            thoughts.append(CHANNEL.sub("\n\n", text[start : close.start() if close else None]).strip())
            if not close:
                return thoughts, len(text), False
            start, end, may_answer = close.end(), None, self.can_think
        start = before if thoughts or is_closed else 0
        lone = LONE_END.search(text, start) if self.is_sure and not self.can_think else None
        if lone and not any(begin.search(text, start, lone.start()) for begin, _ in self.marks):
            thoughts.append(text[start : lone.start()].strip())
            start = lone.end()
        rest = text[start : start + 2 * MARK_LENGTH].lstrip()
        is_open = len(rest) < MARK_LENGTH and (not rest[:1].isalnum() or rest[0] in "hH")  # may become a mark
        return thoughts, start, reason is not None or not is_open

    def locate(self, text: str, reason: str) -> tuple[list[str], int, int | None]:
        """Return the thoughts, and where the answer begins and ends. The end is None if there is no answer."""
        thoughts, start, has_begun = self.find(text, reason)
        if (thoughts or find_at_end(self.tail, self.marks, 1)) and (wrapped := WRAPPED.fullmatch(text, start)):
            return thoughts, *wrapped.span(1)
        return thoughts, start, len(text) if has_begun else None

    def split(self, text: str, reason: str) -> tuple[str, str, str]:
        """Return answer, thoughts and finish reason of a text, `length` without an answer, or raise RecordError."""
        thoughts, start, end = self.locate(text, reason)
        answer, reason = text[start:end], "length" if end is None else reason
        if thoughts and not answer and reason == "length" and not self.can_think:
            raise RecordError("missing_answer", NO_ANSWER)
        return answer, "\n\n".join(filter(None, thoughts)), reason


class ThoughtFilter:
    """Passes on the answer of a text that comes in pieces, and shows the thoughts before it."""

    def __init__(self, thoughts: Thoughts | None) -> None:
        self._thoughts, self._text, self._shown = thoughts, "", ""

    def feed(self, piece: str) -> str:
        if not self._thoughts:
            return piece
        self._text += piece
        thoughts, end, has_begun = self._thoughts.find(self._text)
        thought = "\n\n".join(filter(None, thoughts))
        thought = thought if has_begun else MARK_AT_END.sub("", thought).rstrip()
        if thought != self._shown and thought.startswith(self._shown):
            console.show_thought(thought.removeprefix(self._shown))
            self._shown = thought
        # Neither what is wrapped nor a thought that may lack its begin is known before it is complete.
        is_late = self._thoughts.is_sure and not self._thoughts.can_think
        if not has_begun or is_late or WRAPPED.match(self._text, end):
            return ""
        self._thoughts = None
        return self._text[end:]
