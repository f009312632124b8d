"""Splits Markdown into segments for translation. Markup, code blocks and white space stay as they are."""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llmcli.text import languages
from llmcli.text.splitting import split

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
    """Splits a text into segments that fit a model. `max_tokens` limits the pieces of a sentence that does not fit."""

    fits: Callable[[str], bool]
    count_tokens: Callable[[str], int]
    max_tokens: int | None

    def split(self, text: str, language: str) -> list[Segment]:
        """Return the segments of a text in a language. Joined, they are the text; none has a newline in its `text`."""
        segments: list[Segment] = []
        open_fence = ""
        for line in text.splitlines(keepends=True):
            fence = FENCE.match(line)
            if open_fence:
                segments.append(Segment(line))
                if fence and fence[1].startswith(open_fence) and not fence[2].strip():
                    open_fence = ""
            elif fence:
                segments.append(Segment(line))
                open_fence = fence[1]
            else:
                marker = MARKER.match(line)
                start = marker.end() if marker else 0
                if start:
                    segments.append(Segment(line[:start]))
                for sentence in languages.split_sentences(line[start:], language):
                    segments += map(_make_segment, self._split_sentence(sentence))
        return segments

    def _split_sentence(self, sentence: str) -> Iterable[str]:
        if self.max_tokens is None or self.fits(sentence):
            return [sentence]
        starts = [start for start, _ in split(sentence, self.count_tokens, self.max_tokens)]
        return (sentence[a:b] for a, b in itertools.pairwise([0, *starts[1:], len(sentence)]))


def join_segments(segments: Sequence[Segment], translations: Sequence[str]) -> str:
    """Return a text with the segments that have a `text` replaced by their translations, in order."""
    remaining = iter(translations)
    texts = [" ".join(next(remaining).split()) if segment.text else "" for segment in segments]
    return "".join(segment.before + text + segment.after for segment, text in zip(segments, texts, strict=True))


def _make_segment(piece: str) -> Segment:
    """Return a piece as a segment. A piece without letters is not translated."""
    text = piece.strip()
    if not any(map(str.isalpha, text)):
        return Segment(piece)
    start = piece.index(text)
    return Segment(piece[:start], text, piece[start + len(text) :])
