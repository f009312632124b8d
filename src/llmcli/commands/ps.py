"""llmcli ps: what the worker keeps warm."""

from llmcli import console
from llmcli.engines.worker import client
from llmcli.io.output import print_lines, print_table, to_json
from llmcli.io.units import format_megabytes
from llmcli.options import Json, Quiet, Verbose
from llmcli.options.expand import expand_options


@expand_options
def ps(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Show what the worker keeps warm: models, memory, idle times.

    \b
    llmcli ps
    """
    try:
        status = client.status()
    except client.WorkerUnavailableError:
        console.notice("no worker is running: --keep-alive 10m starts one, and so does `llmcli serve`")
        return
    if json:
        print_lines([to_json(status)])
        return
    print_table(
        ("MODEL", "DEVICE", "DTYPE", "MEMORY", "JOBS", "IDLE", "LEFT"),
        [
            (each["model"], each["device"], each["dtype"], format_megabytes(each["bytes"]), str(each["jobs"]),
             _seconds(each["idle"]), _seconds(each["left"]))
            for each in status["models"]
        ],
    )  # fmt: skip
    console.notice(f"worker {status['process']}: {format_megabytes(status['memory'])}, {status['jobs']} jobs")


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}s" if value < 100 else f"{value / 60:.0f}m"
