"""Splits Markdown into segments for translation. Markup, code blocks and white space stay as they are."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from llmcli.text import chunking, languages

MARKER = re.compile(r"\s*(?:(?:[-*+>|]|#+|\d+[.)])\s+)*")  # markup at the beginning of a line
FENCE = re.compile(r"\s*(`{3,}(?=[^`]*$)|~{3,})(.*)", re.DOTALL)  # begins or ends a block of code


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a text, which is `before + text + after`. Only `text` is translated, if it is not empty."""

    before: str
    text: str = ""
    after: str = ""


@dataclass(frozen=True, slots=True)
class Splitter:
    """Splits a text into segments that fit a model.

    Attributes:
        fits: Returns whether a string fits in one input.
        count_tokens: Counts the tokens of a string.
        max_tokens: Maximum number of tokens of a piece of a sentence that does not fit. None: each sentence fits.
    """

    fits: Callable[[str], bool]
    count_tokens: Callable[[str], int]
    max_tokens: int | None

    def split(self, text: str, language: str) -> list[Segment]:
        """Return the segments of a text in a language. Joined, they are the text; none has a newline in its `text`."""
        return list(self._split_lines(text.splitlines(keepends=True), language))

    def _split_lines(self, lines: Iterable[str], language: str) -> Iterator[Segment]:
        open_fence = ""
        for line in lines:
            fence = FENCE.match(line)
            if open_fence:
                yield Segment(line)
                if fence and fence[1].startswith(open_fence) and not fence[2].strip():
                    open_fence = ""
            elif fence:
                yield Segment(line)
                open_fence = fence[1]
            else:
                marker = MARKER.match(line)
                start = marker.end() if marker else 0
                if start:
                    yield Segment(line[:start])
                for sentence in languages.split_sentences(line[start:], language):
                    yield from map(_make_segment, self._split_sentence(sentence))

    def _split_sentence(self, sentence: str) -> Iterable[str]:
        """Return pieces of a sentence that fit. Joined, they are the sentence."""
        if self.max_tokens is None or self.fits(sentence):
            return [sentence]
        starts = [start for start, _ in chunking.split(sentence, self.count_tokens, self.max_tokens)]
        return (sentence[a:b] for a, b in itertools.pairwise([0, *starts[1:], len(sentence)]))


def join_segments(segments: Sequence[Segment], translations: Sequence[str]) -> str:
    """Return a text with the segments that have a `text` replaced by their translations, in order."""
    remaining = iter(translations)
    return "".join(
        segment.before + (" ".join(next(remaining).split()) if segment.text else "") + segment.after
        for segment in segments
    )


def _make_segment(piece: str) -> Segment:
    """Return a piece as a segment. A piece without letters is not translated."""
    text = piece.strip()
    if not any(map(str.isalpha, text)):
        return Segment(piece)
    start = piece.index(text)
    return Segment(piece[:start], text, piece[start + len(text) :])
