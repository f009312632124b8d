"""Parse, format and round sizes, durations, shards and probabilities."""

import math
import re

from llmcli.errors import UsageError

SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BYTES |= {f"{unit}I": 1024**power for power, unit in enumerate(("K", "M", "G", "T"), start=1)}


def parse_duration(text: str) -> float:
    """Return the seconds of a duration, e.g. 90, 90s, 10m, 1h or 1d."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    seconds = float(match[1]) * SECONDS[match[2]] if match else math.inf
    if seconds == math.inf:
        raise UsageError(f"invalid duration {text!r}", hint="write it like 30s, 10m or 2h")
    return seconds


def parse_size(text: str) -> int:
    """Return the bytes of a size, e.g. 8GB, 500MB or 2GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip(), re.IGNORECASE)
    if not match or match[2].upper() not in BYTES:
        raise UsageError(f"invalid size {text!r}", hint="write it like 8GB, 500MB or 2GiB")
    return int(float(match[1]) * BYTES[match[2].upper()])


def parse_shard(text: str) -> tuple[int, int]:
    """Return I and N of `I/N`."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"invalid --shard {text!r}", hint="write I/N, I from 0 to N-1: 0/4 is the first of 4 shards")
    return int(match[1]), int(match[2])


def format_megabytes(size: int | None) -> str:
    """Return a number of bytes as megabytes, e.g. `269 MB`; `-` if it is unknown."""
    return f"{size / 1e6:.0f} MB" if size else "-"


def format_passage(file: str | None, line: int | None, text: str, score: float) -> str:
    """Return a passage as grep prints a line, with its score."""
    return f"{f'{file}:' if file else ''}{line}: {' '.join(text.split())} ({score:.3f})"


def format_probability(probability: float | None) -> str:
    """Return a probability in at most six columns, e.g. `0.0123` or `4e-06`; `-` if it is unknown."""
    if probability is None:
        return "-"
    return f"{probability:.4f}" if probability >= 0.00005 else f"{probability:.0e}" if probability else "0"


def round_float32(value: float) -> float:
    """Return a number with the digits that float32 is good for: six."""
    return float(f"{value:.6g}")
