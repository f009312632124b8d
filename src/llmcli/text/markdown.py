"""Splits Markdown into segments for translation. Markup, code, targets of links and white space stay as they are."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from llmcli.text import languages
from llmcli.text.splitting import split

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import StateInline

Span = tuple[int, int]
MASK = "\0"  # for what must stay: no letter, and in no text that a parser has read
LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")  # as markdown-it counts lines
FRONT_MATTER = re.compile(r"(---|\+\+\+)[ \t]*\r?\n[\w-]+[ \t]*[:=].*?\n\1[ \t]*(?:\r?\n|\Z)", re.DOTALL)
MARKUP = re.compile(r"[`\[\]<>#|$&{}@*~=]|://|www\.|^\s*(?:[-+]|\d+[.)])\s|^(?:-{3,}|\s{4,}\S)", re.MULTILINE)
# What extends Markdown: math, footnotes, tasks, templates, undefined references; elements whose content is no prose.
VERBATIM = re.compile(
    r"\$\$.+?\$\$|\$(?! )[^$\n]+?(?<! )\$(?!\d)|\\\(.+?\\\)|\\\[.+?\\\]|\[\^[^\]\s]+\]:?|\[[ xX]\](?= )"
    r"|\{\{.+?\}\}|\{%.+?%\}|\]\[[^\]\n]*\]|<(code|pre|kbd|samp|var|script|style)\b.*?</\1>",
    re.DOTALL | re.IGNORECASE,
)
LEAD = re.compile(r"(?:\[\^[^\]\s]+\]:|\[[ xX]\])\s+")  # begins a footnote or a task
ADDRESS = re.compile(
    r"(?:(?:https?|ftp)://|www\.)[^\s<>\"`，。；！？）]*[^\s<>\"`，。；！？）.,;:!?)\]}'*_]|[\w.+-]+@[\w-]+\.[\w.-]*\w"
)
PROSE = ("paragraph_open", "inline", "code_block", "softbreak")  # what a text without Markdown may seem to have


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a text, which is `before + text + after`. Only `text` is translated, if it is not empty.

    `spans` are the places in `text` that must come back as they are.
    """

    before: str
    text: str = ""
    after: str = ""
    spans: tuple[Span, ...] = ()

    def keeps(self, translation: str) -> bool:
        """Return whether a translation has all spans, as often as the text."""
        return all(translation.count(self.text[a:b]) == self.text.count(self.text[a:b]) for a, b in self.spans)

    def split_around_spans(self) -> list["Segment"]:
        """Return segments without spans, which are segments of their own."""
        places = [0, *itertools.chain.from_iterable(self.spans), len(self.text)]
        pieces = [self.text[a:b] for a, b in itertools.pairwise(places)]  # prose and spans in turn
        segments = [Segment(piece) if i % 2 else _make_segment(piece, piece) for i, piece in enumerate(pieces)]
        return [Segment(self.before), *segments, Segment(self.after)]


@dataclass(frozen=True, slots=True)
class Splitter:
    """Splits a text into segments that fit a model. `max_tokens` limits the pieces of a sentence that does not fit."""

    fits: Callable[[str], bool]
    count_tokens: Callable[[str], int]
    max_tokens: int | None

    def split(self, text: str, language: str) -> list[Segment]:
        """Return the segments of a text in a language. Joined, they are the text; none has a newline in its `text`."""
        segments, end = list[Segment](), 0
        for start, masked in _find_prose(text):
            if start > end:
                segments.append(Segment(text[end:start]))
            begin, end = start, start + len(masked)
            for sentence in languages.split_sentences(masked.replace(MASK, "x"), language):
                for length in self._split_sentence(text[begin : begin + len(sentence)], sentence):
                    piece = slice(begin - start, begin - start + length)
                    segments.append(_make_segment(text[start:end][piece], masked[piece]))
                    begin += length
        return [*segments, Segment(text[end:])] if end < len(text) else segments

    def _split_sentence(self, sentence: str, masked: str) -> Iterable[int]:
        """Return the lengths of the pieces of a sentence."""
        if self.max_tokens is None or self.fits(sentence):
            return [len(sentence)]
        starts = [start for start, _ in split(masked, self.count_tokens, self.max_tokens)]
        return (b - a for a, b in itertools.pairwise([0, *starts[1:], len(sentence)]))


def has_markup(text: str) -> bool:
    """Return whether a text may have Markdown, or anything else that must not be translated."""
    return MARKUP.search(text) is not None


def keeps_markup(text: str, segments: Sequence[Segment], translation: str) -> bool:
    """Return whether a translation of a whole text has its lines, markup and spans."""
    markup = {segment.before.strip() for segment in segments if not segment.text}
    spans = {segment.text[a:b] for segment in segments for a, b in segment.spans}
    lines = len(text.strip().splitlines()) == len(translation.strip().splitlines())
    return lines and all(text.count(part) == translation.count(part) for part in (markup | spans) - {""})


def join_segments(segments: Sequence[Segment], translations: Sequence[str]) -> str:
    """Return a text with the segments that have a `text` replaced by their translations, in order."""
    remaining = iter(translations)
    texts = [" ".join(next(remaining).split()) if segment.text else "" for segment in segments]
    return "".join(segment.before + text + segment.after for segment, text in zip(segments, texts, strict=True))


def _make_segment(piece: str, masked: str) -> Segment:
    """Return a piece as a segment. A piece without letters outside its spans is not translated."""
    text = piece.strip()
    begin = piece.index(text)
    masked = masked[begin : begin + len(text)]
    if not any(map(str.isalpha, masked)):
        return Segment(piece)
    spans = tuple(match.span() for match in re.finditer(f"{MASK}+", masked))
    return Segment(piece[:begin], text, piece[begin + len(text) :], spans)


def _find_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the begin of each line's prose, and the prose itself with masks in place of what must stay."""
    front = FRONT_MATTER.match(text)
    offset = front.end() if front else 0
    starts = [offset + match.start() for match in LINE.finditer(text[offset:])] + [len(text)]
    parser, env, end = _load_parser(), dict[str, object](), 0
    tokens = parser.parse(text[offset:], env)
    if all(token.type.replace("close", "open") in PROSE for token in tokens):  # Indented prose is no code.
        tokens = _load_parser("code").parse(text[offset:], env)
    for before, token in itertools.pairwise(tokens):
        if token.type != "inline" or not token.map:
            continue
        block, spans = token.content, list[Span]()
        if before.tag in ("td", "th"):
            block = block.replace("|", "\\|")  # as it is written
        parser.inline.parse(block, parser, env | {"spans": spans}, [])
        masked, place = list(block), 0
        for a, b in spans + [match.span() for match in ADDRESS.finditer(block)]:
            masked[a:b] = MASK * (b - a)
        for number, line in enumerate(block.split("\n"), start=token.map[0]):
            content = LEAD.sub("", line.strip())
            start = text.find(content, max(starts[number], end), starts[number + 1]) if content else -1
            if start >= 0:
                end, at = start + len(content), place + line.index(content)
                yield start, "".join(masked[at : at + len(content)])
            place += len(line) + 1


@cache
def _load_parser(*disabled: str) -> "MarkdownIt":
    """Return a parser without some rules that notes in `env` which places of a line must not be translated."""
    from markdown_it import MarkdownIt, rules_inline

    def verbatim(state: "StateInline", silent: bool) -> bool:
        match = VERBATIM.match(state.src, state.pos, state.posMax)
        state.pos = match.end() if match else state.pos
        return match is not None

    def noting(rule: Callable[["StateInline", bool], bool]) -> Callable[["StateInline", bool], bool]:
        def run(state: "StateInline", silent: bool) -> bool:
            start, spans = state.pos, state.env.get("spans", [])
            known = len(spans)
            if not rule(state, silent):
                return False
            if silent or not state.src[start : state.pos].strip("`"):
                return True
            label_end = state.md.helpers.parseLinkLabel(state, start, True) if rule is rules_inline.link else start
            if label_end == start or state.src[label_end : state.pos] in ("]", "][]"):
                spans[known:] = [(start, state.pos)]  # The text of such a link is its name.
            else:
                spans += (start, start + 1), (label_end, state.pos)
            return True

        return run

    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    parser.disable(["html_block", "inline", *disabled])
    parser.inline.ruler.before("escape", "verbatim", noting(verbatim))
    for name in ("backtick", "link", "image", "autolink", "html_inline", "entity"):
        parser.inline.ruler.at("backticks" if name == "backtick" else name, noting(getattr(rules_inline, name)))
    return parser
