"""The command tree, and main(): the only place that catches and chooses the exit code."""

import contextlib
import signal
from typing import Annotated, Any

import typer

from llmcli import __version__, console
from llmcli.commands import models
from llmcli.commands.chat import chat
from llmcli.commands.embed import embed
from llmcli.commands.env import env
from llmcli.commands.generate import generate
from llmcli.commands.qa import qa
from llmcli.commands.search import search
from llmcli.commands.summarize import summarize
from llmcli.commands.translate import translate
from llmcli.errors import ExitStatus, LlmcliError, ReaderGone, Terminated
from llmcli.grammar import Command

app = typer.Typer(
    name="llmcli",
    help="Every local language model as a Unix filter.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: quicker, and it reads well in a pipe
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command(cls=Command)(generate)
app.command(cls=Command)(chat)
app.command(cls=Command)(translate)
app.command(cls=Command)(summarize)
app.command(cls=Command)(qa)
app.command(cls=Command)(embed)
app.command(cls=Command)(search)
app.add_typer(models.app, name="models")
app.command(cls=Command)(env)


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


def main(args: list[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit status."""
    with contextlib.suppress(ValueError):  # not the main thread: somebody's program calls us
        signal.signal(signal.SIGTERM, _terminate)
    try:
        app(args, prog_name="llmcli")
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else ExitStatus.OK
    except ReaderGone as gone:
        return gone.status
    except LlmcliError as problem:
        console.error(problem.message, problem.hint, problem)
        return problem.status
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
    except Terminated:
        return ExitStatus.TERMINATED
    except OSError as problem:
        console.error(f"{problem.filename or 'stdout'}: {problem.strerror or problem}", None, problem)
        return ExitStatus.FAILED
    except Exception as problem:
        hint = None if console.verbose else "this is a bug in llmcli: run it again with -v, and please report it"
        console.error(f"unexpected {type(problem).__name__}: {problem}", hint, problem)
        return ExitStatus.FAILED
    return ExitStatus.OK


def _terminate(signum: int, frame: Any) -> None:
    raise Terminated
