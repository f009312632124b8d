"""What typer keeps to itself: the classes that commands of our own derive from, or is called with."""

from typer import Context as Context
from typer.core import TyperCommand as TyperCommand
from typer.core import TyperGroup as TyperGroup
