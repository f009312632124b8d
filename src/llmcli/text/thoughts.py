"""Thoughts: what some models write before an answer, between marks such as <think> and </think>."""

import re
from collections.abc import Callable

from llmcli.errors import RecordError

TAGS = ("think", "thinking", "thought", "thoughts", "reasoning", "reflection", "seed:think")
MARKS = (
    *((f"<{tag}>", f"</{tag}>") for tag in TAGS),
    ("[think]", "[/think]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|start_thinking|>", "<|end_thinking|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
    ("<|channel|>commentary", "<|channel|>final<|message|>"),
    ("here is my thought process:", "here is my response:"),
)
WRAPPERS = (  # of the answer itself
    ("<answer>", "</answer>"),
    ("<response>", "</response>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<|start_response|>", "<|end_response|>"),
    ("<|channel|>final<|message|>", ""),
)
LONE_END = re.compile(r"(</think(ing)?>|\[/think\]|◁/think▷)[ \t]*(\n|\Z)")  # of a thought that began in the prompt
OPENING = re.compile(rf"<({'|'.join(TAGS)})>\s*\Z")  # at the end of a prompt
SPECIAL = re.compile(r"(?i)think|thought|channel|<\|message\|>|inner_|response|solution")  # tokens that make marks


def find_answer(text: str) -> int | None:
    """Return where the answer begins after leading thoughts: 0 if there are none, None if they have not ended."""
    lower, begin = text.lower() if len(text.lower()) == len(text) else text, 0
    if (lone := LONE_END.search(lower)) and not _find_mark(lower, MARKS):
        begin = lone.end()
    while mark := _find_mark(lower[begin:], MARKS):
        end = lower.find(mark[1], begin)
        if end < 0:
            return None
        begin = end + len(mark[1])
    if mark := _find_mark(lower[begin:], WRAPPERS):
        begin = lower.index(mark[0], begin) + len(mark[0])
    return begin + len(text[begin:]) - len(text[begin:].lstrip()) if begin else 0


def may_begin_thought(text: str) -> bool:
    """Return whether a text that goes on is a thought, or may turn out to be one."""
    begin = text.lower().lstrip()
    return find_answer(text) is None or any(mark.startswith(begin) for mark, _ in (*MARKS, *WRAPPERS))


def cut_thought(text: str, finish_reason: str) -> str:
    """Return the answer without the thought before it. Raises RecordError if the model has come to no answer."""
    begin = find_answer(text)
    answer = "" if begin is None else text[begin:]
    if begin is None or (begin and finish_reason == "length" and not answer.strip()):
        message = "model did not finish its thoughts, so there is no answer"
        raise RecordError("missing_answer", message, hint="increase --max-new-tokens")
    closing = next((end for _, end in WRAPPERS if begin and end and answer.lower().rstrip().endswith(end)), "")
    return answer.rstrip()[: -len(closing)] if closing else answer


def hide_thought(on_text: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that passes pieces of an answer on, without the thought before it."""
    held: str | None = ""

    def pass_on(piece: str) -> None:
        nonlocal held
        if held is None:
            on_text(piece)
            return
        held += piece
        if (begin := find_answer(held)) is not None and not may_begin_thought(held[begin:]):
            on_text(held[begin:])
            held = None

    return pass_on


def _find_mark(text: str, marks: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
    return next((mark for mark in marks if text.lstrip().startswith(mark[0])), None)
