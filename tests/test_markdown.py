"""Markdown in segments for translation, without a model."""

import pytest

from llmcli.text.markdown import Segment, Splitter, join_segments

DOCUMENT = """# The harbor

  The clock was repaired.  An apprentice did it!

- a warm coat
    1. two bottles

```sh
ferry --book "Bergen"
```
~~~ text
```
still code
~~~
---
1951

The end. """


def count_words(text: str) -> int:
    return len(text.split())


@pytest.fixture
def splitter() -> Splitter:
    return Splitter(lambda text: count_words(text) <= 4, count_words, 4)


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("The end.", [Segment("", "The end.")]),
        ("# The end.\n", [Segment("# "), Segment("", "The end."), Segment("\n")]),
        ("> - Yes.  No.\r\n", [Segment("> - "), Segment("", "Yes.", "  "), Segment("", "No."), Segment("\r\n")]),
        ("1951\n---\n", [Segment("1951"), Segment("\n---\n")]),
        ("```sh\nferry\n```\nBook.", [Segment("```sh\nferry\n```\n"), Segment("", "Book.")]),
        ("~~~\n```\nferry\n~~~~", [Segment("~~~\n```\nferry\n~~~~")]),
        ("```code``` here.", [Segment("", "```code``` here.", spans=((0, 10),))]),
        ("    Indented prose.\n", [Segment("    "), Segment("", "Indented prose."), Segment("\n")]),
        ("# A\n\n    code\n", [Segment("# "), Segment("", "A"), Segment("\n\n    code\n")]),
        ("---\na: Be\n---\nYes.", [Segment("---\na: Be\n---\n"), Segment("", "Yes.")]),
        ("|a|\n|-|\n|`b`|", [Segment("|"), Segment("", "a"), Segment("|\n|-|\n|"), Segment("`b`"), Segment("|")]),
    ],
)
def test_split_markdown_returns_segments(splitter, text, segments):
    assert splitter.split(text, "en") == segments


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("Run `pump --stop` now.", ["`pump --stop`"]),
        ("See [the manual](http://x.org/a_b 'T') here.", ["[", "](http://x.org/a_b 'T')"]),
        ("See [the `x` manual][m] here.", ["[", "`x`", "][m]"]),
        ("See [m] and [the rest][gone].", ["[m]", "][gone]"]),
        ("A ![wide clock](clock.png) here.", ["![wide clock](clock.png)"]),
        (
            "A wide clock ![with `x` <b>](a.png) [and ![`x`](b.png)](c) here.",
            ["![with `x` <b>](a.png)", "[", "![`x`](b.png)](c)"],
        ),
        (
            "Write to <http://x.org>, https://x.org/a?b=1, me@x.org.",
            ["<http://x.org>", "https://x.org/a?b=1", "me@x.org"],
        ),
        ("A <b class='x'>bold</b> word<br>&nbsp;here.", ["<b class='x'>", "</b>", "<br>&nbsp;"]),
        ("A <code>pump stop</code> here.", ["<code>pump stop</code>"]),
        ("It costs $5 and $10, as $x^2 + y$ says[^1].", ["$x^2 + y$", "[^1]"]),
        ("The {{ name }} of it.", ["{{ name }}"]),
        ("A lone ` and a [ and <3.", []),
    ],
)
def test_split_finds_spans_that_stay(text, spans):
    segments = Splitter(lambda text: True, count_words, None).split(f"{text}\n\n[m]: http://x.org", "en")
    found = [segment.text[a:b] for segment in segments for a, b in segment.spans]
    assert found == spans
    for segment in segments:
        pieces = segment.split_around_spans()
        assert "".join(piece.before + piece.text + piece.after for piece in pieces) == (
            segment.before + segment.text + segment.after
        )
        assert not any(span in piece.text for piece in pieces for span in spans)


def test_split_long_sentence_returns_pieces_that_fit(splitter):
    segments = splitter.split("one two three four five, six seven", "en")
    assert len(segments) > 1
    assert all(count_words(segment.text) <= 4 for segment in segments)


def test_split_without_limit_keeps_sentences(splitter):
    splitter = Splitter(lambda text: True, count_words, None)
    assert splitter.split("one two three four five six", "en") == [Segment("", "one two three four five six")]


def test_join_segments_restores_everything_else(splitter):
    segments = splitter.split(DOCUMENT, "en")
    texts = [segment.text for segment in segments if segment.text]
    assert not any("\n" in text for text in texts)
    assert "".join(segment.before + segment.text + segment.after for segment in segments) == DOCUMENT
    assert join_segments(segments, texts) == DOCUMENT
    assert join_segments(segments, ["X\n Y"] * len(texts)).count("X Y") == len(texts)
