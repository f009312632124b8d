"""llmcli stop: stop the worker."""

from llmcli import console
from llmcli.engines.worker import client
from llmcli.options import Quiet, Verbose, expand_options


@expand_options
def stop(quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Stop the worker and cancel its jobs.

    \b
    llmcli stop
    """
    if not client.stop():
        console.notice("no worker is running")
