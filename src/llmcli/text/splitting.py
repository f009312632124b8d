"""Splits texts into pieces of a limited number of tokens, and finds stop sequences."""

from collections.abc import Callable, Iterator, Sequence


def split(
    text: str, count_tokens: Callable[[str], int], max_tokens: int, *, markdown: bool = False
) -> Iterator[tuple[int, str]]:
    """Yield the start and the text of pieces as long as possible, split between paragraphs, sentences or words."""
    if len(text.encode("utf-8", "surrogatepass")) <= max_tokens:  # A token has at least one byte.
        if text.strip():
            yield len(text) - len(text.lstrip()), text.strip()
        return
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

    kind = MarkdownSplitter if markdown else TextSplitter
    yield from kind.from_callback(count_tokens, max_tokens).chunk_indices(text)


def first_stop(text: str, stops: Sequence[str], start: int = 0) -> int | None:
    """Return the position from `start` on where the first stop sequence begins in a text, or None if there is none."""
    return min((position for stop in stops if (position := text.find(stop, start)) >= 0), default=None)


def stop_prefix(text: str, stops: Sequence[str]) -> int:
    """Return the number of characters at the end of a text that may be the beginning of a stop sequence."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
