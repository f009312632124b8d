"""Answers shown while they are generated."""

from collections.abc import Mapping
from typing import Any

from llmcli.engines.requests import OnText
from llmcli.tasks import ModelCall


def open_stream(call: ModelCall, on_text: OnText | None) -> OnText | None:
    """Return the function that shows the pieces of an answer, or None. Show the text that precedes the answer."""
    if on_text is None or call.shown is None:
        return None
    if call.shown:
        on_text(call.shown)
    return _StrippedStream(on_text) if call.strip else on_text


def strip_output(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return a generated output without the white space around its texts."""
    texts: dict[str, Any] = {"generated_text": output["generated_text"].strip()}
    if "generated_texts" in output:
        texts["generated_texts"] = [text.strip() for text in output["generated_texts"]]
    return {**output, **texts}


class _StrippedStream:
    """Pass pieces of text on without the white space around the whole."""

    def __init__(self, on_text: OnText) -> None:
        self._on_text, self._has_begun, self._held = on_text, False, ""

    def __call__(self, piece: str) -> None:
        text = self._held + piece
        text = text if self._has_begun else text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        if shown:
            self._has_begun = True
            self._on_text(shown)
