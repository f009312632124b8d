"""Splits texts into pieces of a limited number of tokens, at natural boundaries."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def split(
    text: str, tokens: "Callable[[str], int] | Tokenizer", max_tokens: int, *, markdown: bool = False
) -> Iterator[tuple[int, str]]:
    """Split a text between headings of Markdown, paragraphs, sentences or words, into pieces as long as possible.

    Yields:
        Pairs of the position where a piece begins, in characters, and the piece. White space around pieces is left out.
    """
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

    kind = MarkdownSplitter if markdown else TextSplitter
    if callable(tokens):
        yield from kind.from_callback(tokens, max_tokens).chunk_indices(text)
    else:
        yield from kind.from_huggingface_tokenizer(tokens, max_tokens).chunk_indices(text)
