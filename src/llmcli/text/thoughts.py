"""Thoughts: what some models write before an answer, between marks such as <think> and </think>."""

import re
from collections.abc import Callable

from llmcli.errors import RecordError

TAG = r"(?:\w+[:_])?(?:think|thinking|thoughts?|reason|reasoning|reflection|analysis|scratchpad)"
MARKS = (  # begin and end of a thought
    (rf"<{TAG}>", rf"</{TAG}>"),
    (r"\[think\]", r"\[/think\]"),
    ("◁think▷", "◁/think▷"),
    (rf"<\|(?:start_|begin_of_)?{TAG}\|>", rf"<\|(?:end_|end_of_|/){TAG}\|>"),
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),
    (r"(?=<\|channel\|>)", r"<\|channel\|>final<\|message\|>"),
    (r"<\|channel>thought", r"<channel\|>"),
    ("here is my thought process:", "here is my response:"),
)
BEGIN = re.compile(rf"(?i)\s*(?:{'|'.join(begin for begin, _ in MARKS)})")
THOUGHT = re.compile(rf"(?is)\s*(?:{'|'.join(f'{begin}.*?{end}' for begin, end in MARKS)})\s*")
LONE_END = re.compile(rf"(?i)(?:</{TAG}>|\[/think\]|◁/think▷)[ \t]*(?:\n\s*|\Z)")  # of one that began in the prompt
WRAPPED = re.compile(  # an answer after a thought
    r"(?is)(?:<answer>|<response>|<\|begin_of_solution\|>|<\|start_response\|>)\s*(.*?)\s*"
    r"(?:</answer>|</response>|<\|end_of_solution\|>|<\|end_response\|>)?\s*"
)
OPENING = re.compile(rf"<({TAG})>\s*\Z")  # at the end of a prompt
SPECIAL = re.compile(r"(?i)think|thought|channel|<\|message\|>|inner_")  # tokens that make marks
MARK_LENGTH = 40  # characters: more than the begin of a thought has


def find_answer(text: str) -> int | None:
    """Return where the answer begins after leading thoughts: 0 if there are none, None if they have not ended."""
    begin = 0
    while thought := THOUGHT.match(text, begin):
        begin = thought.end()
    if BEGIN.match(text, begin):
        return None
    end = LONE_END.search(text, begin)
    return end.end() if end and not BEGIN.search(text, begin, end.start()) else begin


def cut_thought(text: str, finish_reason: str) -> str:
    """Return the answer without the thought before it. Raises RecordError if the model has come to no answer."""
    begin = find_answer(text)
    if begin is None or (0 < begin == len(text) and finish_reason == "length"):
        message = "model did not finish its thoughts, so there is no answer"
        raise RecordError("missing_answer", message, hint="increase --max-new-tokens")
    wrapped = WRAPPED.fullmatch(text, begin) if begin else None
    return wrapped[1] if wrapped else text[begin:]


def hide_thought(on_text: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that passes the pieces of an answer on, unless it begins with a thought."""
    held = ""

    def pass_on(piece: str) -> None:
        nonlocal held
        if len(held.lstrip()) >= MARK_LENGTH:
            if not BEGIN.match(held):
                on_text(piece)
            return
        held += piece
        if len(held.lstrip()) >= MARK_LENGTH and not BEGIN.match(held):
            on_text(held)

    return pass_on
