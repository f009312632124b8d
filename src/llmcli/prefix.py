"""What sequences of tokens begin with."""

from collections.abc import Sequence


def common(rows: Sequence[list[int]]) -> list[int]:
    """What all of them begin with."""
    least, most = min(rows), max(rows)  # of sorted rows, the first and the last differ earliest
    end = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), min(len(least), len(most)))
    return least[:end]
