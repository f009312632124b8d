"""Draw tokens, probabilities and attention with rich. This module imports rich: import it where a figure is drawn."""

import codecs
import math
import re
from collections.abc import Mapping, Sequence

from rich.bar import Bar
from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.style import Style
from rich.table import Table
from rich.text import Text

from llmcli import console
from llmcli.io.units import format_probability
from llmcli.job import JsonObject

Rgb = tuple[int, int, int]
YELLOW_TO_BROWN: Sequence[Rgb] = ((255, 247, 188), (254, 196, 79), (236, 112, 20), (204, 76, 2))  # ColorBrewer's YlOrBr
VIRIDIS: Sequence[Rgb] = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
DIM = Style(dim=True)
GREEN, VIOLET = "#2a9d8f", "#b05cc6"  # visible on white and on black
SHADES = " ░▒▓█"  # on a terminal without colors
VISIBLE_WHITESPACE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})
BYTE = re.compile(r"\\x([89a-f][0-9a-f])")  # how pipelines.spelling writes a part of a character
SURROGATES, SURROGATE_ERRORS = 0xDC00, "surrogateescape"  # how Python keeps such a part in a string
MAX_TOKEN_COLUMNS = 24
MAX_BAR_COLUMNS = 30
CELL_COLUMNS = 2  # of an attention weight
FILE_COLUMNS = 100  # of a figure in a file, if it could have any width
MAX_TITLE_CHARACTERS = 80


def terminal() -> Console:
    return Console(highlight=False, markup=False, emoji=False)  # Tokens are not markup, whatever they contain.


def render(figure: RenderableType, screen: Console) -> str:
    """Return what draws a figure on a terminal, without the last line end."""
    with screen.capture() as captured:
        screen.print(figure, soft_wrap=isinstance(figure, Text))
    return captured.get().removesuffix("\n")


def has_colors(screen: Console) -> bool:
    return screen.color_system is not None and not screen.no_color


def show_whitespace(token: str, max_columns: int = MAX_TOKEN_COLUMNS) -> str:
    """Return a token with visible white space, cut to a number of columns."""
    text = _escape_controls(token.translate(VISIBLE_WHITESPACE))
    return text if cell_len(text) <= max_columns else set_cell_size(text, max_columns - 1).rstrip() + "…"


def heat_map(tokens: Sequence[JsonObject]) -> Text:
    """Draw a text whose less likely tokens are darker. A character of several tokens shows the least likely one."""
    text, darkness, decoder = Text(), 0.0, codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        token_darkness = min(-(token["logprob"] or 0) / math.log(1000), 1)
        darkness = max(darkness, token_darkness)
        escaped = BYTE.sub(lambda match: chr(SURROGATES + int(match[1], 16)), token["token"])
        if characters := decoder.decode(escaped.encode(errors=SURROGATE_ERRORS)):
            style = Style(color="black", bgcolor=_color_at(YELLOW_TO_BROWN, darkness)) if darkness > 0.1 else Style()
            text.append(_escape_controls(characters), style)
            darkness = token_darkness if decoder.getstate()[0] else 0.0
    return text.append(decoder.decode(b"", final=True))


def probability_table(tokens: Sequence[JsonObject], width: int) -> Table:
    """Draw one line per token, with its probability and a bar: a heat map without colors."""
    texts = [show_whitespace(token["token"], width // 4) for token in tokens]
    columns = max(map(cell_len, [*texts, "TOKEN"])) + len("PROBABILITY") + 3 * 2
    bar_columns = max(1, min(MAX_BAR_COLUMNS, width - columns))
    table = _table("<TOKEN", ">PROBABILITY", "<")
    for text, token in zip(texts, tokens, strict=True):
        probability = None if token["logprob"] is None else math.exp(token["logprob"])
        table.add_row(text, format_probability(probability), Bar(1, 0, probability or 0, width=bar_columns))
    return table


def draw_tokens(models: Mapping[str, Sequence[JsonObject]], width: int | None) -> Group:
    """Draw the tokens of one text and their ids for each model, side by side as far as they fit."""
    screen = Console(width=10_000, markup=False, emoji=False)
    groups: list[dict[str, Sequence[JsonObject]]] = [{}]
    for name, tokens in models.items():
        added = {_escape_controls(name): tokens}
        table = _draw_side_by_side(groups[-1] | added)
        if width and groups[-1] and Measurement.get(screen, screen.options, table).maximum > width:
            groups.append(added)
        else:
            groups[-1] |= added
    return Group(*map(_draw_side_by_side, groups))


def draw_next_tokens(record: JsonObject, width: int | None) -> RenderableType:
    """Draw the most likely next tokens, with the probability of the model and the one after sampling options."""
    tokens, sampling = record["next"], ", ".join(f"{name} {value:g}" for name, value in record["sampling"].items())
    columns = width or FILE_COLUMNS
    free = columns - 2 * len("0.1234") - 4 * 2  # between the columns of numbers
    texts = [show_whitespace(token["token"], min(columns // 4, free - 2 * len("SAMPLED"))) for token in tokens]
    bar_columns = max(1, (free - max(map(cell_len, [*texts, "NEXT"]))) // 2)
    table = _table("<NEXT", "<MODEL", ">", "<SAMPLED", ">")
    for text, token in zip(texts, tokens, strict=True):
        before, after = token["probability"], token["sampling_probability"]
        table.add_row(
            text, Bar(1, 0, before, width=bar_columns, color=GREEN), format_probability(before),
            Bar(1, 0, after, width=bar_columns, color=VIOLET), format_probability(after),
        )  # fmt: skip
    figure = Group(table, Text(f"Sampled with {sampling}", DIM))
    return figure if width else _with_title(f"{record['model']}, after {record['text']!r}", figure)


def draw_attention(record: JsonObject, source: str, width: int | None, has_colors: bool) -> RenderableType:
    """Draw the attention weights of a text; `source` names their layers and heads."""
    tokens, weights = record["tokens"], record["attention"]
    count = count_fitting(tokens, width) if width else len(tokens)
    if count < len(tokens):
        console.notice(f"the terminal shows the first {count} of {len(tokens)} tokens; use --svg NAME.svg for all")
    figure = _draw_matrix(tokens[:count], [row[:count] for row in weights[:count]], source, has_colors=has_colors)
    return figure if width else _with_title(record["model"], figure)


def count_fitting(tokens: Sequence[str], width: int) -> int:
    """Return how many of the first tokens fit in a matrix of that width."""
    label_columns = 0
    for i, token in enumerate(tokens):
        label_columns = max(label_columns, cell_len(f" {i} {show_whitespace(token)}"))
        if CELL_COLUMNS * (i + 1) + label_columns > width:
            return i
    return len(tokens)


def _draw_matrix(tokens: Sequence[str], weights: Sequence[Sequence[float]], source: str, *, has_colors: bool) -> Text:
    """Draw a row per query token and a column per key token; a brighter cell is a larger weight."""
    # The label of a row follows its last column, which in a causal model is the token itself.
    is_causal = not any(any(row[i + 1 :]) for i, row in enumerate(weights))
    step = 1 if len(tokens) <= 10 else 2  # Numbers of two digits would touch.
    numbers = [f"{i % 100:>{CELL_COLUMNS}}" if i % step == 0 else " " * CELL_COLUMNS for i in range(len(tokens))]
    text = Text().append("".join(numbers).rstrip(), DIM)
    for i, (token, row) in enumerate(zip(tokens, weights, strict=True)):
        text.append("\n")
        for weight in row[: i + 1] if is_causal else row:
            text.append(*_draw_cell(weight, has_colors))
        text.append(f" {i} ", DIM).append(show_whitespace(token))
    text.append(f"\n{source}\n0 ", DIM)
    for weight in (0, 0.05, 0.2, 0.5, 1):
        text.append(*_draw_cell(weight, has_colors))
    return text.append(" 1: rows attend to columns", DIM)


def _with_title(title: str, figure: RenderableType) -> Group:
    return Group(Text(_escape_controls(title)[:MAX_TITLE_CHARACTERS], Style(bold=True)), figure)


def _escape_controls(text: str) -> str:
    """Return the text without characters that would move the cursor, except line ends and tabs."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


def _draw_cell(weight: float, has_colors: bool) -> tuple[str, Style]:
    brightness = math.sqrt(weight)  # Most weights are small.
    if has_colors:
        return " " * CELL_COLUMNS, Style(bgcolor=_color_at(VIRIDIS, brightness))
    return SHADES[min(int(brightness * len(SHADES)), len(SHADES) - 1)] * CELL_COLUMNS, Style()


def _draw_side_by_side(models: Mapping[str, Sequence[JsonObject]]) -> Table:
    table = _table(">", *(heading for name, tokens in models.items() for heading in (f"<{name}", f">{len(tokens)}")))
    for i in range(max(map(len, models.values()))):
        cells: list[RenderableType] = [Text(str(i), DIM)]
        for tokens in models.values():
            if i < len(tokens):
                style = Style(bold=True, color=VIOLET) if tokens[i]["special"] else Style()
                cells += [Text(show_whitespace(tokens[i]["token"]), style), str(tokens[i]["id"])]
            else:
                cells += ["", ""]
        table.add_row(*cells)
    return table


def _table(*headings: str) -> Table:
    """Return a table whose cells never wrap; `<` or `>` before a heading aligns its column."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading[1:], justify="left" if heading[0] == "<" else "right", no_wrap=True)
    return table


def _color_at(scale: Sequence[Rgb], position: float) -> Color:
    """Return the color at a position from 0 to 1, interpolated between those of the scale."""
    index = min(max(position, 0), 1) * (len(scale) - 1)
    low = min(int(index), len(scale) - 2)
    mixed = (a + (b - a) * (index - low) for a, b in zip(scale[low], scale[low + 1], strict=True))
    return Color.from_rgb(*mixed)
