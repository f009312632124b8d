"""The command tree, and main(), the only function that turns exceptions into exit codes."""

import contextlib
import functools
import importlib
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from shutil import get_terminal_size
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from llmcli import __version__, commands, console
from llmcli.errors import ExitStatus, LlmcliError, OutputClosedError, TerminatedError
from llmcli.options.expand import Command, Group
from llmcli.tasks import plugins

HELP_WIDTH = min(get_terminal_size().columns, 80) - 2


class RootGroup(Group):
    """The commands of llmcli, and those of plugins."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *plugins.find_plugins("commands")]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        is_plugin = cmd_name not in self.commands and cmd_name in plugins.find_plugins("commands")
        return PluginCommand(cmd_name, help="Run a plugin.") if is_plugin else super().get_command(ctx, cmd_name)


class PluginCommand(Command):
    """A command of another package, which is imported when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        plugin = plugins.load_plugin("commands", str(self.name), Callable)
        if isinstance(plugin, typer.Typer):
            return typer.main.get_group(plugin).make_context(info_name, args, parent, **extra)
        holder = typer.Typer(add_completion=False, rich_markup_mode=None)
        holder.command(cls=Command)(plugin)
        return typer.main.get_command(holder).make_context(info_name, args, parent, **extra)


app = typer.Typer(
    name="llmcli", cls=RootGroup, help="Run Transformers models from the command line.", no_args_is_help=True,
    rich_markup_mode=None,  # plain help is faster, and readable in a pipe
    pretty_exceptions_enable=False,
    # Typer lays out help for at least 50 columns unless it is told the width.
    context_settings={"help_option_names": ["--help", "-h"], "terminal_width": HELP_WIDTH},
)  # fmt: skip
for _name in (module.name for module in pkgutil.iter_modules(commands.__path__)):
    _module = importlib.import_module(f"{commands.__name__}.{_name}")
    if group := getattr(_module, "app", None):
        app.add_typer(group, name=_name, cls=Group)
    else:
        app.command(cls=Command)(getattr(_module, _name))


def _version(value: bool) -> None:
    if value:
        print(f"llmcli {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version.")]


@app.callback()
def root(version: Version = False) -> None: ...


@functools.cache
def _build_commands() -> Callable[..., None]:
    """Return the command tree. Building it takes longer than parsing a command line."""
    return typer.main.get_command(app)


def run() -> NoReturn:
    """Run the command line of the process, and end the process."""
    if sys.getfilesystemencoding() == "ascii":  # LC_ALL=C where Python's own UTF-8 mode is disabled
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    status = main()
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        pass
    except OSError as exc:
        console.error(f"stdout: {exc.strerror}")
        status = ExitStatus.FAILED
    os._exit(status)  # Freeing a model is slow, and threads that wait for input would delay the exit.


def main(args: list[str] | None = None) -> int:
    """Run a command line, without the name of the program, and return its exit status."""
    with _raise_on_sigterm(), console.sanitized():
        try:
            os.getcwd()  # raises an error that names no file if the directory has been deleted
            _build_commands()(args, prog_name="llmcli")
        except SystemExit as exc:  # As Python's own exit does: a text is printed, and means failure.
            if exc.code is None or isinstance(exc.code, int):
                return exc.code or ExitStatus.OK
            console.error(exc.code)
            return ExitStatus.FAILED
        except OutputClosedError as exc:
            return exc.status
        except LlmcliError as exc:
            console.error(exc.message, exc.hint, exc)
            return exc.status
        except KeyboardInterrupt:
            return ExitStatus.INTERRUPTED
        except TerminatedError:
            return ExitStatus.TERMINATED
        except OSError as exc:
            place = "the working directory" if isinstance(exc, FileNotFoundError) else "stdout"
            console.error(f"{exc.filename or place}: {exc.strerror or exc}", None, exc)
            return ExitStatus.FAILED
        except Exception as exc:
            hint = None if console.verbose else "this is a bug; please report it with the output of -v and `llmcli env`"
            console.error(f"unexpected {type(exc).__name__}: {exc}", hint, exc)
            return ExitStatus.FAILED
    return ExitStatus.OK


@contextlib.contextmanager
def _raise_on_sigterm() -> Iterator[None]:
    """Raise TerminatedError when SIGTERM arrives; a program that calls `main` gets its own handler back."""

    def terminate(signum: int, frame: FrameType | None) -> NoReturn:
        raise TerminatedError

    is_main = threading.current_thread() is threading.main_thread()  # Only this thread may set a handler.
    previous = signal.signal(signal.SIGTERM, terminate) if is_main else None
    try:
        yield
    finally:
        if previous is not None:  # None: the handler was not set, or not from Python.
            signal.signal(signal.SIGTERM, previous)
