"""Texts cut into pieces of so many tokens, at natural borders."""

from collections.abc import Callable, Iterator
from typing import Any


def cut(text: str, tokens: Any, most: int, *, markdown: bool = False) -> Iterator[tuple[int, str]]:
    """Pieces of at most `most` tokens and where each begins, cut between headings of Markdown, paragraphs, sentences
    or words as the tokens allow. `tokens` is a function that counts them, or a `tokenizers.Tokenizer`."""
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

    kind = MarkdownSplitter if markdown else TextSplitter
    make: Callable[..., Any] = kind.from_callback if callable(tokens) else kind.from_huggingface_tokenizer
    yield from make(tokens, most).chunk_indices(text)
