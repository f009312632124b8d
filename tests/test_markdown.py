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
        ("# The end.\n", [Segment("# "), Segment("", "The end.", "\n")]),
        ("> - Yes.  No.\r\n", [Segment("> - "), Segment("", "Yes.", "  "), Segment("", "No.", "\r\n")]),
        ("1951\n---\n", [Segment("1951\n"), Segment("---\n")]),
        ("```sh\nferry\n```\nBook.", [Segment("```sh\n"), Segment("ferry\n"), Segment("```\n"), Segment("", "Book.")]),
        ("~~~\n```\nferry\n~~~~", [Segment("~~~\n"), Segment("```\n"), Segment("ferry\n"), Segment("~~~~")]),
        ("```code``` here.", [Segment("", "```code``` here.")]),
    ],
)
def test_split_markdown_returns_segments(splitter, text, segments):
    assert splitter.split(text, "en") == segments


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
