"""Tokens, probabilities and attention as rich draws them. It imports rich: import it where a picture is drawn."""

import codecs
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.bar import Bar
from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from llmcli.io.output import share

Tokens = Sequence[Mapping[str, Any]]
Rgb = tuple[int, int, int]
SURPRISE: Sequence[Rgb] = ((255, 247, 188), (254, 196, 79), (236, 112, 20), (204, 76, 2))  # ColorBrewer's YlOrBr
VIRIDIS: Sequence[Rgb] = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
DIM = Style(dim=True)
GREEN, VIOLET = "#2a9d8f", "#b05cc6"  # to be seen on white and on black
SHADES = " ░▒▓█"  # on a screen without colours
SEEN = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})
BYTE = re.compile(r"\\x([89a-f][0-9a-f])")  # as `spelling` writes a part of a character
SURROGATES, ESCAPED = 0xDC00, "surrogateescape"  # how Python keeps such a part in a text
WIDEST = 24  # columns that a token may take
BAR = 30
CELL = 2  # columns of a weight


def screen() -> Console:
    """stdout, which knows its width and colours."""
    return Console(highlight=False, markup=False, emoji=False)  # tokens are no mark-up, whatever they say


def drawn(picture: RenderableType, console: Console) -> str:
    """What a terminal has to be sent for it, without the last line end."""
    with console.capture() as captured:
        console.print(picture, soft_wrap=isinstance(picture, Text))
    return captured.get().removesuffix("\n")


def has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def seen(text: str, most: int = WIDEST) -> str:
    """A token with its white space made visible, cut to `most` columns."""
    text = _harmless(text.translate(SEEN))
    return text if cell_len(text) <= most else set_cell_size(text, most - 1).rstrip() + "…"


def heat(tokens: Tokens) -> Text:
    """A text whose tokens are the darker, the less likely each was; of its first, the model says nothing. A character
    that several tokens make has the colour of the least likely."""
    text, surprise, decoder = Text(), 0.0, codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        own = min(-(token["logprob"] or 0) / math.log(1000), 1)
        surprise = max(surprise, own)
        data = BYTE.sub(lambda found: chr(SURROGATES + int(found[1], 16)), token["token"]).encode(errors=ESCAPED)
        if shown := decoder.decode(data):
            style = Style(color="black", bgcolor=_colour(SURPRISE, surprise)) if surprise > 0.1 else Style()
            text.append(_harmless(shown), style)
            surprise = own if decoder.getstate()[0] else 0.0
    return text.append(decoder.decode(b"", final=True))


def likelihoods(tokens: Tokens, width: int) -> Table:
    """The same on a screen without colours: a token a line, its probability, and a bar."""
    shown = [seen(token["token"], width // 4) for token in tokens]
    bar = max(1, min(BAR, width - max(map(cell_len, [*shown, "TOKEN"])) - len("PROBABILITY") - 3 * 2))
    table = _table("<TOKEN", ">PROBABILITY", "<")
    for text, token in zip(shown, tokens, strict=True):
        chance = None if token["logprob"] is None else math.exp(token["logprob"])
        table.add_row(text, share(chance), Bar(1, 0, chance or 0, width=bar))
    return table


def titled(title: str, picture: RenderableType) -> Group:
    """With a line above it, cut to 80 characters."""
    return Group(Text(_harmless(title)[:80], Style(bold=True)), picture)


def pieces(models: Mapping[str, Tokens], width: int) -> Group:
    """The tokens of one text and their ids, as each model has them; side by side as far as `width` holds them."""
    number = len(str(max((len(tokens) for tokens in models.values()), default=0)))
    groups: list[list[str]] = [[]]
    for name in models:
        if groups[-1] and number + sum(_width(each, models[each]) for each in [*groups[-1], name]) > width:
            groups.append([])
        groups[-1].append(name)
    return Group(*(_side_by_side({name: models[name] for name in group}) for group in groups))


def chances(tokens: Tokens, sampling: str, width: int) -> Group:
    """The likeliest next tokens: for the model, and as they are drawn; `sampling` says how."""
    shown = [seen(token["token"], width // 4) for token in tokens]
    bar = max(1, (width - max(map(cell_len, [*shown, "NEXT"])) - 2 * 6 - 4 * 2) // 2)
    table = _table("<NEXT", "<MODEL", ">", "<DRAWN", ">")
    for text, token in zip(shown, tokens, strict=True):
        chance, after = token["probability"], token["sampling_probability"]
        table.add_row(
            text, Bar(1, 0, chance, width=bar, color=GREEN), share(chance),
            Bar(1, 0, after, width=bar, color=VIOLET), share(after),
        )  # fmt: skip
    return Group(table, Text(f"Drawn at {sampling}", DIM))


def matrix(tokens: Sequence[str], weights: Sequence[Sequence[float]], of: str, *, colours: bool) -> Text:
    """How much each token, a row, attends to each, a column: brighter is more. A row's label stands behind its last
    column, which in a causal model is the row's own. `of` says which layers and heads these are."""
    is_causal = not any(any(row[i + 1 :]) for i, row in enumerate(weights))
    step = 1 if len(tokens) <= 10 else 2  # numbers of two digits would touch
    numbers = [f"{i % 100:>{CELL}}" if i % step == 0 else " " * CELL for i in range(len(tokens))]
    text = Text().append("".join(numbers).rstrip(), DIM)
    for i, (token, row) in enumerate(zip(tokens, weights, strict=True)):
        text.append("\n")
        for weight in row[: i + 1] if is_causal else row:
            text.append(*_shade(weight, colours))
        text.append(f" {i} ", DIM).append(seen(token))
    text.append(f"\n{of}\n0 ", DIM)
    for weight in (0, 0.05, 0.2, 0.5, 1):
        text.append(*_shade(weight, colours))
    return text.append(" 1: a row looks at columns", DIM)


def fitting(tokens: Sequence[str], width: int) -> int:
    """How many of the first tokens a matrix can have that is so wide."""
    labels = 0
    for i, token in enumerate(tokens):
        labels = max(labels, cell_len(f" {i} {seen(token)}"))
        if CELL * (i + 1) + labels > width:
            return i
    return len(tokens)


def _harmless(text: str) -> str:
    """Without what would move a terminal's cursor, but for line ends and tabs."""
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def _shade(weight: float, colours: bool) -> tuple[str, Style]:
    """A cell; the square root, for most weights are small."""
    light = math.sqrt(weight)
    if colours:
        return " " * CELL, Style(bgcolor=_colour(VIRIDIS, light))
    return SHADES[min(int(light * len(SHADES)), len(SHADES) - 1)] * CELL, Style()


def _side_by_side(models: Mapping[str, Tokens]) -> Table:
    table = _table(">", *(heading for name, tokens in models.items() for heading in (f"<{name}", f">{len(tokens)}")))
    for i in range(max(map(len, models.values()))):
        cells: list[RenderableType] = [Text(str(i), DIM)]
        for tokens in models.values():
            style = Style(bold=True, color=VIOLET) if i < len(tokens) and tokens[i]["special"] else Style()
            cells += [Text(seen(tokens[i]["token"]), style), str(tokens[i]["id"])] if i < len(tokens) else ["", ""]
        table.add_row(*cells)
    return table


def _width(name: str, tokens: Tokens) -> int:
    """Columns that a model takes beside others."""
    widest = max((cell_len(seen(token["token"])) for token in tokens), default=0)
    return 2 + max(widest, len(name)) + 2 + max((len(str(token["id"])) for token in tokens), default=0)


def _table(*headings: str) -> Table:
    """Columns that are never wrapped; `<` or `>` before a heading says where their cells stand."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading[1:], justify="left" if heading[0] == "<" else "right", no_wrap=True)
    return table


def _colour(scale: Sequence[Rgb], at: float) -> Color:
    """The colour at a place from 0 to 1, between those of the scale."""
    place = min(max(at, 0), 1) * (len(scale) - 1)
    low = min(int(place), len(scale) - 2)
    mixed = (a + (b - a) * (place - low) for a, b in zip(scale[low], scale[low + 1], strict=True))
    return Color.from_rgb(*mixed)
