"""What typer keeps to itself: the classes that a command of our own derives from, or is called with."""

from typer import Context as Context
from typer.core import TyperCommand as TyperCommand
