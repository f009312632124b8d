"""llmcli serve: the worker, in the foreground."""

from typing import Annotated

from typer import Option

from llmcli.io.units import parse_duration
from llmcli.options import Quiet, Verbose, expand_options


@expand_options
def serve(
    keep_alive: Annotated[str | None, Option(metavar="DURATION",
        help="Exit after this long without requests (default: never).")] = None,
    quiet: Quiet = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Run the worker in the foreground.

    It keeps models loaded for other calls, which use it without further options, until Ctrl-C or `llmcli stop`.

    \b
    llmcli serve &
    llmcli generate "Once upon a time"              loads the model
    llmcli generate "Twice upon a time"             uses the loaded model
    """
    from llmcli.engines.worker.server import serve as serve_calls

    serve_calls(None if keep_alive is None else parse_duration(keep_alive))
