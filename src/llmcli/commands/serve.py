"""llmcli serve: the worker, in the foreground."""

from typing import Annotated

import typer

from llmcli.io.units import parse_duration
from llmcli.options import Quiet, Verbose
from llmcli.options.expand import expand_options


@expand_options
def serve(
    keep_alive: Annotated[
        str | None, typer.Option(metavar="DURATION", help="End when nothing was asked for so long (default: never).")
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Keep models warm for other calls, until Ctrl-C or `llmcli stop`. They find it by themselves.

    \b
    llmcli serve &
    llmcli generate "Once upon a time"              the first loads the model
    llmcli generate "Twice upon a time"             the second starts in a blink
    """
    from llmcli.engines.worker.server import serve as serve_calls

    serve_calls(None if keep_alive is None else parse_duration(keep_alive))
