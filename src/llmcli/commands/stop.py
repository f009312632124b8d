"""llmcli stop: end the worker."""

from llmcli import console
from llmcli.engines.worker import client
from llmcli.grammar import spread
from llmcli.options import Quiet, Verbose


@spread
def stop(quiet: Quiet = False, verbose: Verbose = False) -> None:
    """End the worker, and what it is doing.

    \b
    llmcli stop
    """
    try:
        client.stop()
    except client.NoWorkerError:
        console.notice("no worker is running")
