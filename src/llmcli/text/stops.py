"""Texts that end an answer."""

from collections.abc import Sequence


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop texts begins in `text`."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=None)


def stop_prefix(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop text."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
        default=0,
    )
