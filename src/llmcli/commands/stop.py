"""llmcli stop: end the worker."""

from llmcli import console
from llmcli.engines.worker import client
from llmcli.options import Quiet, Verbose
from llmcli.options.expand import expand_options


@expand_options
def stop(quiet: Quiet = False, verbose: Verbose = False) -> None:
    """End the worker, and what it is doing.

    \b
    llmcli stop
    """
    try:
        client.stop()
    except client.WorkerUnavailableError:
        console.notice("no worker is running")
