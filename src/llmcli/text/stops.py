"""Finds stop sequences in generated text."""

from collections.abc import Sequence


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return the position where the first stop sequence begins in a text, or None if there is none."""
    return min((position for stop in stops if (position := text.find(stop)) >= 0), default=None)


def stop_prefix(text: str, stops: Sequence[str]) -> int:
    """Return the number of characters at the end of a text that may be the beginning of a stop sequence."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
