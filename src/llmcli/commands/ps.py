"""llmcli ps: the models that the worker has loaded."""

from llmcli import console
from llmcli.engines.worker import client
from llmcli.io.output import print_lines, print_table, to_json
from llmcli.io.units import format_megabytes
from llmcli.options import Json, Quiet, Verbose, expand_options


@expand_options
def ps(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """List models loaded in the worker.

    Shows the memory of each, the jobs that use it, how long it has been idle, and when it expires.

    \b
    llmcli ps
    """
    status = client.status()
    if status is None:
        console.notice("no worker is running; start one with --keep-alive 10m or `llmcli serve`")
    elif json:
        print_lines([to_json(status)])
    else:
        rows = []
        for model in status["models"]:
            times = _format_duration(model["idle_seconds"]), _format_duration(model["expires_in_seconds"])
            memory = format_megabytes(model["bytes"])
            rows.append((model["model"], model["device"], model["dtype"], memory, str(model["jobs"]), *times))
        print_table(("MODEL", "DEVICE", "DTYPE", "MEMORY", "JOBS", "IDLE", "EXPIRES"), rows)
        console.notice(f"worker {status['pid']}: {format_megabytes(status['memory'])}, {status['jobs']} jobs")


def _format_duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.0f}s" if seconds < 100 else f"{seconds / 60:.0f}m"
