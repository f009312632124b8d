"""Save figures as SVG and HTML files that need no other file, with light and dark colors."""

from collections.abc import Iterator
from html import escape
from itertools import groupby

from rich.cells import cell_len, split_graphemes
from rich.color import Color
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style

WIDTH, HEIGHT, MARGIN = 8.4, 19, 14  # of a column, of a line, around the figure, in pixels
EIGHTHS = " ▏▎▍▌▋▊▉█"  # of a column
FONT = "ui-monospace, 'Cascadia Mono', Menlo, Consolas, 'DejaVu Sans Mono', 'Noto Sans Mono CJK SC', monospace"
FIGURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" \
height="{height:g}" role="img">
<title>{title}</title>
<style>
.background {{ fill: #ffffff }} text {{ fill: #1f2328; font: 14px {font}; white-space: pre }}
@media (prefers-color-scheme: dark) {{ .background {{ fill: #0d1117 }} text {{ fill: #e6edf3 }} }}
</style>
<rect class="background" width="100%" height="100%" rx="6"/>
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
{figure}</html>
"""


def svg(figure: RenderableType, title: str) -> str:
    """Return a figure as SVG, as wide as it needs to be. Every column of a terminal has the same width in all fonts."""
    console = Console(
        width=10_000, force_terminal=True, color_system="truecolor", no_color=False, legacy_windows=False, markup=False,
        emoji=False,
    )  # fmt: skip
    columns = Measurement.get(console, console.options, figure).maximum
    lines = console.render_lines(figure, console.options.update(width=columns), pad=False)
    shapes = [shape for number, line in enumerate(lines) for shape in _draw_line(line, number)]
    return FIGURE.format(
        width=columns * WIDTH + 2 * MARGIN, height=len(lines) * HEIGHT + 2 * MARGIN, title=escape(title), font=FONT,
        shapes="\n".join(shapes),
    )  # fmt: skip


def html(figure: RenderableType, title: str) -> str:
    return PAGE.format(title=escape(title), figure=svg(figure, title))


def _draw_line(segments: list[Segment], number: int) -> Iterator[str]:
    x, y = float(MARGIN), MARGIN + number * HEIGHT
    for text, style, _ in segments:
        color, background = (_hex(style.color), _hex(style.bgcolor)) if style else (None, None)
        if background:
            yield _rectangle(x, y, cell_len(text) * WIDTH, HEIGHT, background)
        for run, is_bar in _split_by_width(text):
            width = cell_len(run) * WIDTH
            if color and is_bar:  # The glyphs would not touch.
                columns = sum(map(EIGHTHS.index, run)) / 8
                yield _rectangle(x, y + 3, columns * WIDTH, HEIGHT - 6, color)
            elif run.strip():
                position = f'x="{x:g}" y="{y + 0.75 * HEIGHT:g}" textLength="{width:g}"'
                yield f'<text {position} lengthAdjust="spacingAndGlyphs"{_css(style)}>{escape(run)}</text>'
            x += width


def _hex(color: Color | None) -> str | None:
    return color.get_truecolor().hex if color and not color.is_default else None


def _rectangle(x: float, y: float, width: float, height: float, color: str) -> str:
    position = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {position} fill="{color}" shape-rendering="crispEdges"/>'


def _split_by_width(text: str) -> Iterator[tuple[str, bool]]:
    """Yield parts whose characters have the same width, and whether they are a bar."""
    graphemes, _ = split_graphemes(text)
    # A combining character at the beginning has no width.
    for (_, is_bar), run in groupby(graphemes, lambda span: (span[2] or 1, text[span[0] : span[1]] in EIGHTHS[1:])):
        yield "".join(text[start:end] for start, end, _ in run), is_bar


def _css(style: Style | None) -> str:
    if not style:
        return ""
    properties = {"fill": _hex(style.color), "font-weight": style.bold and "bold", "opacity": style.dim and "0.6"}
    rules = "; ".join(f"{name}: {value}" for name, value in properties.items() if value)
    return f' style="{rules}"' if rules else ""
