"""The command tree, and main(): the only place that catches and chooses the exit code."""

import contextlib
import importlib
import os
import pkgutil
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer

from llmcli import __version__, commands, console
from llmcli.errors import ExitStatus, LlmcliError, OutputClosedError, TerminatedError
from llmcli.options.expand import Command

app = typer.Typer(
    name="llmcli",
    help="Every local language model as a Unix filter.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: quicker, and it reads well in a pipe
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
for _name in (module.name for module in pkgutil.iter_modules(commands.__path__)):
    _module = importlib.import_module(f"{commands.__name__}.{_name}")
    if group := getattr(_module, "app", None):
        app.add_typer(group, name=_name)
    else:
        app.command(cls=Command)(getattr(_module, _name))


def _version(value: bool) -> None:
    if value:
        print(f"llmcli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


def run() -> NoReturn:
    """What the shell calls: `main`, and then the end at once. To take a model apart again is slow, and threads that
    wait for input, or for another process, would be waited for."""
    status = main()
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        pass
    except OSError as exc:
        console.error(f"stdout: {exc.strerror}")
        status = ExitStatus.FAILED
    os._exit(status)


def main(args: list[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit status."""
    with contextlib.suppress(ValueError):  # not the main thread: somebody's program calls us
        signal.signal(signal.SIGTERM, _terminate)
    try:
        app(args, prog_name="llmcli")
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else ExitStatus.OK
    except OutputClosedError as gone:
        return gone.status
    except LlmcliError as exc:
        console.error(exc.message, exc.hint, exc)
        return exc.status
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
    except TerminatedError:
        return ExitStatus.TERMINATED
    except OSError as exc:
        console.error(f"{exc.filename or 'stdout'}: {exc.strerror or exc}", None, exc)
        return ExitStatus.FAILED
    except Exception as exc:
        hint = None if console.verbose else "this is a bug in llmcli: run it again with -v, and please report it"
        console.error(f"unexpected {type(exc).__name__}: {exc}", hint, exc)
        return ExitStatus.FAILED
    return ExitStatus.OK


def _terminate(signum: int, frame: Any) -> None:
    raise TerminatedError
