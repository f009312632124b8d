"""Pictures of rich -> SVG, and pages that show them: files that need nothing beside them, in light and dark."""

from collections.abc import Iterator
from html import escape
from itertools import groupby
from typing import Any

from rich.cells import cell_len
from rich.color import Color
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.segment import Segment

WIDTH, HEIGHT, MARGIN = 8.4, 19, 14  # of a column, of a line, around it all, in pixels
EIGHTHS = " ▏▎▍▌▋▊▉█"  # of a column
FONT = "ui-monospace, 'Cascadia Mono', Menlo, Consolas, 'DejaVu Sans Mono', 'Noto Sans Mono CJK SC', monospace"
PICTURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" \
height="{height:g}" role="img">
<title>{title}</title>
<style>
.paper {{ fill: #ffffff }} text {{ fill: #1f2328; font: 14px {font}; white-space: pre }}
@media (prefers-color-scheme: dark) {{ .paper {{ fill: #0d1117 }} text {{ fill: #e6edf3 }} }}
</style>
<rect class="paper" width="100%" height="100%" rx="6"/>
{shapes}
</svg>
"""
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ margin: 2em; background: #ffffff }}
@media (prefers-color-scheme: dark) {{ body {{ background: #0d1117 }} }}
</style>
{picture}</html>
"""


def svg(picture: RenderableType, title: str) -> str:
    """The picture as wide as it needs. What fills so many columns of a terminal fills as many here, whatever the
    fonts."""
    console = Console(
        width=10_000, force_terminal=True, color_system="truecolor", no_color=False, legacy_windows=False, markup=False,
        emoji=False,
    )  # fmt: skip
    wide = Measurement.get(console, console.options, picture).maximum
    lines = console.render_lines(picture, console.options.update(width=wide), pad=False)
    shapes = [shape for y, line in enumerate(lines) for shape in _line(line, y)]
    return PICTURE.format(
        width=wide * WIDTH + 2 * MARGIN, height=len(lines) * HEIGHT + 2 * MARGIN, title=escape(title), font=FONT,
        shapes="\n".join(shapes),
    )  # fmt: skip


def html(picture: RenderableType, title: str) -> str:
    """A page that shows it."""
    return PAGE.format(title=escape(title), picture=svg(picture, title))


def _line(segments: list[Segment], y: int) -> Iterator[str]:
    left, top = float(MARGIN), MARGIN + y * HEIGHT
    for text, style, _ in segments:
        colour, paper = (_hex(each) for each in (style.color, style.bgcolor)) if style else (None, None)
        if paper:
            yield _block(left, top, cell_len(text) * WIDTH, HEIGHT, paper)
        for run, is_bar in _runs(text):
            wide = cell_len(run) * WIDTH
            if colour and is_bar:  # as glyphs, they would not meet
                part = sum(map(EIGHTHS.index, run)) / 8
                yield _block(left, top + 3, part * WIDTH, HEIGHT - 6, colour)
            elif run.strip():
                place = f'x="{left:g}" y="{top + 0.75 * HEIGHT:g}" textLength="{wide:g}"'
                yield f'<text {place} lengthAdjust="spacingAndGlyphs"{_look(style)}>{escape(run)}</text>'
            left += wide


def _hex(colour: Color | None) -> str | None:
    """None for the terminal's own."""
    return colour.get_truecolor().hex if colour and not colour.is_default else None


def _block(left: float, top: float, wide: float, high: float, colour: str) -> str:
    place = f'x="{left:g}" y="{top:g}" width="{wide:g}" height="{high:g}"'
    return f'<rect {place} fill="{colour}" shape-rendering="crispEdges"/>'


def _runs(text: str) -> Iterator[tuple[str, bool]]:
    """Parts whose characters are equally wide, and whether they are a bar; a mark that takes no column stays with the
    character before it."""
    wide = 1

    def kind(character: str) -> tuple[int, bool]:
        nonlocal wide
        wide = cell_len(character) or wide
        return wide, character in EIGHTHS[1:]

    for (_, is_bar), run in groupby(text, kind):
        yield "".join(run), is_bar


def _look(style: Any) -> str:
    if not style:
        return ""
    looks = {
        "fill": _hex(style.color),
        "font-weight": style.bold and "bold",
        "opacity": style.dim and "0.6",
    }
    rules = "; ".join(f"{name}: {value}" for name, value in looks.items() if value)
    return f' style="{rules}"' if rules else ""
