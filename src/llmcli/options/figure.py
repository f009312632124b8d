"""Options for figures: draw them in the terminal or into files, or print their data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from llmcli import console
from llmcli.errors import UsageError
from llmcli.io.output import is_terminal, print_lines, to_json, write_file
from llmcli.job import JsonObject
from llmcli.options.input_output import Json, Quiet, Verbose

if TYPE_CHECKING:
    from rich.console import RenderableType

Draw = Callable[[Any, int | None, bool], "RenderableType"]


@dataclass
class FigureOptions:
    """Output"""

    json: Json = False
    svg: Annotated[Path | None, Option("--svg", metavar="FILE", help="Save the figure as SVG.")] = None
    html: Annotated[Path | None, Option("--html", metavar="FILE", help="Save the figure as an HTML page.")] = None
    quiet: Quiet = False
    verbose: Verbose = False

    def __post_init__(self) -> None:
        self.files = {kind: path for kind, path in (("svg", self.svg), ("html", self.html)) if path}
        for kind, path in self.files.items():
            if path.suffix != f".{kind}":  # An existing file is replaced, so it should be a figure.
                raise UsageError(f"--{kind} requires a name that ends in .{kind}, got '{path}'")

    def show(self, draw: Draw, objects: Sequence[JsonObject], rows: Sequence[Sequence[str]], title: str) -> None:
        """Save the figure, draw it in the terminal, or print its data.

        Args:
            draw: `draw(figures, width, has_colors)` returns the figure; `figures` is the module that draws. If the
                width (in columns) is None, the figure is as wide as it needs to be.
            objects: What --json prints.
            rows: What a pipe gets, as tab-separated values.
            title: Title of a file.
        """
        for kind, path in self.files.items():
            from llmcli.draw import figures, svg

            write_file(path, getattr(svg, kind)(draw(figures, None, True), title))
            console.notice(f"saved {path}")
        if self.json:
            print_lines(map(to_json, objects))
        elif self.files:
            return
        elif is_terminal():
            from llmcli.draw import figures

            terminal = figures.terminal()
            figure = draw(figures, terminal.width, figures.has_colors(terminal))
            print_lines([figures.render(figure, terminal)], is_styled=True)
        else:
            print_lines("\t".join(row) for row in rows)
